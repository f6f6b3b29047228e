"""Weight gradients of linear layers, computed later than the gradients of their inputs.

The backward pass of a linear layer has two halves. The gradient of its input is what the previous stage waits for;
the gradient of its weight is needed only by the optimizer. Zero-bubble schedules (Qi et al. 2023) run the second half
where a stage would otherwise wait. So the linear layers of a stage get a forward whose backward pass computes the
first half and notes what the second needs; a later instruction computes it.

This covers `nn.Linear` and transformers' `Conv1D`. Weights of all other layers (norms, embeddings, fused experts) get
their gradients with the first half.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D


class _Product(NamedTuple):
    """What the gradients of one call of a layer are made of."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    input: Tensor
    output_gradient: Tensor
    input_first: bool  # the weight is [in, out], as Conv1D has it, instead of [out, in]


Pending = list[_Product]


class WeightGradients:
    """Collects postponed weight gradients of one stage and computes them when asked.

    Args:
        model: the stage's model; its linear layers get their forward replaced. Layers on meta, frozen ones and
            subclasses with a forward of their own stay as they are.

    Attributes:
        num_layers: layers whose weight gradients are postponed.
        direct: add to `.grad` inside the matrix product. Right only where no hook of an optimizer waits for gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.direct = False
        self.num_layers = 0
        self._pending: Pending = []
        for module in model.modules():
            if type(module) in (nn.Linear, Conv1D) and not module.weight.is_meta and module.weight.requires_grad:
                module.forward = functools.partial(_forward, module, self._pending, module.forward)
                self.num_layers += 1

    def take(self) -> Pending:
        """What the backward passes since the last call have postponed."""
        taken = self._pending.copy()
        self._pending.clear()
        return taken

    def compute(self, pending: Pending) -> None:
        """Compute postponed gradients and accumulate them as autograd would; empties `pending`."""
        parameters: list[nn.Parameter] = []
        gradients: list[Tensor] = []
        with torch.no_grad():
            while pending:
                weight, bias, inputs, output_gradient, input_first = pending.pop()
                rows = inputs.reshape(-1, inputs.shape[-1])
                gradient_rows = output_gradient.reshape(-1, output_gradient.shape[-1])
                left, right = (rows, gradient_rows) if input_first else (gradient_rows, rows)
                if self.direct and weight.grad is not None:
                    weight.grad.addmm_(left.t(), right)
                elif self.direct:
                    weight.grad = left.t() @ right
                else:
                    parameters.append(weight)
                    gradients.append(left.t() @ right)
                if bias is not None and bias.requires_grad:
                    parameters.append(bias)
                    gradients.append(gradient_rows.sum(0))
        if parameters:
            # Backward on the parameters themselves runs their accumulation, with every hook that waits on it.
            torch.autograd.backward(parameters, gradients)


def _forward(layer: Any, pending: Pending, plain: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or not inputs.requires_grad:
        return plain(inputs)
    return _PostponedLinear.apply(inputs, layer, pending, plain)


class _PostponedLinear(torch.autograd.Function):
    """A linear layer whose backward pass gives the gradient of its input only."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: Any, pending: Pending, plain: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(inputs)
        # The weight is kept aside from the saved tensors: checkpointing hands those back as new objects.
        ctx.layer, ctx.pending = layer, pending
        return plain(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inputs,) = ctx.saved_tensors
        layer, input_first = ctx.layer, isinstance(ctx.layer, Conv1D)
        ctx.pending.append(_Product(layer.weight, layer.bias, inputs, output_gradient, input_first))
        return output_gradient @ (layer.weight.t() if input_first else layer.weight), None, None, None
