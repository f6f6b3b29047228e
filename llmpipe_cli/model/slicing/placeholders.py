"""Stand-ins for what a stage does not own, outside the layers.

HF's forward runs from its beginning on every stage. Modules before the stage's first layer whose weights live elsewhere
are called on the meta device, which gives the shapes of their results without weights and without work; the results
handed back are zeros. Where the forward reads such a weight directly, it finds zeros that take no memory.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from llmpipe_cli.model.slicing.cuts import find_around
from llmpipe_cli.model.slicing.plan import SlicePlan


class MetaTwin:
    """A copy of a module on the meta device, called for the shapes of its results."""

    def __init__(self, module: nn.Module) -> None:
        tensors = [*module.parameters(), *module.buffers()]
        memo: dict[int, Any] = {id(tensor): _meta_copy(tensor) for tensor in tensors}
        for part in module.modules():  # neither other stages' hooks nor stand-in weights belong into the copy
            for name in ("forward", *part._parameters):
                if name in part.__dict__:
                    memo[id(part.__dict__[name])] = None
        self._twin = copy.deepcopy(module, memo)
        for part in self._twin.modules():
            for name in ("forward", *part._parameters):
                part.__dict__.pop(name, None)

    def __call__(self, device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Zeros on `device` in the form and shapes of the module's result."""
        args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
        with torch.no_grad():
            result = self._twin(*args, **kwargs)
        return tree_map_only(Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype, device=device), result)


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def _meta_copy(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def hide_foreign_parameters(model: nn.Module, plan: SlicePlan, device: torch.device) -> None:
    """Let the forward read zeros where it reads a parameter outside the layers that is on meta.

    The parameters themselves stay registered as they are; only attribute access on their module finds the zeros.
    """
    for module in find_around(model, plan.layers).values():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                module.__dict__[name] = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
