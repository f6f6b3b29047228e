"""Putting the slice plan together from what one forward pass showed."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedModel

from llmpipe_cli.model.skeleton import all_names
from llmpipe_cli.model.slicing.forward import ForwardPass
from llmpipe_cli.model.slicing.plan import Effect, LayerCall, Segment, SlicePlan
from llmpipe_cli.model.slicing.walk import Cut, GraphWalk, cut_segments


def assemble_plan(model: PreTrainedModel, seen: ForwardPass, starts: Collection[str] | None = None) -> SlicePlan:
    """The slice plan of `model`.

    Args:
        model: the model.
        seen: one pass of its forward.
        starts: modules whose calls begin a segment, see `cut_segments`.

    Raises:
        UsageError: a segment needs a value that cannot be carried to it.
    """
    cuts = cut_segments(seen.calls, starts)
    segment_of = {place: index for index, cut in enumerate(cuts) for place in cut.places}
    walker = GraphWalk(model, seen, cuts, segment_of)
    boundaries = walker.boundaries()
    owners = {name: {segment_of[place] for place in places} for name, places in seen.recorder.uses.items()}
    for name, extra in walker.recomputed_with.items():
        owners[name] |= extra

    unused = _adopt_unused(model, owners, cuts)
    replicated_modules = _replicated_modules(seen)
    replicated = []
    for module in replicated_modules:
        for name, _ in model.get_submodule(module).named_parameters(prefix=module):
            if name in owners:
                replicated.append(name)
                owners[name] = {min(owners[name])}
    return SlicePlan(
        model_type=model.config.model_type,
        segments=_segments(model, seen, cuts, owners),
        boundaries=tuple(boundaries),
        calls=tuple(
            LayerCall(
                call.module,
                segment_of[2 * index + 1],
                call.result,
                tuple(Effect(path, value) for path, value in call.effects.items()),
            )
            for index, call in enumerate(seen.calls)
        ),
        sides=tuple(walker.sides()),
        layers=seen.layers,
        split=seen.split,
        random=seen.recorder.random,
        replicated=tuple(replicated),
        replicated_modules=tuple(replicated_modules),
        unused=unused,
        ties={name: names[1:] for name, names in all_names(model).items() if len(names) > 1},
        buffers=_saved_buffers(model, cuts),
    )


def _segments(
    model: PreTrainedModel, seen: ForwardPass, cuts: list[Cut], owners: dict[str, set[int]]
) -> tuple[Segment, ...]:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    segments = []
    for index, cut in enumerate(cuts):
        parameters = tuple(name for name in sizes if index in owners[name])
        operations = sum(seen.recorder.flops.get(place, 0.0) for place in cut.places)
        num_parameters = sum(sizes[name] for name in parameters)
        name = max(cut.modules, key=lambda module: _own_size(module, sizes), default=cut.name)
        segments.append(Segment(name, cut.kind, parameters, num_parameters, operations / seen.num_tokens))
    return tuple(segments)


def _own_size(module: str, sizes: dict[str, int]) -> int:
    """Elements of a module's parameters."""
    return sum(size for name, size in sizes.items() if name.startswith(f"{module}."))


def _replicated_modules(seen: ForwardPass) -> list[str]:
    """Modules whose results carry no gradient and do not depend on other weights: every stage runs them itself."""

    def constant(name: str) -> bool:
        results = [value for glue in seen.glue if glue.module == name for value in glue.results]
        return bool(results) and all(value.edge is None and not value.derived for value in results)

    return sorted(name for name in {glue.module for glue in seen.glue} if constant(name))


def _adopt_unused(model: PreTrainedModel, owners: dict[str, set[int]], cuts: list[Cut]) -> tuple[str, ...]:
    """Give every parameter that the pass did not use a segment, so that some stage keeps and saves it.

    A parameter in a layer goes with its layer (an expert that no token chose); any other is truly unused, goes with the
    first segment, and is named in the result.
    """
    unused = []
    for name, _ in model.named_parameters():
        if name in owners:
            continue
        own_layer = _calling(cuts, name)
        if own_layer:
            owners[name] = own_layer
        else:
            owners[name] = {0}
            unused.append(name)
    return tuple(unused)


def _saved_buffers(model: PreTrainedModel, cuts: list[Cut]) -> dict[str, int]:
    """Segment of every persistent buffer: its layer's, or the first."""
    saved = set(model.state_dict())
    segments: dict[str, int] = {}
    for name, _ in model.named_buffers():
        if name in saved:
            segments[name] = min(_calling(cuts, name), default=0)
    return segments


def _calling(cuts: list[Cut], name: str) -> set[int]:
    """The segments that call the layer, or the part of one, which a parameter or buffer lies in."""
    return {i for i, cut in enumerate(cuts) if any(name.startswith(f"{module}.") for module in cut.modules)}
