"""Which modules of a model are its layers, and which parametric modules stand between them.

transformers marks the layers of almost every architecture: each is a `GradientCheckpointingLayer` in a `ModuleList`.
Where a model marks none, its largest `ModuleList` is taken. Where a layer is to be split, the modules that its forward
calls stand for it: norms, attention, MLP.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from llmpipe_cli.errors import UsageError


def find_layers(model: nn.Module, split: Collection[str] = ()) -> dict[str, str]:
    """Name of the stack (the ModuleList) of every layer, by the layer's module name, in module order.

    Args:
        model: the model.
        split: layers in whose place their `inner_modules` are given.

    Raises:
        UsageError: the model has no list of layers.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    stacks = [
        name
        for name, modules in lists.items()
        if all(isinstance(module, GradientCheckpointingLayer) for module in modules)
    ]
    if not stacks and lists:
        stacks = [max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))]
    if not stacks:
        raise UsageError(f"{type(model).__name__} has no list of layers to cut at")
    outermost = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    layers = {f"{stack}.{index}": stack for stack in outermost for index in range(len(lists[stack]))}
    return {
        name: stack
        for layer, stack in layers.items()
        for name in (inner_modules(model, layer) if layer in split else (layer,))
    }


def inner_modules(model: nn.Module, layer: str) -> list[str]:
    """Names of a layer's children that have parameters; of a list of modules, which is never called, its own ones."""
    found: list[str] = []
    for name, child in model.get_submodule(layer).named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += inner_modules(model, f"{layer}.{name}")
        elif next(child.parameters(), None) is not None:
            found.append(f"{layer}.{name}")
    return found


def find_glue(model: nn.Module, layers: dict[str, str] | tuple[str, ...]) -> dict[str, nn.Module]:
    """Modules with parameters of their own that are neither in a layer nor around one (embeddings, norms, heads)."""

    def related_to_layer(name: str) -> bool:
        return any(layer.startswith(f"{name}.") or f"{name}.".startswith(f"{layer}.") for layer in layers)

    return {
        name: module
        for name, module in model.named_modules()
        if name and next(module.parameters(recurse=False), None) is not None and not related_to_layer(name)
    }


def find_around(model: nn.Module, layers: dict[str, str] | tuple[str, ...]) -> dict[str, nn.Module]:
    """All modules outside the layers that have parameters of their own: glue, and the modules around the layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
        and not any(f"{name}.".startswith(f"{layer}.") for layer in layers)
    }
