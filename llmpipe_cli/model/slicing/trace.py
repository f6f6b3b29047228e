"""Finding the slice plan of a model from one forward pass.

The pass runs HF's own forward with hooks on the layers and on the parametric modules between them. Three things are read
from it: the order of layer calls; the tensors that go into each call; and the autograd graph, which says what a later part
needs from an earlier one. The graph is walked backwards from the loss, segment by segment: an edge that leaves a segment
must end in a tensor that the boundary before it carries, or in the result of an earlier module, which then crosses the
boundaries between as a side value. Anything else means that the model cannot be sliced, and is refused with the reason.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.auto import example_inputs
from llmpipe_cli.model.skeleton import all_names, build_skeleton, replace_parameter
from llmpipe_cli.model.slicing.cuts import find_glue, find_layers
from llmpipe_cli.model.slicing.plan import Boundary, Carried, LayerCall, Segment, SegmentKind, SideValue, SlicePlan
from llmpipe_cli.model.slicing.recorder import PlaceClock, Recorder
from llmpipe_cli.model.slicing.structure import Path, describe_result, walk_tensors

logger = logging.getLogger(__name__)

_TRACE_LEN = 16
_MAX_COUNTED_LEN = 256  # counting operations at greater lengths changes nothing and takes long in recurrent models
_MAX_REAL_ELEMENTS = 2**25

Edge = tuple[Any, int]
"""An edge of the autograd graph: the node that made a value, and which of the node's results it is."""


@dataclass
class _Value:
    """A tensor seen at a call, as it was at that moment (a later operation in place changes the tensor's own edge)."""

    path: Path
    tensor: Tensor
    edge: Edge | None
    derived: bool

    @classmethod
    def all_of(cls, nest: Any, recorder: Recorder) -> list[_Value]:
        return [
            cls(path, tensor, _edge_of(tensor), recorder.depends_on_parameters(tensor))
            for path, tensor in walk_tensors(nest)
        ]


@dataclass
class _Call:
    """One layer call."""

    module: str
    stack: str
    arguments: list[_Value]
    result: Any = None
    results: list[_Value] = field(default_factory=list)


@dataclass
class _GlueCall:
    """One call of a parametric module outside the layers."""

    module: str
    number: int
    place: int
    results: list[_Value]
    first_node: int
    last_node: int


@dataclass
class _Pass:
    """Everything that one forward pass showed.

    Places number the parts of the pass: 0 is before the first layer call, 2i + 1 inside layer call i, 2i + 2 after it.
    """

    calls: list[_Call]
    glue: list[_GlueCall]
    recorder: Recorder
    clock: PlaceClock
    roots: list[Tensor]
    num_tokens: int


@dataclass
class _Cut:
    """A segment while the plan is made: its kind, its places and the boundary before it."""

    kind: SegmentKind
    name: str
    places: tuple[int, ...]
    at: str = "call"
    call: int = 0


def trace(model: PreTrainedModel, inputs: dict[str, Tensor]) -> SlicePlan:
    """Find the slice plan of a model.

    The parameters of `model` may be real or on the meta device; buffers must be real.

    Args:
        model: a transformers model with a head that computes a loss.
        inputs: keyword arguments of its forward, labels among them; int64 [batch, sequence_len] each.

    Raises:
        UsageError: the model cannot be sliced; the message says why.
    """
    model_type = model.config.model_type
    try:
        seen = _run_forward(model, inputs)
        return _make_plan(model, seen)
    except UsageError as error:
        raise UsageError(
            f"{type(model).__name__} ({model_type}) cannot be cut into pipeline stages: {error.message}",
            hint=error.hint or "train it on one stage (parallel.pipeline: 1) or choose another architecture",
        ) from error


def _run_forward(model: PreTrainedModel, inputs: dict[str, Tensor]) -> _Pass:
    """Run the forward once and note all layer calls, module calls and parameter uses."""
    layers = find_layers(model)
    names = {id(model.get_submodule(name)): name for name in layers}
    recorder, clock = Recorder(model), PlaceClock()
    calls: list[_Call] = []
    glue_calls: list[_GlueCall] = []
    numbers: dict[str, int] = defaultdict(int)
    entered: list[tuple[Any, Any]] = []  # arguments of the layer calls that are running, outermost first
    glue_starts: list[int] = []

    def enter(place: int) -> None:
        recorder.place = place
        clock.enter(place)

    def before_layer(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not entered:
            name = names[id(module)]
            calls.append(_Call(name, layers[name], _Value.all_of((args, kwargs), recorder)))
            enter(2 * len(calls) - 1)
        entered.append((args, kwargs))

    def after_layer(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        entered.pop()
        if not entered:
            call = calls[-1]
            call.result = describe_result(result, (args, kwargs), f"layer {call.module}")
            call.results = _Value.all_of(result, recorder)
            _refuse_without_gradient(call)
            enter(2 * len(calls))

    def before_glue(module: nn.Module, args: Any, kwargs: Any) -> None:
        glue_starts.append(clock.now())

    def after_glue(name: str, args: Any, kwargs: Any, result: Any) -> None:
        first = glue_starts.pop()
        if entered or glue_starts:  # inside a layer, or inside another such module
            return
        results = _Value.all_of(result, recorder)
        arguments = _Value.all_of((args, kwargs), recorder)
        if not any(value.derived for value in arguments) and all(value.edge is None for value in results):
            for value in results:  # a table without gradient: every stage computes it itself
                recorder.forget(value.tensor)
                value.derived = False
        glue_calls.append(_GlueCall(name, numbers[name], recorder.place, results, first, clock.now()))
        numbers[name] += 1

    with contextlib.ExitStack() as stack:
        for name in layers:
            module = model.get_submodule(name)
            stack.enter_context(_hooked(module, before_layer, after_layer))
        for name, module in find_glue(model, layers).items():
            stack.enter_context(_hooked(module, before_glue, _named(name, after_glue)))
        stack.enter_context(_all_trainable(model))
        stack.enter_context(recorder)
        enter(0)
        output = model(**inputs, **forward_options(model, inputs))
    if not calls:
        raise UsageError("its forward never calls the layers found in it")
    first_input = next(iter(inputs.values()))
    return _Pass(calls, glue_calls, recorder, clock, _roots_of(output), math.prod(first_input.shape[:2]))


def _refuse_without_gradient(call: _Call) -> None:
    """A layer run without gradient leaves no trace in the autograd graph that the plan is read from."""
    derived = [value for value in call.results if value.derived and value.tensor.is_floating_point()]
    if derived and all(value.edge is None for value in derived):
        raise UsageError(f"its forward runs layer {call.module} without gradient")


def forward_options(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for the forward besides the inputs: no key-value cache, results by name."""
    import inspect

    accepted = inspect.signature(model.forward).parameters
    options = {"use_cache": False, "return_dict": True}
    return {name: value for name, value in options.items() if name in accepted and name not in inputs}


def _roots_of(output: Any) -> list[Tensor]:
    loss = getattr(output, "loss", None)
    if loss is None or loss.grad_fn is None:
        raise UsageError("its forward computes no loss from labels")
    logits = getattr(output, "logits", None)
    return [loss] if logits is None or logits.grad_fn is None else [loss, logits]


def _named(name: str, hook: Any) -> Any:
    return lambda module, args, kwargs, result: hook(name, args, kwargs, result)


@contextlib.contextmanager
def _hooked(module: nn.Module, before: Any, after: Any) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _all_trainable(model: nn.Module) -> Iterator[None]:
    """Let every parameter require a gradient, so that the graph shows all dependencies."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        yield
    finally:
        for parameter, trainable in before.items():
            parameter.requires_grad_(trainable)


def _edge_of(tensor: Tensor) -> Edge | None:
    return None if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def trace_config(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    task: str,
    *,
    sequence_len: int = 128,
    attn_implementation: str = "auto",
) -> SlicePlan:
    """Find the slice plan of a model that is too large to build, from its config.

    The forward runs on parameters without values (see `recorder`); nothing of the model's size is allocated. Where a
    model's forward cannot do without values, it runs on parameters that are all one single zero in memory.

    Args:
        cls: the model class.
        config: its config.
        task: decides the example inputs.
        sequence_len: length near which operations are counted, 256 at most; other lengths follow from that.
        attn_implementation: as in the recipe; flash attention is traced as sdpa.

    Raises:
        UsageError: the model cannot be sliced; the message says why.
    """
    attention = "sdpa" if attn_implementation.startswith("flash") else attn_implementation
    model = build_skeleton(cls, config, attn_implementation=attention)
    inputs = example_inputs(config, task, 2, min(_TRACE_LEN, _max_positions(config)))
    try:
        plan = trace(model, inputs)
    except UsageError:
        raise
    except Exception as error:  # model code can fail in any way when values are missing
        logger.info("tracing %s without values failed (%s); using zeros", cls.__name__, error)
        _fill_with_zeros(model)
        try:
            plan = trace(model, inputs)
        except UsageError:
            raise
        except Exception as second:
            reason = " ".join(str(second).split())
            raise UsageError(f"the forward of {cls.__name__} fails: {type(second).__name__}: {reason}") from second
    return _count_operations(model, plan, config, task, min(sequence_len, _MAX_COUNTED_LEN, _max_positions(config)))


def _max_positions(config: PreTrainedConfig) -> int:
    """The longest sequence that the model accepts."""
    text_config = config.get_text_config()
    lengths = [getattr(text_config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx")]
    # two less than stated: RoBERTa's positions begin after the padding id
    return max(min((length for length in lengths if isinstance(length, int) and length > 0), default=2**16) - 2, 4)


def _fill_with_zeros(model: nn.Module) -> None:
    """Give every parameter zeros: a small model real ones, a large model one zero in memory for each parameter."""
    small = sum(parameter.numel() for parameter in model.parameters()) <= _MAX_REAL_ELEMENTS
    for name, aliases in all_names(model).items():
        meta = model.get_parameter(name)
        zeros = torch.zeros(meta.shape if small else (), dtype=meta.dtype).expand(meta.shape)
        replace_parameter(model, aliases, nn.Parameter(zeros, requires_grad=meta.requires_grad))


def _count_operations(
    model: PreTrainedModel, plan: SlicePlan, config: PreTrainedConfig, task: str, sequence_len: int
) -> SlicePlan:
    """Count each segment's operations at two lengths, and split them into a part a token and a part a token squared."""
    long = max(sequence_len, 4)
    short = long // 2
    segments = []
    at_short = _operations(model, plan, example_inputs(config, task, 1, short))
    at_long = _operations(model, plan, example_inputs(config, task, 1, long))
    for segment, few, many in zip(plan.segments, at_short, at_long, strict=True):
        squared = max((many / long - few / short) / (long - short), 0.0)
        per_token = max(many / long - squared * long, 0.0)
        segments.append(replace(segment, flops_per_token=per_token, flops_per_token_squared=squared))
    return replace(plan, segments=tuple(segments))


def _operations(model: PreTrainedModel, plan: SlicePlan, inputs: dict[str, Tensor]) -> list[float]:
    """Operations of each segment in one forward."""
    try:
        seen = _run_forward(model, inputs)
    except Exception:  # as above; an estimate is enough
        num_tokens = next(iter(inputs.values())).numel()
        return [2.0 * segment.num_parameters * num_tokens for segment in plan.segments]
    return [sum(seen.recorder.flops.get(place, 0.0) for place in cut.places) for cut in _cut(seen.calls)]


# ---------------------------------------------------------------------------------------------------------------------
# From what was seen to a plan


def _make_plan(model: PreTrainedModel, seen: _Pass) -> SlicePlan:
    cuts = _cut(seen.calls)
    segment_of = {place: index for index, cut in enumerate(cuts) for place in cut.places}
    walker = _Walker(model, seen, cuts, segment_of)
    boundaries = walker.boundaries()
    owners = {name: {segment_of[place] for place in places} for name, places in seen.recorder.uses.items()}
    for name, extra in walker.recomputed_with.items():
        owners[name] |= extra

    replicated_modules = sorted(
        {
            glue.module
            for glue in seen.glue
            if glue.results and all(value.edge is None and not value.derived for value in glue.results)
        }
    )
    unused = _adopt_unused(model, owners, cuts, seen)
    replicated = []
    for module in replicated_modules:
        for name, _ in model.get_submodule(module).named_parameters(prefix=module):
            if name in owners:
                replicated.append(name)
                owners[name] = {min(owners[name])}

    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    segments = []
    for index, cut in enumerate(cuts):
        parameters = tuple(name for name in sizes if index in owners[name])
        segments.append(
            Segment(
                name=cut.name,
                kind=cut.kind,
                parameters=parameters,
                num_parameters=sum(sizes[name] for name in parameters),
                flops_per_token=sum(seen.recorder.flops.get(place, 0.0) for place in cut.places) / seen.num_tokens,
            )
        )
    return SlicePlan(
        model_type=model.config.model_type,
        segments=tuple(segments),
        boundaries=tuple(boundaries),
        calls=tuple(
            LayerCall(call.module, segment_of[2 * index + 1], call.result) for index, call in enumerate(seen.calls)
        ),
        sides=tuple(walker.sides()),
        layers=tuple(find_layers(model)),
        replicated=tuple(replicated),
        replicated_modules=tuple(replicated_modules),
        unused=unused,
        ties=_ties(model),
        buffers=_saved_buffers(model, cuts),
    )


def _cut(calls: list[_Call]) -> list[_Cut]:
    """The segments in order: one a layer call, and one before, between and after the stacks."""
    cuts = [_Cut("pre", "pre", (0,))]
    for index, call in enumerate(calls):
        last_of_stack = index + 1 == len(calls) or calls[index + 1].stack != call.stack
        places = (2 * index + 1,) if last_of_stack else (2 * index + 1, 2 * index + 2)
        cuts.append(_Cut("layer", call.module, places, "call", index))
        if last_of_stack:
            kind: SegmentKind = "post" if index + 1 == len(calls) else "mid"
            cuts.append(_Cut(kind, kind, (2 * index + 2,), "return", index))
    return cuts


class _Walker:
    """Walks the autograd graph backwards over all segments to find what crosses each boundary."""

    def __init__(self, model: PreTrainedModel, seen: _Pass, cuts: list[_Cut], segment_of: dict[int, int]) -> None:
        self.seen = seen
        self.cuts = cuts
        self.segment_of = segment_of
        self.recomputed_with: dict[str, set[int]] = defaultdict(set)
        self._sources = self._find_sources()
        self._last_use: dict[Edge, int] = {}
        self._crossing: list[list[_Value]] = []
        self._parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self._consumers = self._find_consumers()

    def boundaries(self) -> list[Boundary]:
        """Walk from the loss to the first segment; the boundaries in ascending order."""
        found: list[Boundary] = []
        ends = [edge for edge in map(_edge_of, self.seen.roots) if edge is not None]
        for index in range(len(self.cuts) - 1, 0, -1):
            cut = self.cuts[index]
            candidates = self._candidates(cut)
            made_here = [edge for edge in self._last_use if self._sources[edge].first == index]
            reached = self._walk(index, ends + made_here, {value.edge for value in candidates if value.edge is not None})
            needed = [value for value in candidates if value.edge is None or value.edge in reached]
            found.append(Boundary(cut.at, cut.call, tuple(self._carried(cut, value) for value in needed)))  # type: ignore[arg-type]
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

    def _candidates(self, cut: _Cut) -> list[_Value]:
        """Tensors that the boundary before `cut` can carry: all that depend on parameters."""
        call = self.seen.calls[cut.call]
        values = call.arguments if cut.at == "call" else call.results
        return [value for value in values if value.edge is not None or value.derived]

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

    def _carried(self, cut: _Cut, value: _Value) -> Carried:
        return Carried(
            path=value.path,
            gradient=value.edge is not None and value.tensor.is_floating_point(),
            kept=cut.at == "call" and self._used_later(cut.call, value),
            elements_per_token=value.tensor.numel() / self.seen.num_tokens,
        )

    def _used_later(self, call: int, value: _Value) -> bool:
        """Whether the forward uses an argument of layer call `call` again after the call, other than as its result."""
        inside, later_calls = 2 * call + 1, self.seen.calls[call + 1 :]
        if any(result.tensor is value.tensor for result in self.seen.calls[call].results):
            return False
        if value.edge is not None and any(place > inside for place in self._consumers.get(value.edge, ())):
            return True
        return any(other.tensor is value.tensor for later in later_calls for other in later.arguments)


def _adopt_unused(
    model: PreTrainedModel, owners: dict[str, set[int]], cuts: list[_Cut], seen: _Pass
) -> tuple[str, ...]:
    """Give every parameter that the pass did not use a segment, so that some stage keeps and saves it.

    A parameter in a layer goes with its layer (an expert that no token chose); any other is truly unused and goes with
    the last segment before whose layers it is defined.
    """
    unused = []
    for name, _ in model.named_parameters():
        if name in owners:
            continue
        own_layer = {i for i, cut in enumerate(cuts) if cut.kind == "layer" and name.startswith(f"{cut.name}.")}
        if own_layer:
            owners[name] = own_layer
        else:
            owners[name] = {0}
            unused.append(name)
    return tuple(unused)


def _ties(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {group[0]: tuple(group[1:]) for group in names.values() if len(group) > 1}


def _saved_buffers(model: PreTrainedModel, cuts: list[_Cut]) -> dict[str, int]:
    """Segment of every persistent buffer: its layer's, or the first."""
    saved = set(model.state_dict())
    segments: dict[str, int] = {}
    for name, _ in model.named_buffers():
        if name in saved:
            layers = [i for i, cut in enumerate(cuts) if cut.kind == "layer" and name.startswith(f"{cut.name}.")]
            segments[name] = min(layers, default=0)
    return segments
