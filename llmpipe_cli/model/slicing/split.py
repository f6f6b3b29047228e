"""Where inside a layer a model can be cut.

The modules that a layer calls stand for it while the forward is watched: norms, attention, MLP. Not every place between
two of them is worth a cut: before a Llama's attention two tensors would cross, before the norm of its MLP one. Kept are
the places that no more crosses than what the layer itself takes. A layer without such a place stays whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedModel

from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.slicing.assemble import assemble_plan
from llmpipe_cli.model.slicing.cuts import inner_modules
from llmpipe_cli.model.slicing.forward import ForwardPass, run_forward
from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.model.slicing.walk import GraphWalk, cut_segments


def splittable(plan: SlicePlan) -> tuple[str, ...]:
    """Layers of a plan that may be split: called once, and not the last of their stack.

    (What follows the last layer begins where that returns, and a part of it returns something else.)
    """
    times = Counter(call.module for call in plan.calls)
    last = {plan.calls[boundary.call].module for boundary in plan.boundaries if boundary.at == "return"}
    return tuple(name for name, count in times.items() if count == 1 and name not in last)


def assemble_split(
    model: PreTrainedModel, inputs: dict[str, Any], plan: SlicePlan, layers: Collection[str]
) -> SlicePlan | None:
    """The slice plan in which those of `layers` that can be cut inside are several segments; None if none can.

    Args:
        model: as for `trace`.
        inputs: keyword arguments of its forward.
        plan: the plan with whole layers.
        layers: layers that `splittable` names.

    Raises:
        UsageError: the model cannot be sliced in this way.
    """
    split = set(layers)
    while split:
        seen = run_forward(model, inputs, split=split)
        inner = {layer: modules for layer in split if (modules := _inner_calls(model, seen, layer))}
        chosen = _cheap_places(model, seen, inner, plan) if len(inner) == len(split) else inner
        if len(chosen) == len(split):
            return assemble_plan(model, seen, _starts(seen, inner).union(*chosen.values()))
        split = set(chosen)
    return None


def _inner_calls(model: PreTrainedModel, seen: ForwardPass, layer: str) -> list[str]:
    """The inner modules of a split layer in the order of their calls; none unless each is called once.

    A module that is not called itself (its children are, or its weights are read) could not be left out on a stage that
    does not hold them.
    """
    modules = inner_modules(model, layer)
    called = [call.module for call in seen.calls if call.module in set(modules)]
    return called if sorted(called) == sorted(modules) else []


def _starts(seen: ForwardPass, inner: dict[str, list[str]]) -> set[str]:
    """The modules at whose calls a layer begins."""
    return {call.module for call in seen.calls} - {name for modules in inner.values() for name in modules[1:]}


def _cheap_places(
    model: PreTrainedModel, seen: ForwardPass, inner: dict[str, list[str]], plan: SlicePlan
) -> dict[str, list[str]]:
    """The inner modules before whose calls no more crosses than before the whole layer; without layers that have none.

    The same place of all layers is tried at once: what crosses inside of one layer does not cross inside of another.
    """
    segments = {segment.name: index for index, segment in enumerate(plan.segments)}
    usual = {layer: plan.carried_elements_per_token(segments[layer]) for layer in inner}
    first = _starts(seen, inner)
    crossing = _crossing(model, seen, first)
    inner = {layer: modules for layer, modules in inner.items() if crossing[modules[0]] <= usual[layer]}
    chosen: dict[str, list[str]] = {layer: [] for layer in inner}
    for number in range(1, max(map(len, inner.values()), default=0)):
        tried = {layer: modules[number] for layer, modules in inner.items() if len(modules) > number}
        try:
            crossing = _crossing(model, seen, first | set(tried.values()))
        except UsageError:
            continue
        for layer, module in tried.items():
            if crossing[module] <= usual[layer]:
                chosen[layer].append(module)
    return {layer: modules for layer, modules in chosen.items() if modules}


def _crossing(model: PreTrainedModel, seen: ForwardPass, starts: set[str]) -> dict[str, float]:
    """Elements a token that cross the boundary before each module in `starts`."""
    cuts = cut_segments(seen.calls, starts)
    walker = GraphWalk(model, seen, cuts, {place: index for index, cut in enumerate(cuts) for place in cut.places})
    boundaries, sides = walker.boundaries(), walker.sides()
    crossing = {}
    for index, boundary in enumerate(boundaries, start=1):
        if boundary.at == "call":
            elements = sum(item.elements_per_token for item in boundary.carried)
            elements += sum(side.elements_per_token for side in sides if side.first < index <= side.last)
            crossing[cuts[index].modules[0]] = elements
    return crossing
