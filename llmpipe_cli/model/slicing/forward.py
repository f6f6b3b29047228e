"""One forward pass of a model, seen from outside: its layer calls, the modules between them, and who uses what.

Hooks on the layers and on the parametric modules around them note every call with its arguments and results. Places
number the parts of the pass: 0 is before the first layer call, 2i + 1 inside layer call i, 2i + 2 after it.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.slicing.cuts import find_glue, find_layers
from llmpipe_cli.model.slicing.effects import effects_since, mark
from llmpipe_cli.model.slicing.recorder import AttentionOnMeta, PlaceClock, Recorder
from llmpipe_cli.model.slicing.structure import Path, describe_result, walk_tensors

Edge = tuple[Any, int]
"""An edge of the autograd graph: the node that made a value, and which of the node's results it is."""


@dataclass
class Value:
    """A tensor seen at a call, as it was at that moment (a later operation in place changes the tensor's own edge)."""

    path: Path
    tensor: Tensor
    edge: Edge | None
    derived: bool

    @classmethod
    def all_of(cls, nest: Any, recorder: Recorder, path: Path = ()) -> list[Value]:
        """All tensors of a nest that is found at `path`."""
        return [
            cls(path, tensor, edge_of(tensor), recorder.depends_on_parameters(tensor))
            for path, tensor in walk_tensors(nest, path)
        ]


@dataclass
class LayerEvent:
    """One layer call."""

    module: str
    stack: str
    arguments: list[Value]
    result: Any = None
    """Template of the result."""
    effects: dict[Path, Any] = field(default_factory=dict)
    """Templates of what the call left behind besides, by path (see `effects`)."""
    results: list[Value] = field(default_factory=list)
    """The tensors in the result and in the effects."""


@dataclass
class GlueEvent:
    """One call of a parametric module outside the layers."""

    module: str
    number: int
    place: int
    results: list[Value]
    first_node: int
    last_node: int


@dataclass
class ForwardPass:
    """Everything that one forward pass showed."""

    calls: list[LayerEvent]
    glue: list[GlueEvent]
    recorder: Recorder
    clock: PlaceClock
    roots: list[Tensor]
    num_tokens: int
    layers: tuple[str, ...]
    """The modules whose calls are layer calls, in module order."""
    split: tuple[str, ...]
    """Layers that their inner modules stand for."""


def run_forward(
    model: PreTrainedModel, inputs: dict[str, Any], recorder: Recorder | None = None, split: Collection[str] = ()
) -> ForwardPass:
    """Run the forward once and note all layer calls, module calls and parameter uses.

    Args:
        model: the model.
        inputs: keyword arguments of its forward.
        recorder: one that notes more; else a plain one.
        split: layers whose inner modules are taken for layers, see `cuts.find_layers`.
    """
    layers = find_layers(model, split)
    names = {id(model.get_submodule(name)): name for name in layers}
    recorder, clock = recorder or Recorder(model), PlaceClock()
    calls: list[LayerEvent] = []
    glue_calls: list[GlueEvent] = []
    numbers: dict[str, int] = defaultdict(int)
    entered: list[Any] = []  # the state before each of the layer calls that are running, outermost first
    glue_starts: list[int] = []

    def enter(place: int) -> None:
        recorder.place = place
        clock.enter(place)

    def before_layer(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not entered:
            name = names[id(module)]
            calls.append(LayerEvent(name, layers[name], Value.all_of((args, kwargs), recorder)))
            enter(2 * len(calls) - 1)
        entered.append(mark((args, kwargs)))

    def after_layer(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        before = entered.pop()
        if not entered:
            call, where = calls[-1], f"layer {calls[-1].module}"
            call.result = describe_result(result, (args, kwargs), where)
            call.results = Value.all_of(result, recorder)
            for path, value in effects_since(before, (args, kwargs)).items():
                call.effects[path] = describe_result(value, (args, kwargs), where)
                call.results += Value.all_of(value, recorder, path)
            _refuse_without_gradient(call)
            enter(2 * len(calls))

    def before_glue(module: nn.Module, args: Any, kwargs: Any) -> None:
        glue_starts.append(clock.now())

    def after_glue(name: str, args: Any, kwargs: Any, result: Any) -> None:
        first = glue_starts.pop()
        if entered or glue_starts:  # inside a layer, or inside another such module
            return
        results = Value.all_of(result, recorder)
        arguments = Value.all_of((args, kwargs), recorder)
        if not any(value.derived for value in arguments) and all(value.edge is None for value in results):
            for value in results:  # a table without gradient: every stage computes it itself
                recorder.forget(value.tensor)
                value.derived = False
        glue_calls.append(GlueEvent(name, numbers[name], recorder.place, results, first, clock.now()))
        numbers[name] += 1

    with contextlib.ExitStack() as stack:
        for name in layers:
            module = model.get_submodule(name)
            stack.enter_context(_hooked(module, before_layer, after_layer))
        for name, module in find_glue(model, layers).items():
            stack.enter_context(_hooked(module, before_glue, _named(name, after_glue)))
        stack.enter_context(_all_trainable(model))
        stack.enter_context(recorder)
        stack.enter_context(AttentionOnMeta())
        enter(0)
        output = model(**inputs, **forward_options(model, inputs))
    if not calls:
        raise UsageError("its forward never calls the layers found in it")
    first_input = next(iter(inputs.values()))
    num_tokens = math.prod(first_input.shape[:2])
    return ForwardPass(
        calls, glue_calls, recorder, clock, _roots_of(output), num_tokens, tuple(layers), tuple(sorted(split))
    )


def _refuse_without_gradient(call: LayerEvent) -> None:
    """A layer run without gradient leaves no trace in the autograd graph that the plan is read from."""
    derived = [value for value in call.results if value.derived and value.tensor.is_floating_point()]
    if derived and all(value.edge is None for value in derived):
        raise UsageError(f"its forward runs layer {call.module} without gradient")


def forward_options(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for the forward besides the inputs: no key-value cache, results by name."""
    accepted = dict(inspect.signature(model.forward).parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        body = getattr(model, "base_model", model)  # further arguments are handed on to it
        accepted |= inspect.signature(body.forward).parameters
    options = {"use_cache": False, "return_dict": True}
    return {name: value for name, value in options.items() if name in accepted and name not in inputs}


def _roots_of(output: Any) -> list[Tensor]:
    loss = getattr(output, "loss", None)
    if loss is None or loss.grad_fn is None:
        raise UsageError("its forward computes no loss from labels")
    logits = [value for name, value in output.items() if name.endswith("logits") and isinstance(value, Tensor)]
    return [loss, *(value for value in logits if value.grad_fn is not None)]


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


def edge_of(tensor: Tensor) -> Edge | None:
    return None if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)
