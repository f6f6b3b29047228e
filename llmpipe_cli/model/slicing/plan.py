"""The slice plan: where a model can be cut, what crosses each cut, and which segment owns which parameter.

Plain data, found once by `trace` on any machine and sent to all ranks as JSON. A model of S segments has the boundaries
1 to S-1; boundary b lies before segment b. A stage is a range [start, stop) of segments; it receives what boundary
`start` carries and sends what boundary `stop` carries.

What crosses a boundary, in this order: the *carried* tensors (arguments of the next layer call, or results of the last
one) and the *side* values (results of earlier modules that a later segment uses in another way).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from llmpipe_cli.model.slicing.structure import Path

SegmentKind = Literal["pre", "layer", "mid", "post"]


@dataclass(frozen=True)
class Segment:
    """The smallest piece that a stage can consist of."""

    name: str
    """The layer's module name, or "pre" (before all layers), "mid" (between two stacks), "post" (after all layers);
    of a part of a layer the name of its largest module."""
    kind: SegmentKind
    parameters: tuple[str, ...]
    """Names of the parameters that the segment uses; a tied parameter stands in several segments."""
    num_parameters: int
    """Elements in `parameters`."""
    flops_per_token: float = 0.0
    """Forward floating-point operations a token, apart from those that grow with the sequence."""
    flops_per_token_squared: float = 0.0
    """Forward floating-point operations a sample, divided by the square of its sequence length."""


@dataclass(frozen=True)
class Effect:
    """Something that a layer call leaves behind besides its result (see `effects`)."""

    path: Path
    value: Any
    """Template of it."""


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer by the model's forward, in the order of calls."""

    module: str
    segment: int
    result: Any
    """Template of what the call returns (see `structure`)."""
    effects: tuple[Effect, ...] = ()
    """What the call leaves behind besides."""


@dataclass(frozen=True)
class Carried:
    """A tensor that crosses a boundary as an argument or as a result of a layer call."""

    path: Path
    gradient: bool
    """Whether a gradient comes back for it; false for integers and for floats without gradient."""
    kept: bool
    """Whether the model's forward uses the tensor again after the call that it is an argument of."""
    elements_per_token: float
    """Size for one token of one sample, to estimate transfers."""


@dataclass(frozen=True)
class SideValue:
    """A result of an earlier module that later segments use other than as an argument of the next layer."""

    module: str
    call: int
    """Which call: the number among the layer calls for a layer, else among this module's own calls."""
    is_layer: bool
    path: Path
    gradient: bool
    first: int
    """Segment that makes it."""
    last: int
    """Last segment that uses it."""
    elements_per_token: float


@dataclass(frozen=True)
class Boundary:
    """What lies between two segments."""

    at: Literal["call", "return"]
    """Before layer call `call`, or right after it."""
    call: int
    carried: tuple[Carried, ...]


@dataclass(frozen=True)
class SlicePlan:
    """How to slice one model."""

    model_type: str
    segments: tuple[Segment, ...]
    boundaries: tuple[Boundary, ...]
    """`boundaries[b - 1]` lies before segment b."""
    calls: tuple[LayerCall, ...]
    sides: tuple[SideValue, ...]
    layers: tuple[str, ...]
    """Names of all modules at whose calls the model is cut."""
    replicated: tuple[str, ...] = ()
    """Parameters without gradient outside the layers (sinusoidal tables) that every stage holds."""
    replicated_modules: tuple[str, ...] = ()
    """The modules that `replicated` belongs to; they run on every stage."""
    unused: tuple[str, ...] = ()
    """Parameters that the forward never uses; they belong to a segment so that they are saved."""
    ties: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Other names of the same parameter, by its first name."""
    buffers: dict[str, int] = field(default_factory=dict)
    """Segment of each buffer that a checkpoint contains."""
    split: tuple[str, ...] = ()
    """Layers that are several segments; the modules that they call stand for them in `layers` and `calls`."""
    random: bool = False
    """Whether the forward draws random numbers: dropout, noise in a router."""

    @property
    def starts(self) -> frozenset[str]:
        """The modules at whose calls a segment begins."""
        return frozenset(self.calls[boundary.call].module for boundary in self.boundaries if boundary.at == "call")

    @property
    def num_segments(self) -> int:
        return len(self.segments)

    @cached_property
    def owners(self) -> dict[str, list[int]]:
        """Segments that use each parameter, ascending; more than one for tied and shared parameters."""
        owners: dict[str, list[int]] = {}
        for index, segment in enumerate(self.segments):
            for name in segment.parameters:
                owners.setdefault(name, []).append(index)
        return owners

    def flops(self, sequence_len: int, batch: int = 1) -> list[float]:
        """Forward floating-point operations of each segment for `batch` samples of `sequence_len` tokens."""
        return [
            batch * (segment.flops_per_token * sequence_len + segment.flops_per_token_squared * sequence_len**2)
            for segment in self.segments
        ]

    def cut_inside(self, bounds: Iterable[int]) -> list[str]:
        """The split layers that a bound lies in."""
        names = ["", *(segment.name for segment in self.segments), ""]
        pairs = [(names[bound], names[bound + 1]) for bound in bounds]
        return [
            layer
            for layer in self.split
            if any(one.startswith(f"{layer}.") and other.startswith(f"{layer}.") for one, other in pairs)
        ]

    def first_stack(self) -> SlicePlan:
        """The plan of what comes before a second stack of layers: an encoder-decoder model's encoder.

        Raises:
            ValueError: there is only one stack.
        """
        middle = self.middle
        calls = tuple(call for call in self.calls if call.segment < middle)
        sides = tuple(replace(side, last=min(side.last, middle)) for side in self.sides if side.first < middle)
        return replace(
            self,
            segments=self.segments[: middle + 1],
            boundaries=self.boundaries[:middle],
            calls=calls,
            sides=sides,
        )

    @property
    def middle(self) -> int:
        """The segment between two stacks of layers.

        Raises:
            ValueError: there is only one stack.
        """
        return [segment.kind for segment in self.segments].index("mid")

    def sides_at(self, boundary: int) -> list[SideValue]:
        """The side values that cross `boundary` (0 to S; none at the two ends), in carry order."""
        return [side for side in self.sides if side.first < boundary <= side.last]

    def carried_at(self, boundary: int) -> tuple[Carried, ...]:
        """The carried tensors of `boundary` (0 to S; none at the two ends), in carry order."""
        inner = 0 < boundary < self.num_segments
        return self.boundaries[boundary - 1].carried if inner else ()

    def num_carried(self, boundary: int) -> int:
        """Number of tensors that cross `boundary`."""
        return len(self.carried_at(boundary)) + len(self.sides_at(boundary))

    def gradient_free(self, boundary: int) -> set[int]:
        """Positions in the carry at `boundary` for which no gradient comes back."""
        crossing: list[Carried | SideValue] = [*self.carried_at(boundary), *self.sides_at(boundary)]
        return {position for position, item in enumerate(crossing) if not item.gradient}

    def carried_elements_per_token(self, boundary: int) -> float:
        """Elements that cross `boundary` for one token of one sample."""
        crossing: list[Carried | SideValue] = [*self.carried_at(boundary), *self.sides_at(boundary)]
        return sum(item.elements_per_token for item in crossing)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values; `from_json` reverses it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SlicePlan:
        """The plan that `to_json` wrote."""
        return cls(
            model_type=value["model_type"],
            segments=tuple(Segment(**{**item, "parameters": tuple(item["parameters"])}) for item in value["segments"]),
            boundaries=tuple(
                Boundary(item["at"], item["call"], tuple(_with_path(Carried, carried) for carried in item["carried"]))
                for item in value["boundaries"]
            ),
            calls=tuple(
                LayerCall(**{**item, "effects": tuple(_with_path(Effect, effect) for effect in item["effects"])})
                for item in value["calls"]
            ),
            sides=tuple(_with_path(SideValue, item) for item in value["sides"]),
            layers=tuple(value["layers"]),
            replicated=tuple(value["replicated"]),
            replicated_modules=tuple(value["replicated_modules"]),
            unused=tuple(value["unused"]),
            ties={name: tuple(aliases) for name, aliases in value["ties"].items()},
            buffers=dict(value["buffers"]),
            split=tuple(value.get("split", ())),
            random=value.get("random", False),
        )


def _with_path(cls: type[Any], item: dict[str, Any]) -> Any:
    return cls(**{**item, "path": tuple(item["path"])})
