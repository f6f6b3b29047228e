"""Pipeline schedules as plain data.

A schedule is, for each stage, the order in which it runs its work on each micro-batch:

    F  the forward pass
    B  the whole backward pass
    I  the first half of the backward pass: gradients of inputs, which the previous stage waits for
    W  the second half: gradients of weights, which only the optimizer waits for

A stage may hold several chunks of the model instead of one: the model is then cut into more parts than there are
stages, and `Placement` says which stage holds which part. An instruction names the chunk that it is for.

The functions here are pure; one executor (`engine.executor`) runs any of them. Transfers are not part of a schedule: a
stage receives what an instruction needs before it and sends what it made after it. This module imports nothing of
ours and no torch, so that plans can be made and simulated (`plan.simulate`) without either.
"""

from __future__ import annotations

import functools
import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]


class Instruction(NamedTuple):
    """One piece of work of a stage."""

    kind: Kind
    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True)
class Placement:
    """Which stage holds which part of the model; parts are numbered in the order of the forward pass.

    Attributes:
        num_stages: stages.
        num_chunks: parts on each of them.
        turns: the parts run down the stages and up again, a V; else they run through the stages from the first to the
            last, over and over.
    """

    num_stages: int
    num_chunks: int = 1
    turns: bool = False

    @property
    def num_parts(self) -> int:
        return self.num_stages * self.num_chunks

    def part(self, stage: int, chunk: int) -> int:
        """The part that is this chunk of the stage."""
        if self.turns and chunk % 2:
            return (chunk + 1) * self.num_stages - 1 - stage
        return chunk * self.num_stages + stage

    def owner(self, part: int) -> tuple[int, int]:
        """Stage and chunk of a part."""
        chunk, stage = divmod(part, self.num_stages)
        return (self.num_stages - 1 - stage if self.turns and chunk % 2 else stage), chunk

    def lanes(self) -> dict[int, tuple[int, int, int]]:
        """The boundaries that messages cross, by the later part, each with the lane that it belongs to.

        Boundaries of one lane can share a communicator that does everything in one order: they lie between the same
        chunks, also where two stages are neighbours twice, and no stage is at both ends of two of them, since a stage
        that could not send before it has received would hold up the whole pipeline. Boundaries whose lanes begin with
        the same number have no stage in common where a stage has one chunk; they come one after the other.
        """
        owners = [self.owner(part) for part in range(self.num_parts)]
        lanes = {
            part: (part % 2, owners[part - 1][1], owners[part][1])
            for part in range(1, self.num_parts)
            if owners[part - 1][0] != owners[part][0]
        }
        return dict(sorted(lanes.items(), key=lambda item: (item[1][0], item[0])))


Orders = Callable[..., list[Instruction]]


@dataclass(frozen=True)
class Schedule:
    """A schedule's order and what it needs.

    Attributes:
        order: instructions of one stage from (stage, num_stages, num_micro_batches), and the number of chunks where
            that can be chosen.
        chunks: chunks of a stage; none where they can be chosen.
        turns: see `Placement`.
        splits_backward: whether the halves of backward passes run apart.
    """

    order: Orders
    chunks: int | None = 1
    turns: bool = False
    splits_backward: bool = False

    def __call__(
        self, stage: int, num_stages: int, num_micro_batches: int, num_chunks: int | None = None
    ) -> list[Instruction]:
        """The instructions of one stage."""
        if self.chunks is not None:
            return self.order(stage, num_stages, num_micro_batches)
        return self.order(stage, num_stages, num_micro_batches, num_chunks or DEFAULT_CHUNKS)

    def placement(self, num_stages: int, num_chunks: int | None = None) -> Placement:
        """Where the parts of the model are."""
        return Placement(num_stages, self.chunks or num_chunks or DEFAULT_CHUNKS, self.turns)


DEFAULT_CHUNKS = 2


def one_f_one_b(stage: int, num_stages: int, num_micro_batches: int) -> list[Instruction]:
    """Non-interleaved 1F1B: stage s keeps at most ``num_stages - s`` micro-batches alive (PipeDream-Flush,
    Narayanan et al. 2021, figure 4)."""
    warmup = min(num_stages - 1 - stage, num_micro_batches)
    order = [Instruction("F", index) for index in range(warmup)]
    for index in range(num_micro_batches):
        if warmup + index < num_micro_batches:
            order.append(Instruction("F", warmup + index))
        order.append(Instruction("B", index))
    return order


def gpipe(stage: int, num_stages: int, num_micro_batches: int) -> list[Instruction]:
    """All forward passes, then all backward passes (Huang et al. 2019)."""
    return [Instruction("F", index) for index in range(num_micro_batches)] + [
        Instruction("B", index) for index in range(num_micro_batches)
    ]


def interleaved(stage: int, num_stages: int, num_micro_batches: int, num_chunks: int) -> list[Instruction]:
    """1F1B over several chunks a stage (Narayanan et al. 2021, section 2.2): `num_stages` micro-batches go through one
    chunk, then the same through the next. Fills and drains in 1 / `num_chunks` of 1F1B's time; stage s keeps at most
    ``2 (p - s - 1) + (v - 1) p + 1`` chunks' activations, p stages of v chunks.

    The order is defined for multiples of `num_stages`; for other numbers the micro-batches beyond are left out of the
    next multiple's, which takes nothing from what the others wait for.
    """
    if num_chunks == 1:
        return one_f_one_b(stage, num_stages, num_micro_batches)
    rounds = range(0, num_micro_batches, num_stages)
    chunks = range(num_chunks)
    forward = [(chunk, first + i) for first in rounds for chunk in chunks for i in range(num_stages)]
    backward = [(chunk, first + i) for first in rounds for chunk in reversed(chunks) for i in range(num_stages)]
    warmup = min(2 * (num_stages - 1 - stage) + (num_chunks - 1) * num_stages, len(forward))
    order = [Instruction("F", index, chunk) for chunk, index in forward[:warmup]]
    for number, (chunk, index) in enumerate(backward):
        if warmup + number < len(forward):
            ahead, ahead_index = forward[warmup + number]
            order.append(Instruction("F", ahead_index, ahead))
        order.append(Instruction("B", index, chunk))
    return [instruction for instruction in order if instruction.micro_batch < num_micro_batches]


def zb_h1(stage: int, num_stages: int, num_micro_batches: int) -> list[Instruction]:
    """Zero bubble at the activation memory of 1F1B (Qi et al. 2023, ZB-H1): 1F1B whose stage s keeps s weight gradients
    back, so that the earlier stages get their gradients sooner and the later ones work while they would drain."""
    return _zero_bubble(num_stages - 1 - stage, stage, num_micro_batches)


def zb_h2(stage: int, num_stages: int, num_micro_batches: int) -> list[Instruction]:
    """Zero bubble at about twice the activation memory (Qi et al. 2023, ZB-H2): stage s starts 2 (p - s) - 1
    micro-batches before its first backward pass, which fills the wait for it."""
    return _zero_bubble(2 * (num_stages - 1 - stage), 2 * stage, num_micro_batches)


def _zero_bubble(warmup: int, kept_back: int, num_micro_batches: int) -> list[Instruction]:
    """1F1B with split backward passes; `kept_back` weight gradients wait for the end."""
    warmup = min(warmup, num_micro_batches)
    order = [Instruction("F", index) for index in range(warmup)]
    for index in range(num_micro_batches):
        if warmup + index < num_micro_batches:
            order.append(Instruction("F", warmup + index))
        if kept_back == 0:  # both halves in a row are one backward pass
            order.append(Instruction("B", index))
            continue
        order.append(Instruction("I", index))
        if index >= kept_back:
            order.append(Instruction("W", index - kept_back))
    if kept_back:
        order += [Instruction("W", index) for index in range(max(0, num_micro_batches - kept_back), num_micro_batches)]
    return order


def zb_v(stage: int, num_stages: int, num_micro_batches: int) -> list[Instruction]:
    """Zero bubble over two chunks a stage whose parts run down the stages and up again (Qi et al. 2023, section 6), at
    2 p chunks' activations, which is what 1F1B keeps on its first stage.

    Until all forward passes are done, forward passes and gradients of inputs come in the paper's order (`_zb_v_begin`).
    Where weight gradients go, and what comes after, is found by playing the pipeline through. With the paper's times it
    leaves 2 to 7 % idle where ZB-H1 leaves 6 to 16 %.
    """
    return _zb_v(num_stages, num_micro_batches)[stage]


# Relative times of the passes of a transformer layer that ZB-V's order is made for: attention has more work in the
# backward pass and no weights. The order is good for others too; made for equal times, it is not.
_PASS_TIMES: dict[Kind, int] = {"F": 10, "I": 12, "W": 9}


_Pass = tuple[Kind, int]  # and its chunk
_DOWN: tuple[_Pass, ...] = (("F", 0), ("I", 0))
_UP: tuple[_Pass, ...] = (("F", 1), ("I", 1))


def _zb_v_begin(stage: int, num_stages: int, num_micro_batches: int) -> deque[_Pass]:
    """A stage's passes until all forward passes are done, without weight gradients.

    Forward passes fill the pipeline until the first micro-batch is back, 2 p - 1 on every stage; then a micro-batch
    leaves the second chunk for each that enters it, at last in turn with the first chunk.
    """
    begin: deque[_Pass] = deque()
    left = dict.fromkeys((*_DOWN, *_UP), num_micro_batches)

    def add(*passes: _Pass) -> None:
        for item in passes:
            if left[item]:
                left[item] -= 1
                begin.append(item)

    behind = num_stages - 1 - stage
    add(*_DOWN[:1] * (2 * behind + 1))
    add(*(*_UP[:1], *_DOWN[:1]) * stage)
    add(*_UP * behind)
    while left["F", 0] or left["F", 1]:
        add(*_UP, *_DOWN)
    return begin


@functools.lru_cache(maxsize=16)
def _zb_v(num_stages: int, num_micro_batches: int) -> list[list[Instruction]]:
    """All stages' orders."""
    placement = Placement(num_stages, 2, turns=True)
    last_part, most_alive = placement.num_parts - 1, 2 * num_stages
    orders: list[list[Instruction]] = [[] for _ in range(num_stages)]
    begins = [_zb_v_begin(stage, num_stages, num_micro_batches) for stage in range(num_stages)]
    weights: list[deque[Instruction]] = [deque() for _ in range(num_stages)]  # gradients to be computed
    alive = [0] * num_stages
    # How many micro-batches have been through each part, and how many can be: passes of the same kind stay in order.
    done = {(kind, part): 0 for kind in "FI" for part in range(placement.num_parts)}
    possible = dict(done)
    possible["F", 0] = num_micro_batches
    free = list(range(num_stages))
    running: list[tuple[int, int]] = []  # (end, stage) of those at work

    def choose(stage: int) -> Instruction | None:
        begin = begins[stage]
        wanted = (begin[0],) if begin else (_UP[1], _DOWN[1])
        for kind, chunk in wanted:
            key = (kind, placement.part(stage, chunk))
            if done[key] < possible[key] and (kind == "I" or alive[stage] < most_alive):
                if begin:
                    begin.popleft()
                done[key] += 1
                return Instruction(kind, done[key] - 1, chunk)
        return weights[stage].popleft() if weights[stage] else None

    def finish(stage: int) -> None:
        kind, micro_batch, chunk = orders[stage][-1]
        part = placement.part(stage, chunk)
        if kind == "F":
            possible[("I", part) if part == last_part else ("F", part + 1)] += 1
        elif kind == "W":
            alive[stage] -= 1
        else:
            weights[stage].append(Instruction("W", micro_batch, chunk))
            if part:
                possible["I", part - 1] += 1

    now = 0
    while True:
        idle = []
        for stage in free:
            instruction = choose(stage)
            if instruction is None:
                idle.append(stage)
                continue
            orders[stage].append(instruction)
            alive[stage] += instruction.kind == "F"
            heapq.heappush(running, (now + _PASS_TIMES[instruction.kind], stage))
        if not running:
            return orders
        now = running[0][0]
        free = idle
        while running and running[0][0] == now:
            stage = heapq.heappop(running)[1]
            finish(stage)
            free.append(stage)
        free.sort()


def forward_only(
    stage: int, num_stages: int, num_micro_batches: int, placement: Placement | None = None
) -> list[Instruction]:
    """Forward passes only, for evaluation and generation.

    Part k takes micro-batch i at about time k + v i, v chunks a stage, so nothing waits for what comes later.
    """
    placement = placement or Placement(num_stages)
    passes = [(micro_batch, chunk) for micro_batch in range(num_micro_batches) for chunk in range(placement.num_chunks)]
    passes.sort(key=lambda item: placement.part(stage, item[1]) + placement.num_chunks * item[0])
    return [Instruction("F", micro_batch, chunk) for micro_batch, chunk in passes]


SCHEDULES: dict[str, Schedule] = {
    "1f1b": Schedule(one_f_one_b),
    "gpipe": Schedule(gpipe),
    "interleaved": Schedule(interleaved, chunks=None),
    "zb-h1": Schedule(zb_h1, splits_backward=True),
    "zb-h2": Schedule(zb_h2, splits_backward=True),
    "zb-v": Schedule(zb_v, chunks=2, turns=True, splits_backward=True),
}


def splits_backward(schedule: str) -> bool:
    """Whether the schedule runs the halves of backward passes apart."""
    return SCHEDULES[schedule].splits_backward
