"""What a command says at its end: the results, and where everything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmpipe_cli.errors import EXIT_STOPPED
from llmpipe_cli.report import formats
from llmpipe_cli.report.progress import Progress
from llmpipe_cli.run import RunDirectory


def training_summary(
    run: RunDirectory, progress: Progress, checkpoint: Path | None, plot: Path | None, exit_code: int
) -> RenderableType:
    """Losses at both ends, and the paths of run directory, checkpoint and plot."""
    word = {0: ("done", "bold green"), EXIT_STOPPED: ("stopped", "bold yellow")}.get(exit_code, ("ended", "bold red"))
    head = Text.assemble(word, f" after step {progress.step:,}" if progress.step else " before the first step")
    rows: list[tuple[str, Any]] = []
    losses = progress.loss_points()
    if losses:
        rows.append(("training loss", _from_to(losses[0][1], losses[-1][1])))
    held_out = progress.validation_points()
    if held_out:
        rows.append(("validation loss", _from_to(held_out[0][1], held_out[-1][1])))
    if progress.tokens_per_second():
        rows.append(("speed", Text(f"{formats.count(progress.tokens_per_second())} tokens/s")))
    rows.append(("run", run.path))
    rows.append(("checkpoint", checkpoint or "none"))
    if plot is not None:
        rows.append(("plot", plot))
    return Group(head, *[_row(name, value) for name, value in rows])


def evaluation_table(result: dict[str, Any]) -> RenderableType:
    """The metrics of one evaluation."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in result["metrics"].items():
        table.add_row(name, formats.precise(name, value) if isinstance(value, float) else str(value))
    parts = [str(result["task"])]
    if result.get("num_samples") is not None:
        parts.append(f"{result['num_samples']:,} samples")
    if result.get("num_target_tokens") is not None:
        parts.append(f"{result['num_target_tokens']:,} target tokens")
    rows: list[RenderableType] = [table, Text(" · ".join(parts), style="dim")]
    if result.get("signature"):
        rows.append(Text(str(result["signature"]), style="dim"))
    return Group(*rows)


def folds_table(result: dict[str, Any]) -> RenderableType:
    """Mean and deviation of each metric of a cross-validation."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    for title in ("metric", "mean", "deviation"):
        table.add_column(title, justify="left" if title == "metric" else "right")
    for name, mean in result["metrics"].items():
        table.add_row(name, formats.precise(name, mean), formats.precise(name, result["deviation"][name]))
    return Group(table, Text(f"{result['task']} · {result['folds']} folds", style="dim"))


def _from_to(first: float, last: float) -> Text:
    text = Text.assemble(formats.loss(first), " → ", (formats.loss(last), "bold"))
    if first > 0 and last < first:
        text.append(f"  ({100 * (1 - last / first):.0f} % lower)", style="green")
    return text


def _row(name: str, value: Any) -> Text:
    return Text(f"  {name:<16} ", style="dim") + (value if isinstance(value, Text) else Text(str(value)))
