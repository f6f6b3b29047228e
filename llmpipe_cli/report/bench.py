"""Throughput of several layouts and schedules side by side, from the runs that measured them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmpipe_cli.engine.recorder import PARTS
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
        flops_per_token: floating-point operations of the model's forward and backward pass, recomputation left out.
        peak_flops: what one device can do a second; none where that is not known.
    """

    name: str
    layout: dict[str, int]
    schedule: str
    runs: list[RunDirectory] = field(default_factory=list)
    flops_per_token: float = 0.0
    peak_flops: float | None = None

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
        mfu = None
        if contender.peak_flops is not None:
            mfu = statistics.median(own) * contender.flops_per_token / (contender.peak_flops * contender.num_devices)
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
                "mfu": mfu,
                "step_split": _split(steps),
                "runs": [str(run.path) for run in contender.runs],
            }
        )
    return rows


def _split(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of the step that the stages spend on each part, their mean; the rest is ``other``."""
    total = sum(line["step_seconds"] * len(line["stages"]) for line in steps)
    shares = {
        part: sum(stage[f"{part}_seconds"] for line in steps for stage in line["stages"]) / total for part in PARTS
    }
    return {**shares, "other": max(0.0, 1.0 - sum(shares.values()))}


def split_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Where the step's time goes, for a terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False, caption="share of the step, mean of the stages")
    table.caption_justify = "left"
    table.add_column("system", overflow="fold")
    for part in rows[0]["step_split"]:
        table.add_column(_PART_NAMES.get(part, part), justify="right")
    for row in rows:
        table.add_row(row["system"], *(f"{share:.1%}" for share in row["step_split"].values()))
    return table


def plot(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw tokens/s with their range and what the steps consist of into a PNG or SVG, by the name's ending."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [f"{row['system']}\n{formats.layout(row['layout'])}, {row['schedule']}" for row in rows]
    figure, (speed, parts) = plt.subplots(
        1, 2, figsize=(11, 1.4 + 0.5 * len(rows)), layout="constrained", sharey=True, width_ratios=(2, 3)
    )
    middles = [row["tokens_per_second"] for row in rows]
    ranges = [[abs(row["tokens_per_second_range"][end] - row["tokens_per_second"]) for row in rows] for end in (0, 1)]
    speed.barh(names, middles, xerr=ranges, color="#3b6fd4", error_kw={"elinewidth": 1})
    speed.set_xlabel("tokens a second")
    speed.invert_yaxis()
    left = [0.0] * len(rows)
    for part, color in _PART_COLORS.items():
        shares = [row["step_split"][part] for row in rows]
        parts.barh(names, shares, left=left, color=color, label=_PART_NAMES.get(part, part))
        left = [start + share for start, share in zip(left, shares, strict=True)]
    parts.set_xlim(0.0, 1.0)
    parts.set_xlabel("share of the step, mean of the stages")
    for axes in (speed, parts):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*parts.get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


_PART_NAMES = {"busy": "compute", "wait_activations": "wait for activations", "wait_gradients": "wait for gradients"}
_PART_COLORS = {
    "busy": "#3b6fd4",
    "wait_activations": "#d9dde1",
    "wait_gradients": "#b9c0c7",
    "send": "#b8348b",
    "reduce": "#d1603d",
    "optimizer": "#5b4b9a",
    "data": "#8a6d1d",
    "other": "#f0e9d8",
}


def bench_tables(rows: Sequence[dict[str, Any]], baseline: int, width: int) -> list[Table]:
    """The rows for a terminal of this width: one table, or where that is too wide one of speeds and one of use.

    The speed-up is over row `baseline`.
    """
    speed = f"speed-up over {rows[baseline]['system']}: median of the rounds (smallest to largest)"
    use = "idle: share of the pipeline's time"
    whole = _table(rows, [*_SPEEDS, *_USE], f"{speed}; {use}")
    if Console(width=10_000).measure(whole).maximum <= width:
        return [whole]
    return [_table(rows, _SPEEDS, speed), _table(rows, _USE, use)]


def _table(rows: Sequence[dict[str, Any]], columns: Sequence[str], caption: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("system", overflow="fold")
    for name in columns:
        table.add_column(name, justify="left" if name in ("layout", "schedule") else "right")
    for row in rows:
        cells = _cells(row)
        table.add_row(row["system"], *(cells[name] for name in columns))
    return table


_SPEEDS = ("layout", "schedule", "tokens/s", "step s", "speed-up")
_USE = ("efficiency", "MFU", "idle", "simulated", "memory")


def _cells(row: dict[str, Any]) -> dict[str, str]:
    low, high = row["speedup_range"]
    return {
        "layout": formats.layout(row["layout"]),
        "schedule": row["schedule"],
        "tokens/s": f"{row['tokens_per_second']:.0f}",
        "step s": f"{row['step_seconds']:.3f}",
        "speed-up": f"{row['speedup']:.3f} ({low:.3f} to {high:.3f})",
        "efficiency": f"{row['efficiency']:.2f}",
        "MFU": "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
        "idle": f"{row['bubble_fraction']:.1%}",
        "simulated": f"{row['simulated_bubble_fraction']:.1%}",
        "memory": " ".join(formats.memory(value) for value in row["memory_bytes"]),
    }


def _steps(run: RunDirectory) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run.metrics) if "event" not in line]
