"""Experiment trackers: TensorBoard and Weights & Biases get what metrics.jsonl gets.

A tracker takes each line's numbers as scalars at the line's step. It is a guest: what it raises is told once, and
training goes on without it, since metrics.jsonl holds everything. Which account and project the numbers go to is each
tool's own environment (WANDB_API_KEY, WANDB_PROJECT, WANDB_MODE ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from llmpipe_cli.run import RunDirectory

_DEFAULT_PROJECT = "llmpipe"
# Fields of a line that are its place on the axis and no values.
_AXIS = ("step", "time")


class Tracker(Protocol):
    """A place where scalars go."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Note `values` (dotted name to number) at `step`."""

    def close(self) -> None:
        """Send or write everything that is left."""


class TensorBoard:
    """Event files in the run directory's `tensorboard/` folder; a dot in a name starts a group there."""

    def __init__(self, run: RunDirectory, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name.replace(".", "/"), value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases with the recipe as its config; its files stay in the run directory."""

    def __init__(self, run: RunDirectory, config: Mapping[str, Any]) -> None:
        import os

        import wandb

        project = os.environ.get("WANDB_PROJECT", _DEFAULT_PROJECT)
        self._run = wandb.init(project=project, name=run.path.name, dir=str(run.path), config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Callable[[RunDirectory, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


class Trackers:
    """All trackers of a run.

    Args:
        names: `report_to` of the recipe.
        run: the run directory.
        config: the recipe, as a tracker shows it beside the curves.
        warn: takes one sentence when a tracker fails; the tracker is left out from then on.
    """

    def __init__(
        self, names: Sequence[str], run: RunDirectory, config: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        for name in names:
            try:
                self._open[name] = _TRACKERS[name](run, config)
            except Exception as error:  # a tracker may raise anything, and never ends a training
                self._drop(name, error)

    def log(self, line: Mapping[str, Any]) -> None:
        """Hand one line of metrics.jsonl on; lines without a number are left out."""
        values = dict(scalars(line))
        if not values:
            return
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(values, int(line["step"]))
            except Exception as error:
                self._drop(name, error)

    def close(self) -> None:
        """Flush all of them."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.close()
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        self._warn(f"report_to: {name} is left out: {type(error).__name__}: {error}")


def scalars(line: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The numbers of a metrics line with dotted names: `stages.0.busy_seconds`, `evaluation.perplexity`."""
    if "event" not in line:
        values = {name: value for name, value in line.items() if name not in _AXIS}
    elif line["event"] == "evaluation":
        values = {"evaluation": line["metrics"]}
    else:
        return []
    return _flatten("", values)


def _flatten(prefix: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return []
    if isinstance(value, (int, float)):
        return [(prefix, float(value))]
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    return [pair for key, item in items for pair in _flatten(f"{prefix}.{key}" if prefix else str(key), item)]
