"""What crosses each boundary, read from the autograd graph of one forward pass.

The graph is walked backwards from the loss, segment by segment. An edge that leaves a segment must end in a tensor that
the boundary before it carries, or in the result of an earlier module, which then crosses the boundaries between as a
side value. What the forward computes outside all modules is computed again on every stage, so an edge may also run
through that. Anything else means that the model cannot be cut there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.slicing.effects import is_effect
from llmpipe_cli.model.slicing.forward import Edge, ForwardPass, LayerEvent, Value, edge_of
from llmpipe_cli.model.slicing.plan import Boundary, Carried, SegmentKind, SideValue


@dataclass
class Cut:
    """A segment while the plan is made: its kind, its places, the boundary before it and the modules called in it."""

    kind: SegmentKind
    name: str
    places: tuple[int, ...]
    at: Literal["call", "return"] = "call"
    call: int = 0
    modules: tuple[str, ...] = ()


def cut_segments(calls: list[LayerEvent], starts: Collection[str] | None = None) -> list[Cut]:
    """The segments in order: one a layer call, and one before, between and after the stacks.

    Args:
        calls: the layer calls.
        starts: modules whose calls begin a segment; other calls belong to the segment before. None: all do.
    """
    cuts = [Cut("pre", "pre", (0,))]
    for index, call in enumerate(calls):
        last_of_stack = index + 1 == len(calls) or calls[index + 1].stack != call.stack
        places = (2 * index + 1,) if last_of_stack else (2 * index + 1, 2 * index + 2)
        if starts is None or call.module in starts:
            cuts.append(Cut("layer", call.module, places, "call", index, (call.module,)))
        else:
            begun = cuts[-1]
            cuts[-1] = replace(begun, places=begun.places + places, modules=(*begun.modules, call.module))
        if last_of_stack:
            kind: SegmentKind = "post" if index + 1 == len(calls) else "mid"
            cuts.append(Cut(kind, kind, (2 * index + 2,), "return", index))
    return cuts


class GraphWalk:
    """Walks the autograd graph backwards over all segments to find what crosses each boundary."""

    def __init__(self, model: PreTrainedModel, seen: ForwardPass, cuts: list[Cut], segment_of: dict[int, int]) -> None:
        self.seen = seen
        self.cuts = cuts
        self.segment_of = segment_of
        self.recomputed_with: dict[str, set[int]] = defaultdict(set)
        self._sources = self._find_sources()
        self._last_use: dict[Edge, int] = {}
        self._crossing: list[list[Value]] = []
        self._parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self._consumers = self._find_consumers()

    def boundaries(self) -> list[Boundary]:
        """Walk from the loss to the first segment; the boundaries in ascending order."""
        found: list[Boundary] = []
        ends = [edge for edge in map(edge_of, self.seen.roots) if edge is not None]
        for index in range(len(self.cuts) - 1, 0, -1):
            cut = self.cuts[index]
            candidates = self._candidates(cut)
            made_here = [edge for edge in self._last_use if self._sources[edge].first == index]
            reached = self._walk(
                index, ends + made_here, {value.edge for value in candidates if value.edge is not None}
            )
            needed = [value for value in candidates if value.edge is None or value.edge in reached]
            found.append(Boundary(cut.at, cut.call, tuple(self._carried(cut, value) for value in needed)))
            self._crossing.append(needed)
            ends = [value.edge for value in needed if value.edge is not None]
        self._crossing.reverse()
        found.reverse()
        return [self._without_recomputed(index + 1, boundary) for index, boundary in enumerate(found)]

    def _without_recomputed(self, index: int, boundary: Boundary) -> Boundary:
        """Leave out what the forward on the receiving stage computes anew from the side values that it gets."""
        arriving = {edge for edge, last in self._last_use.items() if self._sources[edge].first < index <= last}
        values = self._crossing[index - 1]
        kept = [
            carried
            for carried, value in zip(boundary.carried, values, strict=True)
            if value.edge is None or not self._follows_from(value.edge, arriving)
        ]
        return replace(boundary, carried=tuple(kept))

    def _follows_from(self, edge: Edge, arriving: set[Edge]) -> bool:
        """Whether a value is computed outside all modules, from values in `arriving` alone."""
        visited: set[Any] = set()
        pending = [edge]
        while pending:
            current = pending.pop()
            node, _ = current
            if current in arriving or node in visited:
                continue
            if current in self._sources or hasattr(node, "variable") or self._inner_module(node) is not None:
                return False
            visited.add(node)
            pending.extend((following, number) for following, number in node.next_functions if following is not None)
        return True

    def sides(self) -> list[SideValue]:
        """The side values that the walk has met, in the order in which the model makes them."""
        return [
            replace(side, last=self._last_use[edge]) for edge, side in self._sources.items() if edge in self._last_use
        ]

    def _find_sources(self) -> dict[Edge, SideValue]:
        """Every value that a module outside the layers, or a layer, returned, by its edge."""
        sources: dict[Edge, SideValue] = {}
        made = [(glue.place, glue.module, glue.number, False, glue.results) for glue in self.seen.glue]
        made += [(2 * i + 1, call.module, i, True, call.results) for i, call in enumerate(self.seen.calls)]
        for place, module, number, is_layer, results in sorted(made, key=lambda item: (item[0], item[2])):
            first = self.segment_of[place]
            for value in results:
                if value.edge is not None:
                    size = value.tensor.numel() / self.seen.num_tokens
                    side = SideValue(module, number, is_layer, value.path, True, first, first, size)
                    sources.setdefault(value.edge, side)
        return sources

    def _find_consumers(self) -> dict[Edge, set[int]]:
        """Places of the nodes that use each value."""
        consumers: dict[Edge, set[int]] = defaultdict(set)
        pending = [root.grad_fn for root in self.seen.roots]
        visited: set[Any] = set()
        while pending:
            node = pending.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            for next_node, number in node.next_functions:
                if next_node is not None:
                    consumers[next_node, number].add(self.seen.clock.place_of(node))
                    pending.append(next_node)
        return consumers

    def _candidates(self, cut: Cut) -> list[Value]:
        """Tensors that the boundary before `cut` can carry: all that depend on parameters or were made in a layer."""
        call = self.seen.calls[cut.call]
        left_behind = {id(v.tensor) for other in self.seen.calls for v in other.results if is_effect(v.path)}
        values = [
            value
            for value in (call.arguments if cut.at == "call" else call.results)
            if id(value.tensor) not in left_behind
        ]
        made = self._made_in_layers(cut.call if cut.at == "call" else cut.call + 1)
        return [value for value in values if value.edge is not None or value.derived or id(value.tensor) in made]

    def _made_in_layers(self, num_calls: int) -> set[int]:
        """Results of the first layer calls that are not arguments passed through: T5's bias of a cross attention, say,
        which depends on nothing but is made by the first layer that needs it."""
        made: set[int] = set()
        for call in self.seen.calls[:num_calls]:
            given = {id(value.tensor) for value in call.arguments}
            made |= {id(value.tensor) for value in call.results} - given
        return made

    def _walk(self, index: int, ends: list[Edge], carried: set[Edge]) -> set[Edge]:
        """Walk segment `index` from its results to what it needs; returns the carried edges that it reaches."""
        reached: set[Edge] = set()
        visited: set[Any] = set()
        pending = list(ends)
        while pending:
            edge = pending.pop()
            node, _ = edge
            if edge in carried:
                reached.add(edge)
                continue
            if hasattr(node, "variable"):
                self._note_parameter(node.variable, index)
                continue
            place = self.seen.clock.place_of(node)
            if self.segment_of[place] < index:
                source = self._sources.get(edge)
                if source is not None:
                    self._last_use[edge] = max(index, self._last_use.get(edge, 0))
                    continue
                inner = self._inner_module(node)
                if inner is not None:
                    raise UsageError(
                        f"{self.cuts[index].name} uses a value from inside {inner} that {inner} does not return",
                        hint="settings that share or collect inner values (shared key-value layers, router logits) "
                        "must be off",
                    )
            if node in visited:
                continue
            visited.add(node)
            pending.extend((following, number) for following, number in node.next_functions if following is not None)
        return reached

    def _note_parameter(self, parameter: Tensor, index: int) -> None:
        """The forward recomputes something from this parameter in segment `index`'s stage, which must have it then."""
        name = self._parameters.get(id(parameter))
        if name is not None:
            self.recomputed_with[name].add(index)

    def _inner_module(self, node: Any) -> str | None:
        """Name of the layer or parametric module inside which a node was made; None if in the forward around them."""
        place = self.seen.clock.place_of(node)
        if place % 2 == 1:
            return self.seen.calls[place // 2].module
        number = node._sequence_nr()
        for glue in self.seen.glue:
            if glue.place == place and glue.first_node < number < glue.last_node:
                return glue.module
        return None

    def _carried(self, cut: Cut, value: Value) -> Carried:
        return Carried(
            path=value.path,
            gradient=value.edge is not None and value.tensor.is_floating_point(),
            kept=cut.at == "call" and self._used_later(cut.call, value),
            elements_per_token=value.tensor.numel() / self.seen.num_tokens,
        )

    def _used_later(self, call: int, value: Value) -> bool:
        """Whether the forward uses an argument of layer call `call` again after the call, other than as its result."""
        inside, later_calls = 2 * call + 1, self.seen.calls[call + 1 :]
        if any(result.tensor is value.tensor for result in self.seen.calls[call].results):
            return False
        if value.edge is not None and any(place > inside for place in self._consumers.get(value.edge, ())):
            return True
        return any(other.tensor is value.tensor for later in later_calls for other in later.arguments)
