"""Layouts whose stages begin inside a layer: the best that a search found between whole layers, cut finer.

The search takes layers whole, since most cuts inside one save nothing and each costs a pass of the model on meta. The
layouts that it found are looked at again here: how short would the step be, were layers divisible at will? Those that
could then beat the best are cut inside the layers that their bounds would fall into, and predicted as the search
predicts. A finer cut is kept where it saves time worth having; the layout then lists the layers that are split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmpipe_cli.engine.schedules import SCHEDULES, splits_backward
from llmpipe_cli.plan.cost import around_passes, profile_costs, stage_costs
from llmpipe_cli.plan.partition import balance_parts
from llmpipe_cli.plan.plan import Layout
from llmpipe_cli.plan.recipe_model import recipe_model
from llmpipe_cli.plan.search import EQUAL_WITHIN, Candidate, Found, Job, conditions_of, pinned_to, search
from llmpipe_cli.plan.simulate import StageCosts
from llmpipe_cli.plan.stand_in import StandIn, stand_in
from llmpipe_cli.plan.steptime import num_chunks, pipeline_time
from llmpipe_cli.recipe.schema import Recipe


def find(recipe: Recipe, job: Job, model: StandIn | None = None, *, keep: int = 12) -> Found:
    """The best layouts of a recipe, between whole layers and inside them.

    Args:
        recipe: the recipe.
        job: what is planned, as `propose.make_job` makes it of the recipe.
        model: what was measured for the job's profile; measured anew if it is needed and not given.
        keep: how many to keep of those that fit and of those that do not.
    """
    found = search(job, keep=keep)
    if recipe.parallel.split_layers == "auto" and job.pins.partition is None and job.cluster.is_uniform:
        _cut_finer(recipe, job, found, model)
    return found


@dataclass(frozen=True)
class _Hope:
    """What a layout could take.

    Attributes:
        place: of the layout among the best.
        seconds: its step, were layers divisible at will.
        layers: the segments that its bounds would fall into.
    """

    place: int
    seconds: float
    layers: tuple[int, ...]


def _cut_finer(recipe: Recipe, job: Job, found: Found, model: StandIn | None) -> None:
    """Replace those of the best layouts that are faster with stages that begin inside a layer."""
    from llmpipe_cli.plan.cuts import WORTHWHILE

    hopes = [_hope(job, candidate, place) for place, candidate in enumerate(found.best)]
    looked = False
    for hope in sorted((one for one in hopes if one is not None), key=lambda one: one.seconds):
        before = found.best[hope.place]
        if hope.seconds > (1.0 - EQUAL_WITHIN) * min(_seconds(candidate) for candidate in found.best):
            break  # the others could gain less
        looked, model = True, model or stand_in(recipe_model(recipe), job.profile.measured_on)
        finer = _finer(recipe, model, job, before, hope.layers)
        if finer is not None and _seconds(finer) < _seconds(before) * (1.0 - WORTHWHILE):
            found.best[hope.place] = finer
    if looked:
        fastest = min(_seconds(candidate) for candidate in found.best)
        found.best.sort(key=lambda one: one.rank(fastest))


def _seconds(candidate: Candidate) -> float:
    assert candidate.seconds is not None
    return candidate.seconds


def _hope(job: Job, candidate: Candidate, place: int) -> _Hope | None:
    """What a layout could take with layers divisible at will; None where that saves nothing worth having."""
    from llmpipe_cli.plan.cuts import SLIVERS, WORTHWHILE

    choice, segments = candidate.choice, job.profile.segments
    if choice.pipeline == 1 or choice.tensor > 1 or choice.checkpointing != "none":
        return None
    device = job.cluster.nodes[0].device.at(job.rates)
    costs, origins = [], []
    for index, cost in enumerate(profile_costs(job.profile, conditions_of(job, choice, device))):
        count = SLIVERS if segments[index].kind == "layer" else 1
        sliver = StageCosts(cost.forward / count, cost.input_gradient / count, cost.weight_gradient / count)
        costs += [sliver] * count
        origins += [index] * count
    placement = SCHEDULES[choice.schedule].placement(choice.pipeline, num_chunks(choice.schedule, job.pins.chunks))
    bounds = balance_parts([cost.total for cost in costs], placement)
    around = around_passes(device, split=splits_backward(choice.schedule))
    whole, divided = (
        pipeline_time(
            choice.schedule, parts, choice.num_micro_batches, candidate.transfers, chunks=job.pins.chunks
        ).seconds
        for parts in (candidate.costs, stage_costs(costs, bounds, around))
    )
    passes = _seconds(candidate) - candidate.end.total
    seconds = candidate.end.total + passes * divided / whole
    if seconds > _seconds(candidate) * (1.0 - WORTHWHILE):
        return None
    inside = dict.fromkeys(origins[bound] for bound in bounds[1:-1] if origins[bound] == origins[bound - 1])
    return _Hope(place, seconds, tuple(inside))


def _finer(recipe: Recipe, model: StandIn, job: Job, candidate: Candidate, layers: tuple[int, ...]) -> Candidate | None:
    """The layout with stages that begin inside some of these layers; None where they cannot or it does not fit."""
    from llmpipe_cli.plan.cuts import splitter

    choice, few = candidate.choice, model.few
    layout = Layout(pipeline=choice.pipeline, tensor=choice.tensor, data=choice.data)
    split = splitter(recipe, "train", layout, few.cls, few.config, *few.sliced)
    if split is None or len(model.names) != len(job.profile.segments):
        return None
    finer = model.split(layers, split)
    if finer is None:
        return None
    profile, names = finer
    pinned = replace(job, profile=profile, pins=pinned_to(choice, job.pins.chunks))
    best = next(iter(search(pinned, keep=1).best), None)
    return None if best is None else replace(best, split_layers=names)
