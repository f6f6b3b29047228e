"""Weight gradients of linear layers, computed later than the gradients of their inputs.

The backward pass of a linear layer has two halves. The gradient of its input is what the previous stage waits for;
the gradient of its weight is needed only by the optimizer. Zero-bubble schedules (Qi et al. 2023) run the second half
where a stage would otherwise wait. So the linear layers of a stage get a forward whose backward pass computes the
first half and notes what the second needs; a later instruction computes it. Where nothing is gained by waiting the
second half follows at once, while what it needs is still in the caches, and adds to the gradient inside its product.

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
        at_once: compute them in the backward pass itself. Heeded only with `direct`, since hooks need a backward pass
            of their own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.direct = False
        self.at_once = False
        self.num_layers = 0
        self._pending: Pending = []
        for module in model.modules():
            if type(module) in (nn.Linear, Conv1D) and not module.weight.is_meta and module.weight.requires_grad:
                module.forward = functools.partial(_forward, module, self, module.forward)
                self.num_layers += 1

    def take(self) -> Pending:
        """What the backward passes since the last call have postponed."""
        taken = self._pending.copy()
        self._pending.clear()
        return taken

    def note(self, product: _Product) -> None:
        """Compute a product now, or keep it for later."""
        if self.direct and self.at_once:
            _add(product.weight, *_factors(product))
            if product.bias is not None and product.bias.requires_grad:
                _accumulate(product.bias, _bias_gradient(product))
        else:
            self._pending.append(product)

    def compute(self, pending: Pending) -> None:
        """Compute postponed gradients and accumulate them as autograd would; empties `pending`."""
        parameters: list[nn.Parameter] = []
        gradients: list[Tensor] = []
        with torch.no_grad():
            while pending:
                product = pending.pop()
                if self.direct:
                    _add(product.weight, *_factors(product))
                else:
                    left, right = _factors(product)
                    parameters.append(product.weight)
                    gradients.append(left @ right)
                if product.bias is not None and product.bias.requires_grad:
                    parameters.append(product.bias)
                    gradients.append(_bias_gradient(product))
        if parameters:
            # Backward on the parameters themselves runs their accumulation, with every hook that waits on it.
            torch.autograd.backward(parameters, gradients)


def _factors(product: _Product) -> tuple[Tensor, Tensor]:
    """What the weight's gradient is the matrix product of."""
    rows = product.input.reshape(-1, product.input.shape[-1])
    gradient_rows = product.output_gradient.reshape(-1, product.output_gradient.shape[-1])
    return (rows.t(), gradient_rows) if product.input_first else (gradient_rows.t(), rows)


def _bias_gradient(product: _Product) -> Tensor:
    return product.output_gradient.reshape(-1, product.output_gradient.shape[-1]).sum(0)


def _add(parameter: nn.Parameter, left: Tensor, right: Tensor) -> None:
    """Add left @ right to the parameter's gradient."""
    if parameter.grad is not None:
        parameter.grad.addmm_(left, right)
    else:
        parameter.grad = left @ right


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
    else:
        parameter.grad = gradient


def _forward(layer: Any, keeper: WeightGradients, plain: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or not inputs.requires_grad:
        return plain(inputs)
    return _PostponedLinear.apply(inputs, layer, keeper, plain)


class _PostponedLinear(torch.autograd.Function):
    """A linear layer whose backward pass gives the gradient of its input only."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, layer: Any, keeper: WeightGradients, plain: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        # The weight is kept aside from the saved tensors: checkpointing hands those back as new objects.
        ctx.layer, ctx.keeper = layer, keeper
        return plain(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inputs,) = ctx.saved_tensors
        layer, input_first = ctx.layer, isinstance(ctx.layer, Conv1D)
        ctx.keeper.note(_Product(layer.weight, layer.bias, inputs, output_gradient, input_first))
        return output_gradient @ (layer.weight.t() if input_first else layer.weight), None, None, None
