"""What a schedule takes, from the times of its instructions: the pipeline played through without running it.

Each stage runs its instructions in their order. A forward pass waits for the activations of the part before, a
backward pass for its own forward pass and the gradients of the part behind, and a transfer between stages takes its
time on the way but keeps neither stage busy. Pure Python; no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmpipe_cli.engine.schedules import Instruction, Placement, Schedule


@dataclass(frozen=True)
class StageCosts:
    """Seconds (or any other unit) of one micro-batch in one part of the model: a stage, or one of its chunks.

    Attributes:
        forward: forward pass.
        input_gradient: first half of the backward pass.
        weight_gradient: second half.
    """

    forward: float
    input_gradient: float
    weight_gradient: float

    def of(self, kind: str) -> float:
        """Cost of an instruction."""
        if kind == "B":
            return self.input_gradient + self.weight_gradient
        return {"F": self.forward, "I": self.input_gradient, "W": self.weight_gradient}[kind]

    @property
    def total(self) -> float:
        return self.forward + self.input_gradient + self.weight_gradient


@dataclass(frozen=True)
class Span:
    """One instruction in simulated time."""

    stage: int
    instruction: Instruction
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """A schedule played through.

    Attributes:
        spans: all instructions, stage by stage, in order.
        step: time from the first start to the last end of any instruction.
        stage_spans: for each stage the time from its first start to its last end.
        bubble_fraction: idle share of the stage that is away longest, between its first start and its last end, as the
            Zero Bubble paper counts it: 1 - work / longest span, with the mean work of a stage.
        peak_activations: for each stage the most micro-batches whose activations are alive, a micro-batch being done
            when its last instruction on the stage is; of several chunks each counts for itself.
    """

    spans: list[Span]
    step: float
    stage_spans: list[float]
    bubble_fraction: float
    peak_activations: list[int]


def simulate(
    orders: Sequence[Sequence[Instruction]],
    costs: Sequence[StageCosts],
    transfer: float = 0.0,
    placement: Placement | None = None,
) -> Simulation:
    """Play the stages' instructions against each other.

    Args:
        orders: each stage's instructions in its order.
        costs: costs of each part of the model: of each stage, or of each chunk in the order of the forward pass.
        transfer: time from the end of a pass until its result is on another stage.
        placement: which stage holds which part, where stages have several.

    Raises:
        ValueError: the stages wait for each other for ever.
    """
    placed = placement or Placement(len(orders))
    durations = [
        [costs[placed.part(stage, instruction.chunk)].of(instruction.kind) for instruction in order]
        for stage, order in enumerate(orders)
    ]
    return play(orders, durations, transfer, placed)


def play(
    orders: Sequence[Sequence[Instruction]],
    durations: Sequence[Sequence[float]],
    transfer: float,
    placement: Placement,
) -> Simulation:
    """`simulate` with a time for each single instruction, such as those of a measured step."""
    num_stages, last_part = len(orders), placement.num_parts - 1
    clock, position = [0.0] * num_stages, [0] * num_stages
    arrived: dict[tuple[str, int, int], float] = {}  # (activations | gradients, part, micro-batch) -> time
    spans: list[Span] = []
    while any(position[stage] < len(order) for stage, order in enumerate(orders)):
        progress = False
        for stage, order in enumerate(orders):
            while position[stage] < len(order):
                instruction = order[position[stage]]
                kind, micro_batch, chunk = instruction
                part = placement.part(stage, chunk)
                needed = _needed(kind, part, micro_batch, last_part)
                if needed is not None and needed not in arrived:
                    break
                start = max(clock[stage], arrived[needed] if needed is not None else 0.0)
                clock[stage] = end = start + durations[stage][position[stage]]
                if kind == "F" and part < last_part:
                    away = placement.owner(part + 1)[0] != stage
                    arrived["activations", part + 1, micro_batch] = end + (transfer if away else 0.0)
                elif kind in "BI" and part:
                    away = placement.owner(part - 1)[0] != stage
                    arrived["gradients", part - 1, micro_batch] = end + (transfer if away else 0.0)
                spans.append(Span(stage, instruction, start, end))
                position[stage] += 1
                progress = True
        if not progress:
            raise ValueError("the stages wait for each other: a schedule runs a pass before what it needs")
    spans.sort(key=lambda span: (span.stage, span.start))
    lengths = [
        max(span.end for span in own) - min(span.start for span in own)
        for own in ([span for span in spans if span.stage == stage] for stage in range(num_stages))
    ]
    work = sum(span.end - span.start for span in spans) / num_stages
    return Simulation(
        spans=spans,
        step=max(span.end for span in spans),
        stage_spans=lengths,
        bubble_fraction=1.0 - work / max(lengths),
        peak_activations=[_peak(order) for order in orders],
    )


def simulate_schedule(
    schedule: Schedule,
    costs: Sequence[StageCosts],
    num_micro_batches: int,
    transfer: float = 0.0,
    num_chunks: int | None = None,
) -> Simulation:
    """`simulate` for a schedule of `engine.schedules`.

    Args:
        schedule: the schedule.
        costs: costs of each part: as many as there are stages times chunks.
        num_micro_batches: micro-batches of a step.
        transfer: see `simulate`.
        num_chunks: chunks a stage, where the schedule leaves them open.
    """
    num_stages = len(costs) // schedule.placement(1, num_chunks).num_chunks
    placement = schedule.placement(num_stages, num_chunks)
    orders = [schedule(stage, num_stages, num_micro_batches, num_chunks) for stage in range(num_stages)]
    return simulate(orders, costs, transfer, placement)


def _needed(kind: str, part: int, micro_batch: int, last_part: int) -> tuple[str, int, int] | None:
    """What has to arrive before an instruction. Results of the part's own instructions are there by their order."""
    if kind == "F":
        return ("activations", part, micro_batch) if part else None
    if kind in "BI":
        return ("gradients", part, micro_batch) if part < last_part else None
    return None


def _peak(order: Sequence[Instruction]) -> int:
    last = {(instruction.micro_batch, instruction.chunk): index for index, instruction in enumerate(order)}
    alive = peak = 0
    for index, instruction in enumerate(order):
        alive += instruction.kind == "F"
        peak = max(peak, alive)
        alive -= last[instruction.micro_batch, instruction.chunk] == index
    return peak
