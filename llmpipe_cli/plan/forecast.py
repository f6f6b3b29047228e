"""What a plan is expected to take, kept in its run directory and laid beside what it takes.

Before the ranks start, the plan's own layout is predicted; one that needs more memory than its devices have is refused.
After the first steps the prediction is shown beside what was measured. The table's rates of a processor are those of
some processor: they are taken from earlier runs of the model on this machine, and where there are none the stages are
judged by their shares only.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llmpipe_cli.errors import PreflightError
from llmpipe_cli.plan.cluster import Cluster
from llmpipe_cli.plan.plan import Plan

if TYPE_CHECKING:
    from llmpipe_cli.run import RunDirectory

logger = logging.getLogger(__name__)

COMPARED_STEPS = (3, 8)
"""The steps that are compared, counted from the first of the run: those before still warm up."""
PARTED = 0.25
"""How much larger one of a prediction and a measurement is than the other, relatively, once they have parted."""
NOISY_PARTED = 0.75
"""The same where times are noisy, or only shares of them are compared."""


@dataclass(frozen=True)
class Forecast:
    """A plan's prediction.

    Attributes:
        step_seconds: one optimizer step; None where the layout does not fit.
        stage_seconds: what each stage computes in a step.
        memory_bytes: peak of each stage, on a processor without the interpreter and its libraries.
        bubble_fraction: idle share of the pipeline.
        presumed: what seconds rest on although it may be otherwise, in words; with any, stages are judged by shares.
        noisy: the devices are processors, whose small layers take what the interpreter takes, and neighbours' work.
    """

    step_seconds: float | None
    stage_seconds: list[float]
    memory_bytes: list[int]
    bubble_fraction: float
    presumed: str = ""
    noisy: bool = False

    def to_json(self) -> dict[str, Any]:
        """The forecast as JSON values."""
        return asdict(self)


def forecast(plan: Plan, cluster: Cluster, earlier: Sequence[RunDirectory] = ()) -> Forecast | None:
    """Predict a plan on the devices it is for; None where the model cannot be measured.

    Args:
        plan: the plan.
        cluster: its devices.
        earlier: runs, oldest first, from which the rates of this machine's processor can be learnt.

    Raises:
        PreflightError: a stage needs more memory than a device has.
    """
    from llmpipe_cli.plan.calibration import calibrate_on_earlier, planned_candidate
    from llmpipe_cli.plan.search import why_not

    try:
        calibration = calibrate_on_earlier(plan, earlier)
        candidate = planned_candidate(plan, cluster, calibration)
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
        seconds[plan.placement.owner(part)[0]] += (1 + candidate.crowding) * cost.total * plan.num_micro_batches
    return Forecast(
        candidate.seconds,
        seconds,
        [round(own.total) for own in candidate.memory],
        candidate.bubble,
        presumed=_presumed(plan, calibrated=calibration is not None),
        noisy=plan.device == "cpu",
    )


def _presumed(plan: Plan, *, calibrated: bool) -> str:
    """What the seconds of a plan's prediction rest on although it may be otherwise."""
    presumed = []
    if plan.device == "cpu" and not calibrated:
        presumed.append("rates of the table's processor, since no earlier run tells this one's")
    data = plan.data or {}
    if not data.get("packing") and (data.get("train") or {}).get("kind") != "synthetic":
        presumed.append("rows as long as sequence_len")
    return " and ".join(presumed)


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
    if predicted.step_seconds is not None:
        measured = statistics.median(step["step_seconds"] for step in steps)
        off = predicted.step_seconds / measured - 1
        presumed = f"; presumed: {predicted.presumed}" if predicted.presumed else ""
        said.append(f"a step takes {measured:.3f} s, predicted {predicted.step_seconds:.3f} s ({off:+.0%}{presumed})")
    if not predicted.noisy and not predicted.presumed:  # a processor's peak holds the interpreter and its libraries
        said += _memory_warnings(predicted, steps[-1])
    if len(busy) != len(predicted.stage_seconds) or not all(busy) or not all(predicted.stage_seconds):
        return said
    # The mean is geometric, since a stage that takes several times as long would lift any sum to its own height.
    mean = statistics.geometric_mean
    scale = mean(busy) / mean(predicted.stage_seconds) if predicted.presumed else 1.0
    expected = [seconds * scale for seconds in predicted.stage_seconds]
    if len(busy) > 1:
        kind = "predicted, scaled to the same mean" if predicted.presumed else "predicted"
        shown = ", ".join(
            f"stage {stage} {own:.3f} s ({there:.3f})"
            for stage, (own, there) in enumerate(zip(busy, expected, strict=True))
        )
        said.append(f"of it the stages compute ({kind}): {shown}")
    ratios = [own / there for own, there in zip(busy, expected, strict=True)]
    worst = max(range(len(ratios)), key=lambda stage: max(ratios[stage], 1 / ratios[stage]))
    parted = NOISY_PARTED if predicted.noisy or predicted.presumed else PARTED
    if max(ratios[worst], 1 / ratios[worst]) > 1 + parted:
        more = "more" if ratios[worst] > 1 else "less"
        said.append(f"warning: stage {worst} computes {abs(ratios[worst] - 1):.0%} {more} than predicted")
    return said


def _memory_warnings(predicted: Forecast, step: dict[str, Any]) -> list[str]:
    """Stages whose peak memory is far from what was predicted."""
    return [
        f"warning: stage {stage} holds {there / 2**30:.1f} GiB, predicted {here / 2**30:.1f} GiB"
        for stage, (here, there) in enumerate(zip(predicted.memory_bytes, step.get("memory_bytes") or [], strict=False))
        if there and abs(here / there - 1) > PARTED
    ]


def _busy(steps: Sequence[dict[str, Any]]) -> list[float]:
    """Median seconds that each stage computes in a step."""
    stages = [step.get("stages") or [] for step in steps]
    count = min((len(stage) for stage in stages), default=0)
    return [
        statistics.median(float(stage[index].get("busy_seconds") or 0.0) for stage in stages) for index in range(count)
    ]
