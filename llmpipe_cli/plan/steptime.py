"""Seconds of a pipeline's pass over all micro-batches, without playing every one of them.

Once a schedule has filled the pipeline it repeats itself, each micro-batch adding as much as the one before. So two
short steps are simulated instruction by instruction (`plan.simulate`), and the rest is added. A lower bound that no
schedule can beat lets the search leave out layouts unseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmpipe_cli.engine.schedules import DEFAULT_CHUNKS, SCHEDULES, splits_backward
from llmpipe_cli.plan.simulate import StageCosts, simulate_schedule


@dataclass(frozen=True)
class PipelineTime:
    """A pass over all micro-batches.

    Attributes:
        seconds: from the first start to the last end.
        bubble_fraction: idle share of the devices' time.
    """

    seconds: float
    bubble_fraction: float


def num_chunks(schedule: str, chosen: int = DEFAULT_CHUNKS) -> int:
    """Parts of the model on each stage."""
    return SCHEDULES[schedule].chunks or chosen


def pipeline_time(
    schedule: str,
    costs: Sequence[StageCosts],
    num_micro_batches: int,
    transfers: Sequence[float] = (),
    *,
    chunks: int = DEFAULT_CHUNKS,
    blocking: bool = False,
) -> PipelineTime:
    """Time of a step's forward and backward passes.

    Args:
        schedule: name of the schedule.
        costs: costs of a micro-batch in each part of the model.
        num_micro_batches: micro-batches a replica and step.
        transfers: seconds from each part but the last to the next, for activations and as much for gradients.
        chunks: parts a stage where the schedule leaves that open.
        blocking: stages compute nothing while a transfer goes on.
    """
    transfer = max(transfers, default=0.0)
    if blocking:
        costs, transfer = _blocked(costs, transfers), 0.0
    stages = len(costs) // num_chunks(schedule, chunks)
    short = shortened(num_micro_batches, stages)
    played = simulate_schedule(SCHEDULES[schedule], costs, short, transfer, chunks).step
    work = [0.0] * stages
    placement = SCHEDULES[schedule].placement(stages, chunks)
    for part, cost in enumerate(costs):
        work[placement.owner(part)[0]] += cost.total
    seconds = played
    if num_micro_batches > short:  # transfers on the way can make a micro-batch add more than the busiest stage's work
        longer = simulate_schedule(SCHEDULES[schedule], costs, short + stages, transfer, chunks).step
        seconds += (num_micro_batches - short) * max(max(work), (longer - played) / stages)
    return PipelineTime(seconds, max(0.0, 1.0 - num_micro_batches * sum(work) / stages / seconds))


def shortened(num_micro_batches: int, stages: int) -> int:
    """Micro-batches to play: enough for the pipeline to fill and drain, in whole rounds of the stages."""
    enough = 2 * stages
    if num_micro_batches <= enough + stages:
        return num_micro_batches
    return enough + num_micro_batches % stages


def held_activations(
    schedule: str, stages: int, num_micro_batches: int, chunks: int, stage: int
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """The fullest moments of a stage (`memory.Held`), from the rules that the schedules' orders follow.

    Where a stage has several parts the numbers are those of its warm-up, dealt to them in the order of the rounds; for
    ZB-V they are its limit of 2 p chunks.
    """
    m, behind = num_micro_batches, stages - 1 - stage
    if schedule == "gpipe":
        return (((m,), (0,)),)
    if schedule == "1f1b":
        return (((min(m, behind + 1),), (0,)),)
    if schedule in ("zb-h1", "zb-h2"):
        factor = 1 if schedule == "zb-h1" else 2
        ahead, postponed = factor * behind, min(m, factor * stage)
        return (((min(m, ahead + 1),), (postponed,)), ((min(m, ahead),), (min(m, postponed + (stage > 0)),)))
    if schedule == "zb-v":
        return (((min(m, stages),) * 2, (0, 0)),)
    alive = [0] * chunks
    left = min(m * chunks, 2 * behind + (chunks - 1) * stages + 1)
    while left > 0:
        for chunk in range(chunks):
            taken = min(stages, left, m - alive[chunk])
            alive[chunk] += taken
            left -= taken
    return ((tuple(alive), (0,) * chunks),)


def least_seconds(
    schedule: str,
    costs: Sequence[StageCosts],
    num_micro_batches: int,
    transfers: Sequence[float] = (),
    *,
    chunks: int = DEFAULT_CHUNKS,
) -> float:
    """No step of this schedule is shorter.

    A stage begins when the first micro-batch has come through the parts before its first one, then does all its own
    work; and the gradient of the last micro-batch that it passes back has to go through those parts. Where the halves
    of backward passes are split only the first half must, and second halves of the stage's own may come later. So is it
    where a stage has several parts, of which another may be the last.
    """
    transfer = max(transfers, default=0.0)
    stages = len(costs) // num_chunks(schedule, chunks)
    placement = SCHEDULES[schedule].placement(stages, chunks)
    split = splits_backward(schedule)
    work, through = [0.0] * stages, [0.0] * stages
    for part, cost in enumerate(costs):
        stage = placement.owner(part)[0]
        work[stage] += num_micro_batches * cost.total
        through[stage] += num_micro_batches * (cost.forward + cost.input_gradient)
    least = first = last = 0.0
    for stage, cost in enumerate(costs[:stages]):
        least = max(least, first + work[stage])
        if placement.num_chunks == 1:
            least = max(least, first + (through if split else work)[stage] + last)
        first += cost.forward + transfer
        last += cost.input_gradient + (0.0 if split else cost.weight_gradient) + transfer
    return least


def _blocked(costs: Sequence[StageCosts], transfers: Sequence[float]) -> list[StageCosts]:
    """Costs of stages that stand still while they send and receive."""
    sides = [0.0, *transfers, 0.0] if transfers else [0.0] * (len(costs) + 1)
    return [
        StageCosts(cost.forward + before + behind, cost.input_gradient + before + behind, cost.weight_gradient)
        for cost, before, behind in zip(costs, sides, sides[1:], strict=False)
    ]
