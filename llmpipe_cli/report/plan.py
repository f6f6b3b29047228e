"""What `llmpipe plan` shows: the best layouts, memory a stage, the schedule's picture, the scaling curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from llmpipe_cli.engine.schedules import SCHEDULES
from llmpipe_cli.plan.simulate import StageCosts, simulate_schedule
from llmpipe_cli.report import formats
from llmpipe_cli.report.timeline import Bar, RankTimeline, Timeline

_PARTS = (
    ("weights", "cyan"),
    ("gradients", "blue"),
    ("optimizer", "magenta"),
    ("activations", "green"),
    ("buffers", "yellow"),
)
_DRAWN_MICRO_BATCHES = 3
_MOST_SHOWN = 12
_WIDE = 110  # columns from which speeds have room beside the layouts


def layouts_table(layouts: Sequence[dict[str, Any]], chosen: int | None, width: int = 120) -> Group:
    """The layouts for a terminal of so many columns, the chosen one marked, and why it is not another."""
    wide = width >= _WIDE
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2 if wide else 1, 0, 0))
    table.add_column("", justify="right", no_wrap=True)
    for name in ("pipeline x tensor x data" if wide else "p x t x d", "batches", "schedule", "ZeRO", "recompute"):
        table.add_column(name, no_wrap=True)
    for name in ("step s", *(("tokens/s", "TFLOP/s") if wide else ()), "idle", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    reasons = []
    for index, row in enumerate(layouts[:_MOST_SHOWN]):
        seconds, style = row["step_seconds"], "" if row["fits"] else "dim"
        speeds = (
            formats.count(row["tokens_per_second"]),
            "–" if seconds is None else f"{row['model_tflops_per_device']:.3g}",
        )
        table.add_row(
            "*" if index == chosen else str(index + 1),
            f"{row['pipeline']} x {row['tensor']} x {row['data']}",
            f"{row['num_micro_batches']} of {row['micro_batch_size']}",
            row["schedule"],
            str(row["zero_stage"]),
            row["activation_checkpointing"],
            "–" if seconds is None else f"{seconds:.3g}",
            *(speeds if wide else ()),
            "–" if seconds is None else f"{row['bubble_fraction']:.1%}",
            formats.memory(max(row["memory_bytes"])),
            style=style,
        )
        if row["why_not"]:
            reasons.append(Text(f"{index + 1:>2}  {row['why_not']}", style=style))
    below = [Text(), Text("Why not the others" if chosen is not None else "Why not", style="bold"), *reasons]
    return Group(table, *(below if reasons else []))


def scaling_table(points: Sequence[dict[str, Any]]) -> Table:
    """What other numbers of nodes would give; `points` as `plot_scaling` takes them."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("nodes", "devices", "pipeline x tensor x data", "step s", "tokens/s", "a device"):
        table.add_column(name, justify="left" if " x " in name else "right", no_wrap=True)
    first = next((point for point in points if point["tokens_per_second"]), None)
    for point in points:
        speed, cells = point["tokens_per_second"], ["nothing fits", "–", "–", "–"]
        if speed and first is not None:
            share = speed / point["devices"] / (first["tokens_per_second"] / first["devices"])
            cells = [point["layout"], f"{point['step_seconds']:.3g}", formats.count(speed), f"{share:.0%}"]
        table.add_row(str(point["nodes"]), str(point["devices"]), *cells)
    return table


def memory_bars(layout: dict[str, Any], capacities: Sequence[float], width: int = 60) -> Text:
    """A bar a stage: what its memory is for, against what its device has."""
    text = Text()
    for stage, (parts, capacity) in enumerate(zip(layout["memory_parts"], capacities, strict=True)):
        total = layout["memory_bytes"][stage]
        text.append(f"stage {stage:<3d} ")
        used = 0
        for name, color in _PARTS:
            columns = round(parts[name] / max(capacity, total) * width)
            used += columns
            text.append("█" * columns, style=color)
        text.append("·" * max(0, width - used), style="dim")
        text.append(f" {formats.memory(total)} of {formats.memory(capacity)}\n")
    text.append(" " * 10)
    for name, color in _PARTS:
        text.append("█ ", style=color)
        text.append(f"{name}  ")
    return text


def schedule_timeline(schedule: str, costs: Sequence[StageCosts], num_micro_batches: int, chunks: int) -> Timeline:
    """A step's first micro-batches as the schedule runs them, to be drawn by `report.timeline`."""
    parts = SCHEDULES[schedule].placement(1, chunks).num_chunks
    stages = len(costs) // parts
    count = min(num_micro_batches, _DRAWN_MICRO_BATCHES * stages + 2)
    played = simulate_schedule(SCHEDULES[schedule], costs, count, 0.0, chunks)
    ranks = [RankTimeline(stage, stage, 0, []) for stage in range(stages)]
    for span in played.spans:
        kind, micro_batch, chunk = span.instruction
        ranks[span.stage].bars.append(Bar(kind, micro_batch, span.start, span.end, chunk))
    name = f"{count} micro-batches" if count == num_micro_batches else f"{count} of {num_micro_batches} micro-batches"
    return Timeline(0, schedule, ranks, parts, name)


def plot_scaling(points: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw tokens a second over devices, beside what perfect scaling from the first point would give.

    Args:
        points: `devices`, `tokens_per_second` (None where nothing fits) and `layout` of each number of nodes.
        path: PNG or SVG.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    fitting = [point for point in points if point["tokens_per_second"] is not None]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    devices = [point["devices"] for point in fitting]
    axes.plot(devices, [point["tokens_per_second"] for point in fitting], "o-", label="predicted")
    if fitting:
        each = fitting[0]["tokens_per_second"] / fitting[0]["devices"]
        axes.plot(devices, [each * count for count in devices], "--", color="gray", label="perfect scaling")
    for point in fitting:
        axes.annotate(point["layout"], (point["devices"], point["tokens_per_second"]), fontsize=7, rotation=15)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(devices, [str(count) for count in devices])
    axes.set_xlabel("devices")
    axes.set_ylabel("tokens a second")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
