"""What a plan is expected to take, kept in its run directory and laid beside what it takes.

Before the ranks start, the plan's own layout is predicted; one that needs more memory than its devices have is refused.
After the first steps the prediction is shown beside what was measured. On a processor without a calibration only the
shares of the stages are compared, since the table's rates are those of some processor.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmpipe_cli.errors import PreflightError
from llmpipe_cli.plan.cluster import Cluster
from llmpipe_cli.plan.plan import Plan

logger = logging.getLogger(__name__)

COMPARED_STEPS = (3, 8)
"""The steps that are compared, counted from the first of the run: those before still warm up."""
PARTED = 0.25
"""How much larger one of a prediction and a measurement is than the other, relatively, once they have parted."""
SHARES_PARTED = 0.75
"""The same for a stage's share on a processor: small layers there take what the interpreter takes."""


@dataclass(frozen=True)
class Forecast:
    """A plan's prediction.

    Attributes:
        step_seconds: one optimizer step; None where the layout does not fit.
        stage_seconds: what each stage computes in a step.
        memory_bytes: peak of each stage, on a processor without the interpreter and its libraries.
        bubble_fraction: idle share of the pipeline.
        absolute: the device's rates and the rows' lengths are known, so that seconds can be compared and not their
            shares only. Rows that are not packed are as long as their texts; they are predicted at full length.
    """

    step_seconds: float | None
    stage_seconds: list[float]
    memory_bytes: list[int]
    bubble_fraction: float
    absolute: bool

    def to_json(self) -> dict[str, Any]:
        """The forecast as JSON values."""
        return asdict(self)


def forecast(plan: Plan, cluster: Cluster) -> Forecast | None:
    """Predict a plan on the devices it is for; None where the model cannot be measured.

    Raises:
        PreflightError: a stage needs more memory than a device has.
    """
    from llmpipe_cli.plan.calibration import planned_candidate
    from llmpipe_cli.plan.search import why_not

    try:
        candidate = planned_candidate(plan, cluster)
    except Exception as error:  # a prediction that fails must not keep a training from starting
        logger.info("no forecast: %s: %s", type(error).__name__, error)
        return None
    if candidate is None:
        return None
    if not candidate.fits:
        raise PreflightError(
            f"the layout {plan.layout} (pipeline x tensor x data) does not fit: {why_not(candidate)}",
            hint="`llmpipe plan` with the same recipe lists the layouts that fit",
        )
    seconds = [0.0] * plan.layout.pipeline
    for part, cost in enumerate(candidate.costs):
        seconds[plan.placement.owner(part)[0]] += cost.total * plan.num_micro_batches
    return Forecast(
        candidate.seconds,
        seconds,
        [round(own.total) for own in candidate.memory],
        candidate.bubble,
        absolute=plan.device != "cpu" and bool((plan.data or {}).get("packing")),
    )


def fits(plan: Plan, cluster: Cluster) -> bool:
    """Whether a plan's stages are predicted to fit on the devices; a model that cannot be measured does not."""
    from llmpipe_cli.plan.calibration import planned_candidate

    try:
        candidate = planned_candidate(plan, cluster)
    except Exception as error:
        logger.info("no forecast: %s: %s", type(error).__name__, error)
        return False
    return candidate is not None and candidate.fits


class Comparison:
    """Collects the first steps of a run and compares them with its forecast once.

    Args:
        predicted: the forecast.
    """

    def __init__(self, predicted: Forecast) -> None:
        self.predicted = predicted
        self._steps: list[dict[str, Any]] = []
        self._done = False

    def add(self, lines: Sequence[dict[str, Any]]) -> list[str]:
        """Take lines of metrics.jsonl; returns what there is to say about them, once."""
        self._steps += [line for line in lines if "event" not in line and "step_seconds" in line]
        if self._done or len(self._steps) < COMPARED_STEPS[1]:
            return []
        self._done = True
        return compare(self.predicted, self._steps[slice(*COMPARED_STEPS)])


def compare(predicted: Forecast, steps: Sequence[dict[str, Any]]) -> list[str]:
    """Prediction beside measurement in words, and a warning where they part, naming the stage."""
    said = []
    busy = _busy(steps)
    if predicted.absolute and predicted.step_seconds is not None:
        measured = statistics.median(step["step_seconds"] for step in steps)
        off = predicted.step_seconds / measured - 1
        said.append(f"a step takes {measured:.3f} s, predicted {predicted.step_seconds:.3f} s ({off:+.0%})")
        memory = steps[-1].get("memory_bytes") or []
        for stage, (here, there) in enumerate(zip(predicted.memory_bytes, memory, strict=False)):
            if there and abs(here / there - 1) > PARTED:
                said.append(f"warning: stage {stage} holds {there / 2**30:.1f} GiB, predicted {here / 2**30:.1f} GiB")
    if len(busy) != len(predicted.stage_seconds) or not all(busy) or not all(predicted.stage_seconds):
        return said
    # The mean is geometric, since a stage that takes several times as long would lift any sum to its own height.
    mean = statistics.geometric_mean
    scale = 1.0 if predicted.absolute else mean(busy) / mean(predicted.stage_seconds)
    expected = [seconds * scale for seconds in predicted.stage_seconds]
    shown = ", ".join(f"{own:.3f} ({there:.3f})" for own, there in zip(busy, expected, strict=True))
    if len(busy) > 1:
        kind = "predicted" if predicted.absolute else "predicted, scaled to the same mean"
        said.append(f"seconds that the stages compute a step ({kind}): {shown}")
    ratios = [own / there for own, there in zip(busy, expected, strict=True)]
    worst = max(range(len(ratios)), key=lambda stage: max(ratios[stage], 1 / ratios[stage]))
    if max(ratios[worst], 1 / ratios[worst]) > 1 + (PARTED if predicted.absolute else SHARES_PARTED):
        more = "more" if ratios[worst] > 1 else "less"
        said.append(f"warning: stage {worst} computes {abs(ratios[worst] - 1):.0%} {more} than predicted")
    return said


def _busy(steps: Sequence[dict[str, Any]]) -> list[float]:
    """Median seconds that each stage computes in a step."""
    stages = [step.get("stages") or [] for step in steps]
    count = min((len(stage) for stage in stages), default=0)
    return [
        statistics.median(float(stage[index].get("busy_seconds") or 0.0) for stage in stages) for index in range(count)
    ]
