"""Seconds of a pipeline's pass over all micro-batches, without playing every one of them.

Once a schedule has filled the pipeline it repeats itself, each micro-batch adding as much as the one before. So two
short steps are simulated instruction by instruction (`plan.simulate`), and the rest is added. A lower bound that no
schedule can beat lets the search leave out layouts unseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmpipe_cli.engine.schedules import DEFAULT_CHUNKS, SCHEDULES, splits_backward
from llmpipe_cli.plan.memory import Moment
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


def held_activations(schedule: str, stages: int, num_micro_batches: int, chunks: int, stage: int) -> tuple[Moment, ...]:
    """The fullest moments of a stage, from the rules that the schedules' orders follow."""
    m, behind = num_micro_batches, stages - 1 - stage
    if schedule == "interleaved" and chunks > 1:
        return _held_interleaved(stages, m, chunks, stage)
    if schedule == "zb-v":
        return _held_zb_v(stages, m, stage)
    factor = {"zb-h1": 1, "zb-h2": 2}.get(schedule, 0)
    warmup = m if schedule == "gpipe" else max(1, factor) * behind
    return _held_in_one(warmup, factor * stage, m)


def _held_in_one(warmup: int, postponed: int, num_micro_batches: int) -> tuple[Moment, ...]:
    """Of a stage in one part that starts with `warmup` forward passes and keeps so many weight gradients back."""
    m = num_micro_batches
    if m > warmup + 1 + postponed:  # a forward pass follows the first gradients
        full = Moment((warmup + 1,), (postponed,))
        return (full, Moment((warmup,), (postponed + 1,))) if postponed else (full,)
    if not postponed:
        return Moment((m,), (0,), False), Moment((m - 1,), (0,))
    before, kept = max(0, m - 1 - warmup), min(postponed, m - 1)  # backward passes before the last forward pass
    return (
        Moment((m - before,), (before,), False),
        Moment((m - 1 - kept,), (kept + 1,), False),
        Moment((m - 1 - kept,), (kept,)),
        Moment((max(0, m - 2 - kept),), (min(kept + 1, m - 1),)),
    )


def _held_interleaved(stages: int, num_micro_batches: int, chunks: int, stage: int) -> tuple[Moment, ...]:
    """Counted after those forward passes of the first round at which the forward or the backward passes change to
    another chunk: there the number of each chunk's micro-batches is largest or smallest."""
    m, of_round = num_micro_batches, stages * chunks
    rounds = -(-m // stages)
    warmup = min(2 * (stages - 1 - stage) + (chunks - 1) * stages, rounds * of_round)

    def passed(number: int, place: int) -> int:
        """Micro-batches of the chunk that comes in this place of a round, among the first passes."""
        whole, rest = divmod(min(number, rounds * of_round), of_round)
        return min(m, whole * stages + min(stages, max(0, rest - place * stages)))

    first = -(warmup + 1) % stages
    moments = []
    for after in sorted({1, *range(0, of_round, stages), *range(first, of_round, stages)}):
        alive = tuple(passed(warmup + 1 + after, c) - passed(after, chunks - 1 - c) for c in range(chunks))
        moments.append(Moment(alive, (0,) * chunks, after > 0))
    return tuple(moments)


def _held_zb_v(stages: int, num_micro_batches: int, stage: int) -> tuple[Moment, ...]:
    """At most 2 p chunks: most of the first one when the pipeline is full, of weight gradients when it drains."""
    m = num_micro_batches
    down, up = min(m, 2 * stages - 1 - stage), min(m, stage + 1)
    rest = min(m - up, 2 * stages - down - up)
    many = m > stages  # passes follow the first gradients
    return (
        Moment((down, up), (0, rest), many),
        Moment((down, up - 1), (0, rest)),
        Moment((min(m, 2 * stages - stage), min(m, stage)), (0, 0), many),
        Moment((max(0, min(m - stage - 1, stages - 1 - stage)), 0), (up, up if many else up - 1)),
    )


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
