"""Running one stage of a model by replaying HF's own forward.

A stage holds the whole model, but only its own parameters are real. A call runs ``model.forward`` unchanged from its
beginning. Until the stage's first layer nothing is computed: layers hand back their input, parametric modules hand back
zeros of the right shape, while masks, positions and everything else that follows from the inputs is made as always. At
the first layer the carried tensors are put in, and from there on all is real. At the first layer after the stage its
arguments are taken and the forward is left by an exception. The last stage runs to the end and returns HF's own output.

Hooks are put into the model once; a call costs a few dictionary look-ups a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmpipe_cli.errors import RankError
from llmpipe_cli.model.slicing.checkpointing import CheckpointingMode, layer_runner
from llmpipe_cli.model.slicing.cuts import find_glue
from llmpipe_cli.model.slicing.effects import captured_lengths, is_effect, leave_effect, read_effect
from llmpipe_cli.model.slicing.forward import forward_options
from llmpipe_cli.model.slicing.placeholders import MetaTwin, hide_foreign_parameters
from llmpipe_cli.model.slicing.plan import SideValue, SlicePlan
from llmpipe_cli.model.slicing.structure import CallArguments, build_result, get_at, put_at

SeedFunction = Callable[[int], None]


class _StageEnd(BaseException):
    """Leaves the model's forward where the stage ends. Not an `Exception`, so that no model code can swallow it."""

    def __init__(self, carry: tuple[Tensor, ...]) -> None:
        self.carry = carry


class StageReplay:
    """One stage of a sliced model as a function.

    Several replays may share one model; each acts only during its own calls.

    Args:
        model: the model; parameters of segments outside [start, stop) may be on meta, all buffers are real.
        plan: its slice plan.
        start: first segment of the stage.
        stop: the segment after its last.
        forward: what a call runs instead of the model's own forward: a part of it, such as its encoder.

    Attributes:
        seed_fn: called with a draw index whenever the randomness of another part begins. The index depends on the
            segment alone: twice its number for a segment's beginning, one more for what the forward does after its
            layer. Seeding by (seed, step, micro-batch, index) makes dropout independent of the layout.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: SlicePlan,
        start: int,
        stop: int,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        if not 0 <= start < stop <= plan.num_segments:
            raise ValueError(f"stage [{start}, {stop}) of {plan.num_segments} segments")
        self.model = model
        self.plan = plan
        self.start = start
        self.stop = stop
        self._forward = forward or model
        self.seed_fn: SeedFunction | None = None
        self._start_boundary = plan.boundaries[start - 1] if start else None
        self._stop_boundary = plan.boundaries[stop - 1] if stop < plan.num_segments else None
        self._sides_in = plan.sides_at(start)
        self._sides_out = plan.sides_at(stop)
        self._needs_fresh = any(item.kept for item in plan.carried_at(start)) or bool(self._sides_in)
        self._runner: Callable[..., Any] | None = None
        self._options: dict[str, Any] | None = None

        self._running = False
        self._inside_layer = False
        self._inside_glue = False
        self._live = False
        self._call = -1
        self._module_calls: dict[str, int] = {}
        self._carried: tuple[Tensor, ...] = ()
        self._side_values: dict[SideValue, Tensor] = {}
        self._install()

    def set_checkpointing(self, mode: CheckpointingMode) -> None:
        """Choose what the stage's layers keep for the backward pass (see `checkpointing`)."""
        self._runner = layer_runner(mode, self.model)

    def __call__(self, carry: tuple[Tensor, ...] | None, inputs: dict[str, Tensor]) -> Any:
        """Run the stage on one micro-batch.

        Args:
            carry: what boundary `start` carries, in plan order; None on the first stage.
            inputs: keyword arguments of the model's forward, the same on every stage.

        Returns:
            What boundary `stop` carries, a tuple of contiguous tensors; on the last stage the model's own output, with
            `loss` when the inputs hold labels.
        """
        num_carried = len(self.plan.carried_at(self.start))
        self._carried = tuple(carry[:num_carried]) if carry else ()
        self._side_values = dict(zip(self._sides_in, carry[num_carried:], strict=True)) if carry else {}
        self._call = -1
        self._module_calls.clear()
        self._live = self._start_boundary is None
        if self._options is None:
            self._options = forward_options(self.model, inputs) if self._forward is self.model else {}
        self._running = True
        try:
            if self._live:
                self._seed(0)
            output = self._forward(**inputs, **self._options)
        except _StageEnd as end:
            return end.carry
        finally:
            self._running = False
            self._inside_layer = self._inside_glue = False
            self._carried = ()
            self._side_values = {}
        if self._stop_boundary is not None:
            raise RankError("the model's forward ended before the stage's end was reached")
        return output

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _install(self) -> None:
        """Wrap the forward of every layer, and of the modules that are to be skipped or whose result is needed."""
        calls_of: dict[str, None] = {call.module: None for call in self.plan.calls}
        for name in calls_of:
            module = self.model.get_submodule(name)
            module.forward = self._wrap_layer(name, module.forward)
        self._results = [build_result(call.result) for call in self.plan.calls]
        self._effects = [[(item.path, build_result(item.value)) for item in call.effects] for call in self.plan.calls]
        wanted = {side.module for side in self.plan.sides if not side.is_layer}
        glue = find_glue(self.model, self.plan.layers)
        for name, module in glue.items():
            replicated = name in self.plan.replicated_modules
            if name in wanted or (self.start and not replicated):
                twin = MetaTwin(module) if self.start and not replicated else None
                module.forward = self._wrap_glue(name, module, module.forward, twin)
        hide_foreign_parameters(self.model, self.plan, self._device())

    def _device(self) -> torch.device:
        real = [tensor for tensor in (*self.model.parameters(), *self.model.buffers()) if not tensor.is_meta]
        return real[0].device if real else torch.device("cpu")

    def _wrap_layer(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call_layer(*args: Any, **kwargs: Any) -> Any:
            if not self._running or self._inside_layer:
                return forward(*args, **kwargs)
            self._call += 1
            call = self._call
            if call >= len(self.plan.calls) or self.plan.calls[call].module != name:
                raise RankError(f"layer {name} was called in another order than when the model was traced")
            stop = self._stop_boundary
            if stop is not None and stop.at == "call" and stop.call == call:
                raise _StageEnd(self._collect((args, kwargs)))
            if not self._live:
                start = self._start_boundary
                assert start is not None
                if start.call != call:
                    return self._skip_layer(call, (args, kwargs))
                if start.at == "return":
                    return self._enter_after_layer(call, (args, kwargs))
                args, kwargs = self._enter_layer((args, kwargs))
            return self._run_layer(call, forward, args, kwargs)

        return call_layer

    def _run_layer(self, call: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        segment = self.plan.calls[call].segment
        self._seed(2 * segment)
        self._inside_layer = True
        lengths = captured_lengths() if self._effects[call] else {}
        if self._runner is None or not torch.is_grad_enabled():
            result = forward(*args, **kwargs)
        else:
            result = self._runner(forward, *args, **kwargs)
        self._inside_layer = False
        for side in self._sides_out:
            if side.is_layer and side.call == call:
                self._side_values[side] = (
                    read_effect(side.path, (args, kwargs), lengths)
                    if is_effect(side.path)
                    else get_at(result, side.path)
                )
        stop = self._stop_boundary
        if stop is not None and stop.at == "return" and stop.call == call:
            raise _StageEnd(self._collect(result))
        self._seed(self._index_after(call))
        return result

    def _index_after(self, call: int) -> int:
        """Draw index of what follows a layer call: the next segment's own if one begins there."""
        following = self.plan.calls[call].segment + 1
        boundary = self.plan.boundaries[following - 1]
        return 2 * following if boundary.at == "return" else 2 * following - 1

    def _enter_layer(self, arguments: CallArguments) -> CallArguments:
        """The stage begins with this layer: put the carried tensors into its arguments."""
        assert self._start_boundary is not None
        for item, tensor in zip(self._start_boundary.carried, self._carried, strict=True):
            if item.kept:
                stand_in = get_at(arguments, item.path)
                if stand_in.shape != tensor.shape or stand_in.dtype != tensor.dtype:
                    raise RankError(f"a stand-in of shape {tuple(stand_in.shape)} awaits {tuple(tensor.shape)}")
                stand_in.copy_(tensor)  # in place: the forward that called the layer holds the same object
            else:
                arguments = put_at(arguments, item.path, tensor)
        self._live = True
        return arguments

    def _enter_after_layer(self, call: int, arguments: CallArguments) -> Any:
        """The stage begins where this layer returns: hand its carried results to the forward."""
        assert self._start_boundary is not None
        result = self._skip_layer(call, arguments)
        for item, tensor in zip(self._start_boundary.carried, self._carried, strict=True):
            result = put_at(result, item.path, tensor)
        self._live = True
        self._seed(self._index_after(call))
        return result

    def _skip_layer(self, call: int, arguments: CallArguments) -> Any:
        result = self._results[call](arguments, self._needs_fresh)
        for side, tensor in self._side_values.items():
            if side.is_layer and side.call == call and not is_effect(side.path):
                result = put_at(result, side.path, tensor.clone())
        if self._effects[call]:
            self._leave_effects(call, arguments)
        return result

    def _leave_effects(self, call: int, arguments: CallArguments) -> None:
        """Leave behind what a skipped layer would have: received side values, stand-ins for the rest."""
        for path, stand_in in self._effects[call]:
            value = stand_in(arguments, self._needs_fresh)
            for side, tensor in self._side_values.items():
                if side.is_layer and side.call == call and side.path[: len(path)] == path:
                    value = put_at(value, side.path[len(path) :], tensor.clone())
            leave_effect(path, value, arguments)

    def _wrap_glue(
        self, name: str, module: nn.Module, forward: Callable[..., Any], twin: MetaTwin | None
    ) -> Callable[..., Any]:
        wanted = any(side.module == name and not side.is_layer for side in self.plan.sides)
        foreign = any(parameter.is_meta for parameter in module.parameters())
        device = self._device()

        def call_glue(*args: Any, **kwargs: Any) -> Any:
            if not self._running or self._inside_layer or self._inside_glue:
                return forward(*args, **kwargs)
            number = self._module_calls.get(name, 0)
            self._module_calls[name] = number + 1
            if self._live:
                if foreign:
                    raise RankError(f"module {name} runs on a stage that does not own it")
                self._inside_glue = True
                result = forward(*args, **kwargs)
                self._inside_glue = False
            elif twin is not None:
                result = twin(device, args, kwargs)
            else:
                result = forward(*args, **kwargs)
            if wanted:
                result = self._exchange_sides(name, number, result)
            return result

        return call_glue

    def _exchange_sides(self, name: str, number: int, result: Any) -> Any:
        """Put received side values into a skipped module's result; keep those of a real one for the next stage."""
        if self._live:
            for side in self._sides_out:
                if side.module == name and side.call == number and not side.is_layer:
                    self._side_values.setdefault(side, get_at(result, side.path))
            return result
        for side, tensor in self._side_values.items():
            if side.module == name and side.call == number and not side.is_layer:
                result = put_at(result, side.path, tensor.clone())
        return result

    def _collect(self, nest: Any) -> tuple[Tensor, ...]:
        """What crosses the boundary at the stage's end."""
        assert self._stop_boundary is not None
        if not self._live:
            raise RankError("the stage's end was reached before its beginning")
        carried = [get_at(nest, item.path) for item in self._stop_boundary.carried]
        sides = [self._side_values[side] for side in self._sides_out]
        return tuple(tensor.contiguous() for tensor in (*carried, *sides))

    def _seed(self, index: int) -> None:
        if self.seed_fn is not None:
            self.seed_fn(index)
