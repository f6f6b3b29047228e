"""When a trial is given up while it runs: the median rule, and the numbers that it compares.

A trial's numbers are the sweep's metric at each evaluation on the way. Where the recipe does not evaluate on the way
and the metric is the loss, they are means of the training loss over tenths of the training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmpipe_cli.sweep.journal import Report, Trial

_WINDOWS = 10


@dataclass(frozen=True)
class MedianRule:
    """Gives a trial up whose best number so far is worse than the median of the complete trials at the same step.

    The rule of Golovin et al. 2017 (Vizier) in the form that optuna's MedianPruner has.

    Attributes:
        lower_is_better: whether the metric is a loss.
        startup_trials: complete trials before any is given up.
        warmup_steps: steps of each trial before it may be given up.
    """

    lower_is_better: bool
    startup_trials: int
    warmup_steps: int

    def verdict(self, reports: Sequence[Report], ended: Iterable[Trial]) -> str | None:
        """Why the trial should end now; None to go on."""
        if not reports or reports[-1][0] < self.warmup_steps:
            return None
        step = reports[-1][0]
        others = [_at(trial.reports, step) for trial in ended if trial.state == "complete"]
        known = [value for value in others if value is not None]
        if len(known) < max(1, self.startup_trials):
            return None
        numbers = [value for _, value in reports if math.isfinite(value)]
        median = statistics.median(known)
        if not numbers:
            return f"pruned at step {step}: there is no finite number yet"
        best = min(numbers) if self.lower_is_better else max(numbers)
        worse = best > median if self.lower_is_better else best < median
        if not worse:
            return None
        return f"pruned at step {step}: {best:.4g}, the others' median is {median:.4g}"


def _at(reports: Sequence[Report], step: int) -> float | None:
    """The newest number up to a step."""
    values = [value for at, value in reports if at <= step]
    return values[-1] if values else None


def reports_of(lines: Iterable[dict[str, Any]], metric: str, max_steps: int | None, evaluated: bool) -> list[Report]:
    """The metric on the way.

    Args:
        lines: of metrics.jsonl, those of earlier runs of the trial first.
        metric: its name.
        max_steps: steps of the whole training.
        evaluated: whether the recipe evaluates on the way; otherwise training losses are taken.
    """
    if evaluated:
        found = {
            line["step"]: line["metrics"][metric]
            for line in lines
            if line.get("event") == "evaluation" and line["step"] > 0 and line["metrics"].get(metric) is not None
        }
        return sorted(found.items())
    if metric != "loss":
        return []
    losses = {line["step"]: line["loss"] for line in lines if "event" not in line and line.get("loss") is not None}
    window = max(1, (max_steps or _WINDOWS) // _WINDOWS)
    return [
        (step, statistics.fmean(losses[at] for at in range(step - window + 1, step + 1)))
        for step in sorted(losses)
        if step % window == 0 and all(at in losses for at in range(step - window + 1, step + 1))
    ]


def final_value(
    lines: Sequence[dict[str, Any]], metric: str, max_steps: int | None, has_validation: bool
) -> float | None:
    """The trial's result: the metric of its last evaluation, or without validation data the mean training loss of the
    last tenth of the steps; None when there is none.
    """
    if has_validation:
        evaluations = [line["metrics"] for line in lines if line.get("event") == "evaluation" and line["step"] > 0]
        return evaluations[-1].get(metric) if evaluations else None
    losses = [line["loss"] for line in lines if "event" not in line and line.get("loss") is not None]
    window = max(1, (max_steps or len(losses)) // _WINDOWS)
    return statistics.fmean(losses[-window:]) if losses and metric == "loss" else None
