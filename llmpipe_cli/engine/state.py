"""Optimizer state by Hugging Face parameter name, whichever way DeepSpeed keeps it.

Without ZeRO the optimizer holds whole tensors by parameter. Under ZeRO-1 (with or without bf16) it holds flat
partitions, and every parameter knows which fragment of it lies in this rank's partition (`_hp_mapping`). Both are
read and written here as slices: (parameter, key, start in the flattened parameter, values). The fp32 master weights of
a low-precision model are the key ``master``. State whose shape is not the parameter's (Adafactor's factors) is always
whole; scalars that all parameters share (AdamW's step) are kept apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llmpipe_cli.engine.pipeline import Engine
from llmpipe_cli.errors import CheckpointError
from llmpipe_cli.model.tensor.apply import PART
from llmpipe_cli.model.tensor.parts import Part

MASTER = "master"


@dataclass(frozen=True)
class StateSlice:
    """A piece of the state of one parameter.

    Attributes:
        parameter: Hugging Face name.
        key: state key, such as exp_avg.
        start: first element in the flattened state, of this tensor shard's part of the parameter.
        values: the elements, 1-D, or the whole state in its own shape when that is not the parameter's shape.
        part: which part of the parameter this tensor shard holds; none for all of it.
    """

    parameter: str
    key: str
    start: int
    values: torch.Tensor
    part: Part | None


ReadSlice = Callable[[str, str, int, int, Part | None], torch.Tensor]


def _named_parameters(engine: Engine) -> Iterator[tuple[str, Any]]:
    """Trainable parameters; `Any` because DeepSpeed hangs its own attributes on them."""
    names = engine.module.parameter_names
    for parameter in engine.module.parameters():
        if parameter.requires_grad and id(parameter) in names:
            yield names[id(parameter)], parameter


def _is_sharded(engine: Engine) -> bool:
    return engine.optimizer is not engine.basic_optimizer


def local_slices(engine: Engine) -> Iterator[StateSlice]:
    """What this rank has to save: without ZeRO only on the first replica; ties only on their first stage.

    Parameters that all tensor shards hold whole are saved by the first.
    """
    sharded, state = _is_sharded(engine), engine.basic_optimizer.state
    if not sharded and engine.grid.get_data_parallel_rank() != 0:
        return
    for name, parameter in _named_parameters(engine):
        part = getattr(parameter, PART, None)
        if parameter.ds_pipe_replicated or (part is None and engine.grid.get_slice_parallel_rank() != 0):
            continue
        if sharded:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            start = mapping.lp_fragment_address.start
            if parameter.dtype != torch.float32:  # an fp32 model's weights are its masters
                yield StateSlice(name, MASTER, start, mapping.hp_fragment.detach(), part)
            for key in _element_keys(engine, mapping.param_group_index):
                partition = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"][0]
                address = mapping.get_hp_fragment_address()
                values = state[partition][key].narrow(0, address.start, address.numel)
                yield StateSlice(name, key, start, values, part)
        else:
            for key, value in state.get(parameter, {}).items():
                if torch.is_tensor(value) and value.dim() > 0:
                    values = value.flatten() if value.shape == parameter.shape else value
                    yield StateSlice(name, key, 0, values, part)


def scalars(engine: Engine) -> dict[str, float]:
    """Scalar state that all parameters share, such as AdamW's step; empty before the first step."""
    for state in engine.basic_optimizer.state.values():
        return {
            key: float(value)
            for key, value in state.items()
            if isinstance(value, (int, float)) or (torch.is_tensor(value) and value.dim() == 0)
        }
    return {}


def scalar_state(group: dict[str, Any], parameter: torch.Tensor, shared: dict[str, float]) -> dict[str, torch.Tensor]:
    """Scalar state as torch's optimizers keep it: fused kernels read it on the parameter's device, others on the host.

    Args:
        group: the optimizer's parameter group.
        parameter: whose state it is.
        shared: what `scalars` gave.
    """
    device = parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
    return {key: torch.tensor(value, dtype=torch.float32, device=device) for key, value in shared.items()}


def restore(engine: Engine, keys: dict[str, set[str]], shared: dict[str, float], read: ReadSlice) -> None:
    """Fill this rank's optimizer with saved state.

    Args:
        engine: a fresh engine whose parameters hold the checkpoint's weights.
        keys: state keys saved for each parameter.
        shared: what `scalars` gave.
        read: returns the elements [start, start + count) of a part of a parameter's saved state, fp32, or all of it
            when count is -1; the part is None for the whole parameter.

    Raises:
        CheckpointError: a parameter has no saved state.
    """
    if _is_sharded(engine):
        _restore_partitions(engine, keys, shared, read)
        return
    state = engine.basic_optimizer.state
    for name, parameter in _named_parameters(engine):
        part = getattr(parameter, PART, None)
        entry = scalar_state(engine.basic_optimizer.param_groups[0], parameter, shared)
        for key in _saved_keys(keys, name, with_shared=bool(shared)) - {MASTER}:
            value = read(name, key, 0, -1, part)
            entry[key] = value.view(parameter.shape) if value.numel() == parameter.numel() else value
            entry[key] = entry[key].to(parameter.device)
        if MASTER in keys.get(name, ()):
            parameter.data.copy_(read(name, MASTER, 0, -1, part).view(parameter.shape))
        if entry:
            state[parameter] = entry


def _restore_partitions(engine: Engine, keys: dict[str, set[str]], shared: dict[str, float], read: ReadSlice) -> None:
    optimizer, state = engine.basic_optimizer, engine.basic_optimizer.state
    element_keys = set().union(*keys.values()) - {MASTER}
    for group in optimizer.param_groups:
        partition = group["params"][0]
        # A fresh ZeRO optimizer may already have stepped once over zeros to allocate its state.
        state[partition] = scalar_state(group, partition, shared)
        # Zeros where nothing was saved: a partition may hold padding or a placeholder alone.
        state[partition].update({key: torch.zeros_like(partition, requires_grad=False) for key in element_keys})
    for name, parameter in _named_parameters(engine):
        mapping = parameter._hp_mapping
        if mapping is None:
            continue
        partition = optimizer.param_groups[mapping.param_group_index]["params"][0]
        start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        address, part = mapping.get_hp_fragment_address(), getattr(parameter, PART, None)
        for key in _saved_keys(keys, name, with_shared=bool(shared)):
            if key == MASTER:
                mapping.hp_fragment.data.copy_(read(name, key, start, count, part))
                continue
            state[partition][key].narrow(0, address.start, address.numel).copy_(read(name, key, start, count, part))
        if MASTER not in keys.get(name, ()):
            mapping.hp_fragment.data.copy_(parameter.detach().flatten()[start : start + count])
    # DeepSpeed keeps views of the state; they are made anew at the next step.
    engine.optimizer._hp_optimizer_states_linked = False


def _saved_keys(keys: dict[str, set[str]], name: str, with_shared: bool) -> set[str]:
    if name not in keys and with_shared:
        raise CheckpointError(f"the checkpoint has no optimizer state for the parameter {name}")
    return keys.get(name, set())


def _element_keys(engine: Engine, group_index: int) -> list[str]:
    partition = engine.basic_optimizer.param_groups[group_index]["params"][0]
    state = engine.basic_optimizer.state.get(partition, {})
    return [key for key, value in state.items() if torch.is_tensor(value) and value.shape == partition.shape]
