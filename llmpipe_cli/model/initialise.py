"""Weights from scratch that do not depend on the layout.

Each parameter is drawn alone, by transformers' own rules for its module, from a seed made of the run's seed and the
parameter's name. So a stage draws what the whole model would have drawn, whatever else it holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.skeleton import FIRST_VALUE, protected, responsible_model


def parameter_seed(seed: int, name: str) -> int:
    """Seed of one parameter, in [0, 2**63)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def initialise(model: PreTrainedModel, names: Iterable[str], seed: int) -> None:
    """Fill parameters with the values that transformers' initialisation gives them.

    The same on every layout, for one kind of device.

    Args:
        model: the model; the named parameters are real, others may be on meta and stay untouched.
        names: first names of the parameters to fill.
        seed: the run's seed.

    Raises:
        UsageError: transformers has no rule for a parameter.
    """
    names = list(names)
    places = {model.get_parameter(name).device for name in names}
    # No others: even to look at one takes memory of an accelerator that this process may have nothing to do with.
    devices = [place.index for place in places if place.type == "cuda"]
    tensors = iter([*model.parameters(), *model.buffers()])
    with protected(tensors), torch.no_grad(), torch.random.fork_rng(devices=devices):
        for name in names:
            _initialise_one(model, name, parameter_seed(seed, name))


def _initialise_one(model: PreTrainedModel, name: str, seed: int) -> None:
    """Run the rules of the parameter's module and then of all modules around it, which may overwrite the first."""
    parameter = model.get_parameter(name)
    first_value = getattr(parameter, FIRST_VALUE, None)
    if parameter.is_floating_point():
        parameter.fill_(float("nan"))  # to see whether a rule has filled it
    delattr(parameter, "_is_hf_initialized")
    torch.manual_seed(seed)
    for module_name in _around(name):
        module = model.get_submodule(module_name)
        responsible_model(model, module_name)._init_weights(module)
    if parameter.is_floating_point() and bool(parameter.isnan().any()):
        module = model.get_submodule(name.rpartition(".")[0])
        _fall_back(module, parameter, first_value, name)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def _fall_back(module: nn.Module, parameter: nn.Parameter, first_value: torch.Tensor | None, name: str) -> None:
    """No rule: take the module's own, else what the constructor had given."""
    if isinstance(module, Conv1D):  # initialises itself in its constructor, without the model's rules
        parameter.zero_() if parameter.dim() == 1 else parameter.normal_(std=0.02)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()
    elif first_value is not None:
        parameter.copy_(first_value)
    if bool(parameter.isnan().any()):
        raise UsageError(
            f"transformers does not say how to initialise {name}", hint="start from pretrained weights (model.from)"
        )


def _around(name: str) -> list[str]:
    """Names of the modules around a parameter, innermost first, the model itself ("") last."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
