"""A sweep's result: a table, the best trial, and a plot of the metric over the trials and over each field."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from llmpipe_cli.report import formats
from llmpipe_cli.sweep.journal import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STATE_STYLES = {"complete": "green", "pruned": "yellow", "failed": "red", "running": "cyan"}
_COLORS = {"complete": "#0f7c90", "pruned": "#b9c0c7"}
_BEST = "#d1603d"
_MAX_FIELDS = 5


def best_trial(trials: Sequence[Trial], lower_is_better: bool) -> Trial | None:
    """The complete trial with the best value, the first of equals; None without one."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    sign = 1.0 if lower_is_better else -1.0
    return min(complete, key=lambda trial: sign * (trial.value or 0.0), default=None)


def sweep_table(trials: Sequence[Trial], metric: str, best: Trial | None) -> Table:
    """A line a trial by number, the best one marked."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("trial", justify="right")
    for name in trials[0].values if trials else ():
        table.add_column(_short(name), justify="right", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in (metric, "steps", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for trial in trials:
        is_best = best is not None and trial.number == best.number
        value = "–" if trial.value is None else formats.metric(metric, trial.value)
        table.add_row(
            str(trial.number),
            *trial.values.values(),
            Text(trial.state, style=_STATE_STYLES[trial.state]),
            value,
            str(trial.step),
            formats.duration(trial.seconds),
            "best" if is_best else trial.message or "",
            style="bold" if is_best else None,
        )
    return table


def plot_sweep(trials: Sequence[Trial], metric: str, best: Trial | None, log_fields: Sequence[str], path: Path) -> Path:
    """Draw the metric over the trials and over the values of each field.

    Args:
        trials: ended ones; those without a value are left out.
        metric: its name.
        best: the trial to mark.
        log_fields: fields whose axis is logarithmic.
        path: the PNG to write.

    Returns:
        `path`.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [trial for trial in trials if trial.value is not None and trial.state in _COLORS]
    fields = list(trials[0].values)[:_MAX_FIELDS] if trials else []
    num_panels = 1 + len(fields)
    figure, axes = plt.subplots(
        1, num_panels, figsize=(3.4 * num_panels, 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    _draw(axes[0][0], shown, [float(trial.number) for trial in shown], best)
    axes[0][0].set_xlabel("trial")
    axes[0][0].set_ylabel(metric)
    axes[0][0].xaxis.get_major_locator().set_params(integer=True)
    for panel, field in zip(axes[0][1:], fields, strict=True):
        _draw_field(panel, shown, field, best, log=field in log_fields)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _draw_field(panel: Axes, shown: Sequence[Trial], field: str, best: Trial | None, *, log: bool) -> None:
    """Values on an axis of numbers where all are numbers, else side by side."""
    texts = [trial.values[field] for trial in shown]
    panel.set_xlabel(_short(field))
    try:
        positions = [float(text) for text in texts]
    except ValueError:
        names = sorted(set(texts))
        positions = [float(names.index(text)) for text in texts]
        panel.set_xticks(range(len(names)), names)
        log = False
    if log and all(position > 0 for position in positions):
        panel.set_xscale("log")
    _draw(panel, shown, positions, best)


def _draw(panel: Axes, shown: Sequence[Trial], positions: Sequence[float], best: Trial | None) -> None:
    for state, color in _COLORS.items():
        points: list[tuple[float, Any]] = [
            (at, trial.value) for at, trial in zip(positions, shown, strict=True) if trial.state == state
        ]
        if points:
            panel.plot(*zip(*points, strict=True), "o" if state == "complete" else "x", color=color, label=state)
    for at, trial in zip(positions, shown, strict=True):
        if best is not None and trial.number == best.number:
            panel.plot([at], [best.value or 0.0], "o", color=_BEST, markersize=9, label="best")
    panel.grid(axis="y", color="#e6e9ec")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _short(field: str) -> str:
    return field.split(".")[-1]
