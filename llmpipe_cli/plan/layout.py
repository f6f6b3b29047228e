"""Layout and batch arithmetic: what a recipe's numbers and the devices leave open is decided by simple rules.

On accelerators `plan.propose.fill_auto` has filled the fields of a new training by searching before these rules apply.

tensor    auto -> 1
data      auto -> 1
pipeline  auto -> devices / (data x tensor), at most one stage a segment of the model
micro_batch_size auto -> the largest divisor of the samples a replica and step, up to 8, that leaves at least
          four micro-batches a stage (fewer stay idle that way: the bubble of 1F1B is (p - 1) / (m + p - 1))
zero_stage auto -> 1 with bf16 or fp16 (which need it) or with several replicas, else 0
activation_checkpointing auto -> none
schedule  auto -> the shortest step of 1f1b, zb-h1, zb-h2 and zb-v, played through with times modelled by FLOPs
          (`plan.cuts`); zb-h2 only where its activations fit (`plan.resolve.make_plan_on`); 1f1b with one stage or with
          activation checkpointing (whose recomputed activations postponed weight gradients would keep alive)
"""

from __future__ import annotations

import itertools
from typing import Literal

from llmpipe_cli.engine.schedules import SCHEDULES, Placement
from llmpipe_cli.errors import PreflightError, UsageError
from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.plan.partition import balance_parts
from llmpipe_cli.plan.plan import Layout, ScheduleName
from llmpipe_cli.plan.simulate import StageCosts, simulate_schedule
from llmpipe_cli.recipe.schema import Recipe


def fixed(value: int | Literal["auto"]) -> int | None:
    """The number that the recipe fixes; none for auto."""
    return None if isinstance(value, str) else value


def choose_layout(recipe: Recipe, num_devices: int, device: str, num_segments: int) -> Layout:
    """Pipeline x tensor x data for this recipe on this machine.

    Args:
        recipe: the recipe.
        num_devices: devices at hand.
        device: "cpu" or "cuda".
        num_segments: pieces the model can be cut into.

    Raises:
        UsageError: more stages than segments.
        PreflightError: more ranks than accelerators.
    """
    parallel = recipe.parallel
    tensor, data = fixed(parallel.tensor) or 1, fixed(parallel.data) or 1
    pipeline = fixed(parallel.pipeline)
    if pipeline is None and isinstance(parallel.partition, list):
        pipeline = len(parallel.partition) // parallel.num_chunks
    most = num_segments // parallel.num_chunks
    if pipeline is None:
        pipeline = max(1, min(num_devices // (data * tensor), most))
    if pipeline > most:
        each = f" of {parallel.num_chunks} parts each" if parallel.num_chunks > 1 else ""
        raise UsageError(
            f"{pipeline} stages{each}, but the model can be cut into {num_segments} pieces at most",
            where="parallel.pipeline",
            hint=f"use parallel.pipeline: {max(1, most)} or less, or a model with more layers",
        )
    layout = Layout(pipeline=pipeline, tensor=tensor, data=data)
    if device != "cpu" and layout.num_ranks > num_devices:
        raise PreflightError(
            f"the layout {layout} (pipeline x tensor x data) needs {layout.num_ranks} devices, "
            f"and this machine has {num_devices}",
            hint="make parallel.pipeline or parallel.data smaller, or leave them at auto",
        )
    return layout


def choose_micro_batch_size(recipe: Recipe, layout: Layout) -> tuple[int, int]:
    """Samples a micro-batch, and micro-batches a step and replica.

    Raises:
        UsageError: the batch sizes do not fit the layout.
    """
    train = recipe.train
    samples, rest = divmod(train.global_batch_size, layout.data)
    if rest:
        raise UsageError(
            f"global_batch_size {train.global_batch_size} cannot be dealt evenly to {layout.data} replicas",
            where="train.global_batch_size",
            hint=f"use a multiple of {layout.data}, for example {(samples + 1) * layout.data}",
        )
    size = fixed(train.micro_batch_size)
    if size is None and train.gradient_accumulation_steps is not None:
        size = max(1, samples // train.gradient_accumulation_steps)
    if size is None:
        wanted = min(samples, 4 * layout.pipeline)
        size = max(d for d in range(1, min(samples, 8) + 1) if samples % d == 0 and samples // d >= wanted)
    count, rest = divmod(samples, size)
    if rest or count == 0:
        raise UsageError(
            f"global_batch_size {train.global_batch_size} is not a multiple of micro_batch_size {size} x "
            f"{layout.data} replica{'s' if layout.data > 1 else ''}",
            where="train.micro_batch_size",
            hint=f"use global_batch_size: {max(1, round(samples / size)) * size * layout.data}",
        )
    if train.gradient_accumulation_steps not in (None, count):
        raise UsageError(
            f"gradient_accumulation_steps {train.gradient_accumulation_steps} does not fit: global_batch_size "
            f"{train.global_batch_size} / (micro_batch_size {size} x {layout.data} replicas) = {count}",
            where="train.gradient_accumulation_steps",
            hint=f"leave it out, or write {count}",
        )
    return size, count


def choose_zero_stage(recipe: Recipe, layout: Layout) -> Literal[0, 1]:
    """The ZeRO stage."""
    stage = recipe.parallel.zero_stage
    if not isinstance(stage, str):
        return stage
    if recipe.model.dtype != "fp32":
        return 1
    return 1 if layout.data > 1 and recipe.train.optimizer != "adafactor" else 0


# The simplest first.
_CANDIDATES: tuple[ScheduleName, ...] = ("1f1b", "zb-h1", "zb-h2", "zb-v")
# Those that keep more activations on a stage than 1F1B does on its first.
_ROOMY: frozenset[ScheduleName] = frozenset(("zb-h2",))
_TRANSFER = 0.03  # a transfer's time, as a share of a stage's mean forward pass
_SIMULATED_MICRO_BATCHES = 8  # a stage; more of them change no order between the candidates


def is_roomy(schedule: ScheduleName) -> bool:
    """Whether auto takes this schedule only where memory allows."""
    return schedule in _ROOMY


def candidate_schedules(
    recipe: Recipe, layout: Layout, num_segments: int, *, roomy: bool = False
) -> tuple[ScheduleName, ...]:
    """Orders of forward and backward passes to choose from, the simplest first; the recipe's alone if it names one.

    Args:
        recipe: the recipe.
        layout: the layout.
        num_segments: pieces that the model can be cut into.
        roomy: schedules that keep more activations than 1F1B are among them.
    """
    parallel = recipe.parallel
    if parallel.schedule != "auto":
        return (parallel.schedule,)
    if layout.pipeline == 1 or parallel.activation_checkpointing in ("selective", "full"):
        return ("1f1b",)

    def is_possible(name: ScheduleName) -> bool:
        chunks = SCHEDULES[name].chunks or 1
        has_parts = layout.pipeline * chunks <= num_segments and (chunks == 1 or parallel.partition == "auto")
        return has_parts and (roomy or not is_roomy(name))

    return tuple(name for name in _CANDIDATES if name == "1f1b" or is_possible(name))


def placement_of(recipe: Recipe, layout: Layout, schedule: ScheduleName) -> Placement:
    """Which stage holds which part of the model while it is trained by a schedule."""
    chunks = SCHEDULES[schedule].chunks or recipe.parallel.num_chunks
    return SCHEDULES[schedule].placement(layout.pipeline, chunks) if chunks > 1 else Placement(layout.pipeline)


def modelled_step(recipe: Recipe, name: ScheduleName, layout: Layout, plan: SlicePlan, num_micro_batches: int) -> float:
    """Length of a step in FLOPs: a matrix product has the same work in its forward pass and in the gradients of its
    input and of its weight; attention has no weights, and twice its work in the backward pass."""
    schedule, num_stages, sequence_len = SCHEDULES[name], layout.pipeline, recipe.data.sequence_len
    placement = placement_of(recipe, layout, name)
    bounds = balance_parts(plan.flops(sequence_len), placement)
    if isinstance(recipe.parallel.partition, list):
        bounds = [0, *itertools.accumulate(recipe.parallel.partition)]
    costs = []
    for start, stop in itertools.pairwise(bounds):
        products = sum(segment.flops_per_token * sequence_len for segment in plan.segments[start:stop])
        attention = sum(segment.flops_per_token_squared * sequence_len**2 for segment in plan.segments[start:stop])
        weights = 0.0 if recipe.lora is not None else products
        costs.append(StageCosts(products + attention, products + 2.0 * attention, weights))
    transfer = _TRANSFER * sum(cost.forward for cost in costs) / num_stages
    count = min(num_micro_batches, _SIMULATED_MICRO_BATCHES * num_stages)
    return simulate_schedule(schedule, costs, count, transfer, placement.num_chunks).step
