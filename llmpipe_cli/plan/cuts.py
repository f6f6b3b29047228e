"""Where stages begin and in which order they work: the schedule, and layers that are cut inside.

Both are chosen by playing the schedules through, with times modelled by FLOPs. A choice that is less simple than
another (a later schedule, a cut inside a layer) has to save time worth having.

Whole layers are a coarse unit: eight of them and a head as costly as one make two stages of 5 and 4.2, of which the
second waits. Where the best cut would lie inside a layer, were layers divisible at will, that layer is split into what
it calls (`model.slicing.split`), and the model is cut again.

Dropout is seeded by segment, so that it does not depend on the layout; a model that draws random numbers is therefore
cut between layers only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from transformers import PreTrainedConfig, PreTrainedModel

from llmpipe_cli.engine.schedules import Placement
from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.parity import splits_alike
from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.model.slicing.split import splittable
from llmpipe_cli.model.slicing.trace import trace_split
from llmpipe_cli.model.trainable import without_needless_gradients
from llmpipe_cli.plan.layout import candidate_schedules, modelled_step, placement_of
from llmpipe_cli.plan.partition import balance_parts
from llmpipe_cli.plan.plan import Job, Layout, ScheduleName
from llmpipe_cli.recipe.schema import Recipe

logger = logging.getLogger(__name__)

WORTHWHILE = 0.02
"""Share of the modelled step that a less simple choice has to save. Passes through half a stage take a little more than
half (measured: 1.4 % saved over ZB-H1 where 3.2 % were simulated)."""
SLIVERS = 6  # pieces that a layer is thought to consist of where its best cut is looked for

Splitter = Callable[[Collection[str]], SlicePlan | None]
"""From layers to the slice plan in which they are split, none if they cannot be."""


def choose_schedule_and_cut(
    recipe: Recipe, layout: Layout, whole: SlicePlan, num_micro_batches: int, *, roomy: bool, split: Splitter | None
) -> tuple[ScheduleName, SlicePlan]:
    """The schedule, and the pieces that its stages consist of: those with the shortest modelled step.

    Args:
        recipe: the recipe; a schedule that it names is kept.
        layout: the layout.
        whole: the model's segments, its layers whole.
        num_micro_batches: micro-batches of a step and replica.
        roomy: auto may take schedules that keep more activations than 1F1B.
        split: splits layers; none where they have to stay whole.
    """
    schedules = candidate_schedules(recipe, layout, whole.num_segments, roomy=roomy)
    if split is None and len(schedules) == 1:
        return schedules[0], whole

    def shortest(best: _Choice | None, plan: SlicePlan) -> _Choice | None:
        for name in schedules:
            if placement_of(recipe, layout, name).num_parts > plan.num_segments:
                continue
            seconds = modelled_step(recipe, name, layout, plan, num_micro_batches)
            if best is None or seconds < best[0] * (1.0 - WORTHWHILE):
                best = seconds, name, plan
        return best

    best = shortest(None, whole)
    if best is None:  # a schedule that has more parts than the model; the partition will say so
        return schedules[0], whole
    if split is not None:
        limit = best[0] * (1.0 - WORTHWHILE)
        worthwhile = [
            placement_of(recipe, layout, name)
            for name in schedules
            if modelled_step(recipe, name, layout, _in_slivers(whole), num_micro_batches) < limit
        ]
        finer = split(_layers_to_split(whole, worthwhile, recipe.data.sequence_len))
        best = best if finer is None else shortest(best, finer)
    assert best is not None
    return best[1], best[2]


_Choice = tuple[float, ScheduleName, SlicePlan]


def splitter(
    recipe: Recipe,
    job: Job,
    layout: Layout,
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    plan: SlicePlan,
    trainable: Collection[str] | None,
) -> Splitter | None:
    """What splits layers of this model; none where they stay whole, with a warning if a recipe asks for it in vain."""
    if recipe.parallel.split_layers != "auto" or job not in ("train", "bench") or layout.pipeline == 1:
        return None
    reason = _why_whole(recipe, layout.tensor, config, plan)
    if reason is not None:
        if "split_layers" in recipe.parallel.model_fields_set:
            logger.warning("parallel.split_layers: layers stay whole, %s", reason)
        return None

    def split(layers: Collection[str]) -> SlicePlan | None:
        return _split(recipe, cls, config, plan, layers, trainable)

    return split


def split_as_listed(
    recipe: Recipe,
    tensor: int,
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    plan: SlicePlan,
    trainable: Collection[str] | None,
) -> SlicePlan:
    """The plan with the layers split that `parallel.split_layers` lists; unchanged where it lists none.

    Raises:
        UsageError: one of them is no layer that can be split.
    """
    listed = recipe.parallel.split_layers
    if not isinstance(listed, list) or not listed:
        return plan
    where, possible = "parallel.split_layers", splittable(plan)
    reason = _why_whole(recipe, tensor, config, plan)
    if reason is not None:
        raise UsageError(f"layers stay whole, {reason}", where=where, hint="leave split_layers out")
    for name in listed:
        if name not in possible:
            hint = f"layers that can: {possible[0]} to {possible[-1]}" if possible else "leave split_layers out"
            raise UsageError(f"{name} is no layer that can be split", where=where, hint=hint)
    finer = _split(recipe, cls, config, plan, listed, trainable)
    if finer is None or set(finer.split) != set(listed):
        raise UsageError(f"{', '.join(listed)} cannot all be split", where=where, hint="leave split_layers at auto")
    return finer


def _split(
    recipe: Recipe,
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    plan: SlicePlan,
    layers: Collection[str],
    trainable: Collection[str] | None,
) -> SlicePlan | None:
    length, attention = recipe.data.sequence_len, recipe.model.attn_implementation
    # Where the type was not checked with split layers, it is now, on a tiny model.
    if not layers or not splits_alike(config, recipe.task, attn_implementation=attention):
        return None
    finer = trace_split(cls, config, recipe.task, plan, layers, sequence_len=length, attn_implementation=attention)
    return finer if finer is None or trainable is None else without_needless_gradients(finer, trainable)


def _why_whole(recipe: Recipe, tensor: int, config: PreTrainedConfig, plan: SlicePlan) -> str | None:
    """What keeps layers whole: the user says what a stage has, something else works on whole layers (tensor shards,
    adapters, checkpointing, an encoder-decoder model that generates), or random numbers are drawn."""
    parallel = recipe.parallel
    reasons = {
        "since parallel.partition says what a stage has": parallel.partition != "auto"
        and parallel.split_layers == "auto",
        "since activation checkpointing works on whole layers": parallel.activation_checkpointing
        not in ("auto", "none"),
        "since tensor shards divide whole layers": tensor > 1,
        "since LoRA adapts whole layers": recipe.lora is not None,
        "as in all encoder-decoder models": config.is_encoder_decoder,
        "since dropout is seeded by segment": plan.random,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _in_slivers(plan: SlicePlan) -> SlicePlan:
    """The plan as if a stage could begin at each of some equal slivers of a layer; good for its costs alone."""
    layers = set(splittable(plan))
    segments = []
    for segment in plan.segments:
        count = SLIVERS if segment.name in layers else 1
        sliver = replace(
            segment,
            flops_per_token=segment.flops_per_token / count,
            flops_per_token_squared=segment.flops_per_token_squared / count,
        )
        segments += [sliver] * count
    return replace(plan, segments=tuple(segments))


def _layers_to_split(plan: SlicePlan, placements: Iterable[Placement], sequence_len: int) -> list[str]:
    """The layers that a bound would fall into, were each of equal slivers."""
    slivers = _in_slivers(plan)
    names = [segment.name for segment in slivers.segments]
    costs = slivers.flops(sequence_len)
    bounds = {bound for placement in placements for bound in balance_parts(costs, placement)[1:-1]}
    return list(dict.fromkeys(names[bound] for bound in sorted(bounds) if names[bound] == names[bound - 1]))
