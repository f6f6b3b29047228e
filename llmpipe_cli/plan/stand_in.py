"""A model with few layers in the place of a deep one: layers that are alike are traced and measured once.

A forward pass on meta takes as long as its layers are many, and planning needs several: to cut the model, to measure
its segments at two lengths, and to do both again for layers that are split. Yet most layers are the same but for their
weights. So the passes are made with the first layers of the model alone, as many as show each kind of layer between
each kind of neighbours, and their segments are then put where the deep model has layers of that kind. Kinds are read
from the modules, which cost little to build without weights. What is measured has to agree with them; where it does
not, the deep model itself is measured.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmpipe_cli.errors import UsageError
from llmpipe_cli.plan.profile import ModelProfile, SegmentProfile

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llmpipe_cli.plan.cuts import Splitter
    from llmpipe_cli.plan.recipe_model import RecipeModel

_DEEP, _FEWEST = 12, 6  # models from so many layers on are measured with so many or more
_DEPTHS = (("num_hidden_layers",), ("num_layers", "num_decoder_layers"), ("encoder_layers", "decoder_layers"))
"""Fields of configs that say how many layers each stack has."""
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
    short = None
    if not particular:
        # what is wrong with the model itself is said below
        with contextlib.suppress(UsageError):
            short = _with_few_layers(model, device)
    return short or whole_model(model, device)


def whole_model(model: RecipeModel, device: str) -> StandIn:
    """A model that is measured itself."""
    plan, trainable = model.sliced
    names = tuple(segment.name for segment in plan.segments)
    return StandIn(model, model, device, model.profile(plan, trainable, device), names, tuple(range(len(names))))


def _with_few_layers(model: RecipeModel, device: str) -> StandIn | None:
    """The first layers in the place of all; none where the model is not deep or its layers are not what they seem."""
    config = model.config
    if config.get_text_config() is not config:
        return None
    stacks = _stacks(model)
    depths = [len(kinds) for kinds in stacks]
    fields = next((each for each in _DEPTHS if [getattr(config, name, None) for name in each] == depths), None)
    like = [_like(list(kinds.values())) for kinds in stacks]
    if fields is None or all(places is None for places in like):
        return None
    places = [list(range(len(kinds))) if own is None else own for kinds, own in zip(stacks, like, strict=True)]
    counts = [max(own) + 1 for own in places]
    few = replace(model, config=_first_layers(config, dict(zip(fields, counts, strict=True))))
    fewer = _stacks(few)
    plan, trainable = few.sliced
    seen = [list(kinds.values()) for kinds in fewer]
    if seen != [list(kinds.values())[:count] for kinds, count in zip(stacks, counts, strict=True)]:
        return None
    if [segment.name for segment in plan.segments] != _segment_names(fewer):
        return None
    measured = few.profile(plan, trainable, device)
    numbers = [0]
    for own, count in zip(places, counts, strict=True):
        first = numbers[-1] + 1
        shown = measured.segments[first : first + count - 1]
        if any(one is not measured.segments[first + place] for one, place in zip(shown, own, strict=False)):
            return None
        numbers += [first + place for place in own] + [first + count]
    return StandIn(model, few, device, measured, tuple(_segment_names(stacks)), tuple(numbers))


def _segment_names(stacks: Sequence[dict[str, Any]]) -> list[str]:
    """The segments of a model whose layer calls are those of its stacks."""
    between = ["mid"] * (len(stacks) - 1) + ["post"]
    return ["pre", *(name for stack, end in zip(stacks, between, strict=True) for name in (*stack, end))]


def _like(kinds: Sequence[Any]) -> list[int] | None:
    """For each layer the first one of its kind between the same neighbours, of as few first layers as show them all.

    The last of those layers stands for the last of all. None where there are few layers, or it takes all of them.
    """
    if len(kinds) < _DEEP:
        return None
    around = [None, *zip(kinds, kinds[1:], kinds[2:], strict=False)]
    for count in range(_FEWEST, len(kinds)):
        shown = around[1 : count - 1]
        if list(kinds[count - 2 : count]) == list(kinds[-2:]) and all(one in shown for one in around[1:]):
            return [0, *(1 + shown.index(one) for one in around[1:]), count - 1]
    return None


def _stacks(model: RecipeModel) -> list[dict[str, Any]]:
    """What each layer of each stack is, by name: its modules, their settings, the shapes of their tensors, and what the
    config lists of it."""
    from llmpipe_cli.model.skeleton import build_skeleton
    from llmpipe_cli.model.slicing.cuts import find_layers

    skeleton = build_skeleton(model.cls, model.config, attn_implementation=model.traced_attention)
    names: dict[str, list[str]] = {}
    for name, stack in find_layers(skeleton).items():
        names.setdefault(stack, []).append(name)
    lists = [value for value in vars(model.config).values() if isinstance(value, (list, tuple))]
    stacks = []
    for own in names.values():
        listed = [value for value in lists if len(value) == len(own)]
        kinds: dict[str, Any] = {}
        for place, name in enumerate(own):
            modules = skeleton.get_submodule(name).named_modules()
            described = [(path, type(module), _settings(module)) for path, module in modules]
            kinds[name] = described, [value[place] for value in listed]
        stacks.append(kinds)
    return stacks


def _settings(module: Any) -> dict[str, Any]:
    settings = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str, tuple))}
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors}
    return {name: value for name, value in settings.items() if name not in _NUMBERS} | shapes


def _first_layers(config: PreTrainedConfig, counts: dict[str, int]) -> PreTrainedConfig:
    """The config of the same model with fewer layers; `counts` by the fields that say how many there are."""
    first = copy.deepcopy(config)
    for field_name, count in counts.items():
        for name, value in vars(config).items():
            if isinstance(value, (list, tuple)) and len(value) == getattr(config, field_name):
                setattr(first, name, value[:count])
        setattr(first, field_name, count)
    return first


def _unnamed(segment: SegmentProfile) -> SegmentProfile:
    return replace(segment, name="")
