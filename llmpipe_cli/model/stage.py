"""Building what one pipeline stage holds: the whole model's skeleton with only the stage's own parameters real."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmpipe_cli.model.adapters import Adapters, attach, draw_adapter, read_adapter_weights
from llmpipe_cli.model.initialise import initialise
from llmpipe_cli.model.skeleton import FIRST_VALUE, all_names, build_skeleton, replace_parameter
from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.model.tensor.apply import Division, fill_parts, mark
from llmpipe_cli.model.tensor.parts import Part
from llmpipe_cli.model.weights import read_weights


def stage_parameters(plan: SlicePlan, segments: Iterable[int]) -> list[str]:
    """Names of the parameters that these segments use, in order of first use.

    A tied parameter is in the list of every stage that uses it. Replicated tables (`plan.replicated`), which are never
    trained, are in the list of their first stage only, although every stage holds them.
    """
    return list(dict.fromkeys(name for index in segments for name in plan.segments[index].parameters))


def saved_names(plan: SlicePlan, segments: Collection[int]) -> list[str]:
    """Names of the parameters and buffers that a stage of these segments saves; over all stages each comes once."""
    owners = plan.owners
    parameters = [name for name in stage_parameters(plan, segments) if owners[name][0] in segments]
    return parameters + [name for name, segment in plan.buffers.items() if segment in segments]


def build_stage(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    plan: SlicePlan,
    segments: Iterable[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int | None = None,
    weights: str | Path | None = None,
    attn_implementation: str = "auto",
    adapters: Adapters | None = None,
    adapter_weights: str | Path | None = None,
    trainable: Collection[str] | None = None,
    allow_pickle: bool = False,
    division: Division | None = None,
) -> PreTrainedModel:
    """The model with the parameters of these segments and all buffers real on `device`, the rest on meta.

    Memory: the stage's own parameters, and while loading at most one fused parameter's sources besides; with tensor
    shards the shard's parts, and while loading at most one segment's whole parameters besides.

    Args:
        seed: weights from scratch, drawn from this seed; with `weights` it draws what the files do not contain.
        weights: model directory to read from.
        adapters: LoRA adapters to put into the model; `plan` knows them (`adapters.extend_plan`).
        adapter_weights: directory of adapters to read; without it they are drawn from `seed`.
        trainable: names of the parameters that learn; None means all.
        allow_pickle: read pytorch_model.bin too.
        division: what this tensor shard holds, of the adapters too; None without tensor shards.

    Raises:
        UsageError, CheckpointError: see `build_skeleton`, `initialise` and `read_weights`.
    """
    model = build_skeleton(cls, config, dtype=dtype, attn_implementation=attn_implementation)
    added = set(adapters.names) if adapters is not None else set()
    own = dict.fromkeys([*stage_parameters(plan, segments), *plan.replicated])
    names = [name for name in own if name not in added]
    groups = all_names(model)

    def fill(names: list[str]) -> None:
        if weights is not None:
            read_weights(model, names, weights, device=device, seed=seed or 0, allow_pickle=allow_pickle)
            return
        for name in names:
            make_real(model, groups[name], device)
        if seed is not None:
            initialise(model, names, seed)

    if division is None:
        fill(names)
    else:
        one_by_one = [[name] for name in names]
        fill_parts(model, one_by_one if weights is None else _by_segment(plan, names), division, fill)
        mark(model, division, names)
    if adapters is not None:
        parts = division.parts if division is not None else {}
        new = [name for name in own if name in added]
        _add_adapters(model, adapters, new, parts, device, None if adapter_weights is not None else seed or 0)
        if adapter_weights is not None:
            read = [*new, *(name for name in names if name in adapters.saved)]
            read_adapter_weights(model, read, Path(adapter_weights), parts)
        if division is not None:
            mark(model, division, new)
    if trainable is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
    _move_tensors(model, torch.device(device))
    for name in (*plan.replicated, *plan.unused):
        model.get_parameter(name).requires_grad_(False)
    for parameter in model.parameters():
        parameter.__dict__.pop(FIRST_VALUE, None)
    return model


def _by_segment(plan: SlicePlan, names: list[str]) -> list[list[str]]:
    """The names in groups, by the first segment that uses them."""
    owners = plan.owners
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(owners[name][0], []).append(name)
    return list(groups.values())


def _add_adapters(
    model: PreTrainedModel,
    adapters: Adapters,
    own: list[str],
    parts: Mapping[str, Part],
    device: torch.device | str,
    seed: int | None,
) -> None:
    """Put all adapters into the model and make the stage's own ones real; with a seed, draw their values."""
    attach(model, adapters)
    for name in own:
        make_real(model, (name,), device)
        if seed is not None:
            draw_adapter(name, model.get_parameter(name), seed, parts.get(name))


def make_real(model: PreTrainedModel, names: tuple[str, ...], device: torch.device | str) -> None:
    """Replace a meta parameter by an uninitialised real one, under all its names."""
    meta = model.get_parameter(names[0])
    parameter = nn.Parameter(torch.empty_like(meta, device=device), requires_grad=meta.requires_grad)
    parameter.__dict__.update(meta.__dict__)
    replace_parameter(model, names, parameter)


def _move_tensors(model: PreTrainedModel, device: torch.device) -> None:
    """Buffers and tensors kept as plain attributes go to the device."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(device)
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and not value.is_meta:
                setattr(module, name, value.to(device))
