"""Throughput of several layouts and schedules side by side, from the runs that measured them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from llmpipe_cli.report import formats
from llmpipe_cli.report.timeline import load_timeline, summary
from llmpipe_cli.run import RunDirectory, read_metrics


@dataclass
class Contender:
    """One variant of the recipe and its measured runs.

    Attributes:
        name: what differs from the others.
        layout: pipeline, tensor and data.
        schedule: the schedule's name.
        runs: one a round.
    """

    name: str
    layout: dict[str, int]
    schedule: str
    runs: list[RunDirectory] = field(default_factory=list)

    @property
    def num_devices(self) -> int:
        return self.layout["pipeline"] * self.layout["tensor"] * self.layout["data"]


def tokens_per_second(run: RunDirectory, warmup: int) -> float:
    """Median over the steps after the warm-up."""
    return statistics.median(line["tokens_per_second"] for line in _steps(run)[warmup:])


def bench_rows(contenders: Sequence[Contender], baseline: int, warmup: int) -> list[dict[str, Any]]:
    """One row a contender.

    Args:
        contenders: each with as many runs as the others; runs of the same round are neighbours in time.
        baseline: the contender that `speedup` is relative to: the ratio within each round, its median over the rounds.
        warmup: steps at the beginning of each run that do not count.
    """
    speeds = [[tokens_per_second(run, warmup) for run in contender.runs] for contender in contenders]
    rows = []
    for contender, own in zip(contenders, speeds, strict=True):
        ratios = [mine / other for mine, other in zip(own, speeds[baseline], strict=True)]
        speedup = statistics.median(ratios)
        facts = [summary(load_timeline(run)) for run in contender.runs]
        steps = [line for run in contender.runs for line in _steps(run)[warmup:]]
        num_stages = contender.layout["pipeline"]
        rows.append(
            {
                "system": contender.name,
                "layout": contender.layout,
                "schedule": contender.schedule,
                "tokens_per_second": statistics.median(own),
                "tokens_per_second_range": [min(own), max(own)],
                "step_seconds": statistics.median(line["step_seconds"] for line in steps),
                "speedup": speedup,
                "speedup_range": [min(ratios), max(ratios)],
                "efficiency": speedup / contender.num_devices,
                "bubble_fraction": statistics.median(fact["bubble_fraction"] for fact in facts),
                "simulated_bubble_fraction": statistics.median(fact["simulated_bubble_fraction"] for fact in facts),
                "memory_bytes": [max(line["memory_bytes"][stage] for line in steps) for stage in range(num_stages)],
                "mfu": None,
                "runs": [str(run.path) for run in contender.runs],
            }
        )
    return rows


def bench_table(rows: Sequence[dict[str, Any]], baseline: int) -> Table:
    """The rows for a terminal; the speed-up is over row `baseline`."""
    name = rows[baseline]["system"]
    caption = f"speed-up over {name}: median of the rounds (smallest to largest); idle: share of the pipeline's time"
    table = Table(box=None, header_style="bold", pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("system")
    table.add_column("layout")
    table.add_column("schedule")
    for name in ("tokens/s", "step s", "speed-up", "efficiency", "idle", "simulated", "memory"):
        table.add_column(name, justify="right")
    for row in rows:
        low, high = row["speedup_range"]
        table.add_row(
            row["system"],
            formats.layout(row["layout"]),
            row["schedule"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['step_seconds']:.3f}",
            f"{row['speedup']:.3f} ({low:.3f} to {high:.3f})",
            f"{row['efficiency']:.2f}",
            f"{row['bubble_fraction']:.1%}",
            f"{row['simulated_bubble_fraction']:.1%}",
            " ".join(formats.memory(value) for value in row["memory_bytes"]),
        )
    return table


def _steps(run: RunDirectory) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run.metrics) if "event" not in line]
