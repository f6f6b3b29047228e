"""A model with few layers in the place of a deep one: layers that are alike are traced and measured once.

A forward pass on meta takes as long as its layers are many, and planning needs several: to cut the model, to measure
its segments at two lengths, and to do both again for layers that are split. Yet most layers are the same but for their
weights. So the passes are made with the first layers of the model alone, as many as show each kind of layer between
each kind of neighbours, and their segments are then put where the deep model has layers of that kind. Kinds are read
from the modules, which cost little to build without weights. What is measured has to agree with them; where it does
not, the deep model itself is measured.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmpipe_cli.plan.profile import ModelProfile, SegmentProfile

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llmpipe_cli.plan.cuts import Splitter
    from llmpipe_cli.plan.recipe_model import RecipeModel

_DEEP, _FEWEST = 12, 6  # models from so many layers on are measured with so many or more
_NUMBERS = {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx"}  # of a layer; not what it does


@dataclass(frozen=True)
class StandIn:
    """What is measured in the place of a model.

    Attributes:
        deep: the model.
        few: the model that is measured: it has few layers, or is the same.
        device: "cuda" or "cpu": whose kernels it will run.
        measured: the profile of `few`.
        names: of the deep model's segments.
        places: for each of them the segment of `few` that is like it.
    """

    deep: RecipeModel
    few: RecipeModel
    device: str
    measured: ModelProfile
    names: tuple[str, ...]
    places: tuple[int, ...]
    _pieces: dict[frozenset[int], list[list[SegmentProfile]] | None] = field(default_factory=dict, compare=False)

    @functools.cached_property
    def profile(self) -> ModelProfile:
        """The profile of the deep model."""
        return replace(self.measured, segments=tuple(self.measured.segments[place] for place in self.places))

    def split(self, wanted: Collection[int], split: Splitter) -> tuple[ModelProfile, tuple[str, ...]] | None:
        """The profile with those of the wanted segments split that can be, and their names; None if none can.

        Args:
            wanted: segments of the deep model.
            split: splits layers of `few`.
        """
        chosen = frozenset(self.places[index] for index in wanted)
        if chosen not in self._pieces:
            self._pieces[chosen] = self._split(chosen, split)
        pieces = self._pieces[chosen]
        if pieces is None:
            return whole_model(self.deep, self.device).split(wanted, split)
        inside = [index for index in wanted if len(pieces[self.places[index]]) > 1]
        if not inside:
            return None
        segments: list[SegmentProfile] = []
        for index, place in enumerate(self.places):
            segments += pieces[place] if index in inside else [self.measured.segments[place]]
        finer = replace(self.measured, segments=tuple(segments), divisible=())  # tensor shards divide whole layers
        return finer, tuple(sorted(self.names[index] for index in inside))

    def _split(self, chosen: Collection[int], split: Splitter) -> list[list[SegmentProfile]] | None:
        """The pieces of each segment of `few` once the chosen ones are split; none if others are not what they were."""
        from llmpipe_cli.model.slicing.split import splittable

        plan, trainable = self.few.sliced
        possible = set(splittable(plan))
        finer = split([name for place in sorted(chosen) if (name := plan.segments[place].name) in possible])
        if finer is None:
            return [[segment] for segment in self.measured.segments]
        pieces: list[list[SegmentProfile]] = [[] for _ in plan.segments]
        place = 0
        profile = self.few.profile(finer, trainable, self.device)
        for segment, measured in zip(finer.segments, profile.segments, strict=True):
            while not f"{segment.name}.".startswith(f"{plan.segments[place].name}."):
                place += 1
            pieces[place].append(measured)
        others = (
            len(own) == 1 and _unnamed(own[0]) == _unnamed(before)
            for own, before, segment in zip(pieces, self.measured.segments, plan.segments, strict=True)
            if segment.name not in finer.split
        )
        return pieces if self.few is self.deep or all(others) else None


def stand_in(model: RecipeModel, device: str) -> StandIn:
    """What is measured in the place of a model; `device` is "cuda" or "cpu": whose kernels it will run.

    Raises:
        UsageError: the model cannot be traced.
    """
    recipe = model.recipe
    particular = recipe.train.freeze or recipe.train.trainable or isinstance(recipe.parallel.split_layers, list)
    return (None if particular else _with_few_layers(model, device)) or whole_model(model, device)


def whole_model(model: RecipeModel, device: str) -> StandIn:
    """A model that is measured itself."""
    plan, trainable = model.sliced
    names = tuple(segment.name for segment in plan.segments)
    return StandIn(model, model, device, model.profile(plan, trainable, device), names, tuple(range(len(names))))


def _with_few_layers(model: RecipeModel, device: str) -> StandIn | None:
    """The first layers in the place of all; none where the model is not deep or its layers are not what they seem."""
    config = model.config
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(depth, int) or depth < _DEEP or config.is_encoder_decoder:
        return None
    if config.get_text_config() is not config:
        return None
    layers = _kinds(model)
    kinds = list(layers.values())
    places = _like(kinds) if len(kinds) == depth else None
    if places is None:
        return None
    count = max(places) + 1
    few = replace(model, config=_first_layers(config, depth, count))
    fewer = _kinds(few)
    plan, trainable = few.sliced
    if list(fewer.values()) != kinds[:count] or [segment.name for segment in plan.segments] != ["pre", *fewer, "post"]:
        return None
    measured = few.profile(plan, trainable, device)
    if any(
        measured.segments[1 + place] is not measured.segments[1 + like] for place, like in enumerate(places[:count])
    ):
        return None
    numbers = (0, *(1 + place for place in places), count + 1)
    return StandIn(model, few, device, measured, ("pre", *layers, "post"), numbers)


def _like(kinds: Sequence[Any]) -> list[int] | None:
    """For each layer the first one of its kind between the same neighbours, of as few first layers as show them all.

    The last of those layers stands for the last of all. None where it takes all layers.
    """
    around = [None, *zip(kinds, kinds[1:], kinds[2:], strict=False)]
    for count in range(_FEWEST, len(kinds)):
        shown = around[1 : count - 1]
        if list(kinds[count - 2 : count]) == list(kinds[-2:]) and all(one in shown for one in around[1:]):
            return [0, *(1 + shown.index(one) for one in around[1:]), count - 1]
    return None


def _kinds(model: RecipeModel) -> dict[str, Any]:
    """What each layer is: its modules, their settings, the shapes of their tensors, and what the config lists of it."""
    from llmpipe_cli.model.skeleton import build_skeleton
    from llmpipe_cli.model.slicing.cuts import find_layers

    skeleton = build_skeleton(model.cls, model.config, attn_implementation=model.traced_attention)
    names = list(find_layers(skeleton))
    listed = [value for value in vars(model.config).values() if isinstance(value, (list, tuple))]
    listed = [value for value in listed if len(value) == len(names)]
    kinds: dict[str, Any] = {}
    for place, name in enumerate(names):
        modules = [
            (path, type(module), _settings(module)) for path, module in skeleton.get_submodule(name).named_modules()
        ]
        kinds[name] = modules, [value[place] for value in listed]
    return kinds


def _settings(module: Any) -> dict[str, Any]:
    settings = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str, tuple))}
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors}
    return {name: value for name, value in settings.items() if name not in _NUMBERS} | shapes


def _first_layers(config: PreTrainedConfig, depth: int, count: int) -> PreTrainedConfig:
    """The config of the same model with so many of its layers."""
    first = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(first, name, value[:count])
    first.num_hidden_layers = count
    return first


def _unnamed(segment: SegmentProfile) -> SegmentProfile:
    return replace(segment, name="")
