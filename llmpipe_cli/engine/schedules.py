"""Pipeline schedules as plain data.

A schedule is, for each stage, the order in which it runs the forward pass (F) and the backward pass (B) of each
micro-batch. The functions here are pure; one executor (`engine.pipeline`) runs any of them. Transfers are not
part of a schedule: a stage receives what an instruction needs before it and sends what it made after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple


class Instruction(NamedTuple):
    """One piece of work of a stage."""

    kind: Literal["F", "B"]
    micro_batch: int


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


def forward_only(stage: int, num_stages: int, num_micro_batches: int) -> list[Instruction]:
    """Forward passes only, for evaluation and generation."""
    return [Instruction("F", index) for index in range(num_micro_batches)]


SCHEDULES: dict[str, Callable[[int, int, int], list[Instruction]]] = {"1f1b": one_f_one_b, "gpipe": gpipe}
