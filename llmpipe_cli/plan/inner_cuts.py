"""Cutting inside layers where whole layers leave the stages uneven.

Whole layers are a coarse unit: eight of them and a head as costly as one make two stages of 5 and 4.2, of which the
second waits. Where the best cut would lie inside a layer, were layers divisible at will, that layer is split into what
it calls (`model.slicing.split`), and the model is cut again. The finer cut is taken where playing the schedule through
says that it saves time worth having.

Dropout is seeded by segment, so that it does not depend on the layout; a model that draws random numbers is therefore
cut between layers only.
"""

from __future__ import annotations

import logging

from transformers import PreTrainedConfig, PreTrainedModel

from llmpipe_cli.engine.schedules import Placement
from llmpipe_cli.model.parity import splits_alike
from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.model.slicing.split import splittable
from llmpipe_cli.model.slicing.trace import trace_split
from llmpipe_cli.plan.layout import modelled_step
from llmpipe_cli.plan.partition import balance_parts
from llmpipe_cli.plan.plan import Job, Layout, ScheduleName
from llmpipe_cli.recipe.schema import Recipe

logger = logging.getLogger(__name__)

_WORTHWHILE = 0.02
"""Share of the modelled step that a cut inside a layer has to save."""
_SLIVERS = 6  # pieces that a layer is thought to consist of where its best cut is looked for


def may_split(recipe: Recipe, job: Job, layout: Layout, config: PreTrainedConfig, plan: SlicePlan) -> bool:
    """Whether layers may be cut at all; where the recipe asks for it in vain, a warning says why."""
    if recipe.parallel.split_layers != "auto" or job not in ("train", "bench") or layout.pipeline == 1:
        return False
    reason = _why_whole(recipe, layout, config, plan)
    if reason is not None:
        logger.warning("parallel.split_layers: layers stay whole, %s", reason)
    return reason is None


def _why_whole(recipe: Recipe, layout: Layout, config: PreTrainedConfig, plan: SlicePlan) -> str | None:
    """What keeps layers whole: the user says what a stage has, something else works on whole layers (tensor shards,
    adapters, checkpointing, an encoder-decoder model that generates), or random numbers are drawn."""
    parallel = recipe.parallel
    reasons = {
        "since parallel.partition says what a stage has": parallel.partition != "auto",
        "since activation checkpointing works on whole layers": parallel.activation_checkpointing
        not in ("auto", "none"),
        "since tensor shards divide whole layers": layout.tensor > 1,
        "since LoRA adapts whole layers": recipe.lora is not None,
        "as in all encoder-decoder models": config.is_encoder_decoder,
        "since dropout is seeded by segment": plan.random,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def split_plan(
    recipe: Recipe, cls: type[PreTrainedModel], config: PreTrainedConfig, plan: SlicePlan, placement: Placement
) -> SlicePlan | None:
    """The slice plan with those layers split that a bound would fall into; None if there are none that can be.

    Where the type was not checked with split layers, it is now, on a tiny model (`model.parity`).
    """
    length, attention = recipe.data.sequence_len, recipe.model.attn_implementation
    layers = _layers_to_split(plan, placement, length)
    if not layers or not splits_alike(config, recipe.task, attn_implementation=attention):
        return None
    return trace_split(cls, config, recipe.task, plan, layers, sequence_len=length, attn_implementation=attention)


def is_worthwhile(
    recipe: Recipe, schedule: ScheduleName, layout: Layout, whole: SlicePlan, split: SlicePlan, num_micro_batches: int
) -> bool:
    """Whether a step of the split plan is modelled to be so much shorter that the finer cut is worth having."""
    steps = [modelled_step(recipe, schedule, layout, plan, num_micro_batches) for plan in (whole, split)]
    return steps[1] < steps[0] * (1.0 - _WORTHWHILE)


def _layers_to_split(plan: SlicePlan, placement: Placement, sequence_len: int) -> list[str]:
    """The layers that a bound would fall into, were each of equal slivers that a stage can begin at."""
    layers = set(splittable(plan))
    owners: list[int] = []
    costs: list[float] = []
    for index, (segment, cost) in enumerate(zip(plan.segments, plan.flops(sequence_len), strict=True)):
        count = _SLIVERS if segment.name in layers else 1
        owners += [index] * count
        costs += [cost / count] * count
    bounds = balance_parts(costs, placement)[1:-1]
    return [plan.segments[owners[bound]].name for bound in bounds if owners[bound] == owners[bound - 1]]
