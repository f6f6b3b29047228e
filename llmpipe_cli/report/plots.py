"""Loss curves as a PNG, drawn with matplotlib (imported only here, without a display).

One run is drawn as its training curve and its validation points. A run that was resumed on other layouts changes its
colour where it was, and each part names its layout. Further runs are laid beneath it; with one other run, a second
panel shows how far the two are apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpipe_cli.report.history import History
from llmpipe_cli.report.progress import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PART_COLORS = ("#0f7c90", "#d1603d", "#5b4b9a", "#2f8f4e", "#b8348b", "#8a6d1d", "#3b6fd4")
_OTHER_COLORS = ("#b9c0c7", "#d8c3a5", "#c5b3d6")
_VALIDATION = "#20262c"
_INK = "#3a434c"
_GRID = "#e6e9ec"
_SMOOTH_FROM = 200


def plot_loss(histories: Sequence[History], path: Path) -> Path:
    """Draw loss over steps.

    Args:
        histories: the first is drawn in front and names its parts; each needs at least one training point.
        path: the PNG to write; an older one is replaced.

    Returns:
        `path`.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    main, others = histories[0], histories[1:]
    differences = _differences(main, others[0]) if len(others) == 1 else []
    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "text.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.family": "DejaVu Sans",
    }
    with plt.rc_context(style):
        if differences:
            figure, axes = plt.subplots(
                2, 1, figsize=(9, 6), sharex=True, height_ratios=(3.2, 1), layout="constrained", squeeze=True
            )
            top, bottom = axes
            _draw_differences(bottom, differences)
        else:
            figure, top = plt.subplots(figsize=(9, 5), layout="constrained")
            bottom = top
        names = [_short_name(history) for history in histories]
        for other, color in zip(others, _cycle(_OTHER_COLORS, len(others)), strict=True):
            name = _short_name(other) if names.count(_short_name(other)) == 1 else other.label
            _draw_other(top, other, name, color)
        _draw_parts(top, main)
        _draw_validation(top, main)
        top.set_ylabel("loss (nats per token)")
        top.grid(axis="y", color=_GRID)
        top.set_axisbelow(True)
        bottom.set_xlabel("step")
        top.legend(loc="upper right", framealpha=1.0, edgecolor="none", facecolor="white")
        top.set_title(_title(main), loc="left", fontweight="bold", pad=26 if len(main.parts) > 1 else 10)
        top.margins(x=0.01)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def _draw_parts(axes: Axes, history: History) -> None:
    """The front curve, a colour a part; each part starts where the one before ended."""
    several = len(history.parts) > 1
    points = history.train
    for index, part in enumerate(history.parts):
        end = history.parts[index + 1].after_step if index + 1 < len(history.parts) else float("inf")
        mine = [point for point in points if part.after_step <= point[0] <= end]
        if not mine:
            continue
        color = _PART_COLORS[index % len(_PART_COLORS)]
        label = None if several else "training"
        if several and index > 0:
            axes.axvline(part.after_step, color=color, linewidth=1, linestyle=(0, (4, 3)), alpha=0.8)
        if several:
            axes.annotate(
                part.layout,
                (max(part.after_step, mine[0][0]), 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(4, 6),
                textcoords="offset points",
                color=color,
                fontsize=8.5,
                rotation=0 if len(history.parts) <= 6 else 20,
            )
        _draw_line(axes, mine, color, label)
    if several:
        axes.plot([], [], color=_PART_COLORS[0], linewidth=1.8, label=_resumed(history))


def _draw_line(axes: Axes, points: list[Point], color: str, label: str | None) -> None:
    steps, losses = zip(*points, strict=True)
    if len(points) < _SMOOTH_FROM:
        axes.plot(steps, losses, color=color, linewidth=1.8, label=label, marker="o" if len(points) == 1 else None)
        return
    axes.plot(steps, losses, color=color, linewidth=0.8, alpha=0.3)
    axes.plot(steps, _smooth(losses), color=color, linewidth=1.8, label=label)


def _draw_other(axes: Axes, history: History, name: str, color: str) -> None:
    steps, losses = zip(*history.train, strict=True)
    layout = f" ({history.parts[-1].layout})" if history.parts else ""
    axes.plot(steps, losses, color=color, linewidth=6, solid_capstyle="round", label=f"{name}{layout}")


def _draw_validation(axes: Axes, history: History) -> None:
    if history.validation:
        steps, losses = zip(*history.validation, strict=True)
        axes.plot(
            steps, losses, color=_VALIDATION, linewidth=0.8, linestyle=":", marker="o", markersize=4, label="validation"
        )


def _draw_differences(axes: Axes, differences: list[Point]) -> None:
    steps, values = zip(*differences, strict=True)
    axes.plot(steps, values, color=_INK, linewidth=1)
    axes.set_ylabel("difference")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)


def _differences(one: History, other: History) -> list[Point]:
    theirs = dict(other.train)
    points = [(step, abs(loss - theirs[step])) for step, loss in one.train if step in theirs]
    return points if len(points) >= 2 else []


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours within 1 % of the curve to both sides: it neither lags nor leads."""
    reach = max(5, len(values) // 100)
    smoothed = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        window = values[index - near : index + near + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def _resumed(history: History) -> str:
    times = len(history.parts) - 1
    on_others = " on other layouts" if len({part.layout for part in history.parts}) > 1 else ""
    return f"{_short_name(history)}, resumed {times} time{'s' if times > 1 else ''}{on_others}"


def _short_name(history: History) -> str:
    return history.parts[0].run.recipe_name if history.parts else history.label


def _cycle(colors: Sequence[str], length: int) -> list[str]:
    return [colors[index % len(colors)] for index in range(length)]


def _title(history: History) -> str:
    (_, first), (steps, last) = history.train[0], history.train[-1]
    return f"{_short_name(history)}: {first:.2f} to {last:.2f} in {int(steps):,} steps"
