"""Pipeline schedules as plain data.

A schedule is, for each stage, the order in which it runs its work on each micro-batch:

    F  the forward pass
    B  the whole backward pass
    I  the first half of the backward pass: gradients of inputs, which the previous stage waits for
    W  the second half: gradients of weights, which only the optimizer waits for

The functions here are pure; one executor (`engine.executor`) runs any of them. Transfers are not part of a schedule: a
stage receives what an instruction needs before it and sends what it made after it. This module imports nothing, so
that plans can be made and simulated (`plan.simulate`) without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]


class Instruction(NamedTuple):
    """One piece of work of a stage."""

    kind: Kind
    micro_batch: int


Schedule = Callable[[int, int, int], list[Instruction]]


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


def forward_only(stage: int, num_stages: int, num_micro_batches: int) -> list[Instruction]:
    """Forward passes only, for evaluation and generation."""
    return [Instruction("F", index) for index in range(num_micro_batches)]


SCHEDULES: dict[str, Schedule] = {"1f1b": one_f_one_b, "gpipe": gpipe, "zb-h1": zb_h1, "zb-h2": zb_h2}


def splits_backward(schedule: str) -> bool:
    """Whether the schedule runs the halves of backward passes apart."""
    return schedule.startswith("zb-")
