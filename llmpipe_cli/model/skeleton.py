"""The whole model without its weights: every parameter on the meta device, every buffer real.

Parameters are sent to meta one by one while the model's own constructor runs, so that buffers and other tensors are
computed as always. Large tensors are made on meta at once; of the others no more than one is reserved at a time.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.core_model_loading import build_glob_alternation

from llmpipe_cli.errors import UsageError

FIRST_VALUE = "_llmpipe_first_value"
"""Attribute of a meta parameter with the value that the constructor gave it; for small parameters only."""

_MAX_FIRST_VALUE_ELEMENTS = 2**14
_MAX_EMPTY_ELEMENTS = 2**22
_MAX_FILLED_ELEMENTS = 2**26
_FILLED = {torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}


def build_skeleton(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "auto",
) -> PreTrainedModel:
    """Construct `cls` with parameters of `dtype` on meta and real buffers on the CPU, in training mode.

    Ties are in place. `config` is copied.

    Raises:
        UsageError: the constructor does not accept the config.
    """
    config = copy.deepcopy(config)
    options: dict[str, Any] = {} if attn_implementation == "auto" else {"attn_implementation": attn_implementation}
    try:
        with initialization.no_init_weights(), _parameters_to_meta(), _LargeTensorsOnMeta():
            model = cls._from_config(config, dtype=dtype, **options)
    except (ValueError, TypeError, AttributeError, KeyError, ImportError, RuntimeError, IndexError) as error:
        raise UsageError(
            f"{cls.__name__} cannot be built from the config: {error}", hint="check the fields of model.config"
        ) from error
    model.tie_weights()
    _initialise_buffers(model)
    _keep_buffers_in_fp32(model, dtype)
    return model.train()


@contextlib.contextmanager
def _parameters_to_meta() -> Iterator[None]:
    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        meta = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        meta.__dict__.update(parameter.__dict__)
        if parameter.numel() <= _MAX_FIRST_VALUE_ELEMENTS:
            setattr(meta, FIRST_VALUE, parameter.detach())
        return meta

    handle = register_module_parameter_registration_hook(cast("Any", to_meta))
    try:
        yield
    finally:
        handle.remove()


class _LargeTensorsOnMeta(TorchFunctionMode):
    """Makes large tensors on meta at once: a single fused expert weight can exceed this machine's memory.

    Only parameters are that large: uninitialised tensors from 4 million elements on, filled ones from 67 million on.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty or func in _FILLED:
            limit = _MAX_EMPTY_ELEMENTS if func is torch.empty else _MAX_FILLED_ELEMENTS
            size = func(*args, **{**kwargs, "device": "meta"})
            if size.numel() > limit:
                return size
        return func(*args, **kwargs)


def _initialise_buffers(model: PreTrainedModel) -> None:
    """Give buffers the values that transformers' own initialisation computes for them."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # made in the likeness of a parameter
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    with protected(model.parameters()), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, module in model.named_modules():
            if next(module.buffers(recurse=False), None) is not None:
                responsible_model(model, name)._init_weights(module)


def _keep_buffers_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Buffers that `from_pretrained` keeps in fp32 whatever the dtype: a router's selection bias loses tokens in bf16.

    Parameters that it keeps so stay in `dtype`: DeepSpeed's fp16 and bf16 optimizers know one dtype, and hold fp32
    masters of all.
    """
    patterns = list(model._get_dtype_plan(dtype))
    if not patterns:
        return
    kept, _, _ = build_glob_alternation(patterns)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_floating_point() and kept.search(name):
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffer.float()


@contextlib.contextmanager
def protected(tensors: Iterator[Tensor]) -> Iterator[None]:
    """Keep transformers' initialisation away from `tensors`."""
    marked = [tensor for tensor in tensors if not hasattr(tensor, "_is_hf_initialized")]
    for tensor in marked:
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    try:
        with initialization.guard_torch_init_functions():
            yield
    finally:
        for tensor in marked:
            if hasattr(tensor, "_is_hf_initialized"):
                del tensor._is_hf_initialized


def responsible_model(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost transformers model around module `name` (itself included): its rules initialise the module."""
    parts = name.split(".") if name else []
    for length in range(len(parts), 0, -1):
        candidate = model.get_submodule(".".join(parts[:length]))
        if isinstance(candidate, PreTrainedModel):
            return candidate
    return model


def replace_parameter(model: nn.Module, names: tuple[str, ...], parameter: nn.Parameter) -> None:
    """Register one parameter under several names."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)


def all_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of each parameter, itself first, by its first name."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {group[0]: tuple(group) for group in groups.values()}
