"""Whole tensors out of shards, for saving."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.model.tensor.apply import PART
from llmpipe_cli.model.tensor.collectives import TensorGroup
from llmpipe_cli.model.tensor.parts import Part


def gather_whole(
    model: PreTrainedModel, plan: SlicePlan, names: Iterable[str], group: TensorGroup
) -> dict[str, Tensor]:
    """The tensors that this shard saves, whole; called by all shards of a stage.

    The stage's segments are dealt to the shards in turn, so that each shard holds about as much more for the time of
    saving as its own weights take. Divided tensors come to lie on the CPU.

    Args:
        model: the stage's skeleton.
        plan: its slice plan.
        names: first names of all parameters, and the names of all buffers, that the stage saves.
        group: the shards.
    """
    owners = plan.owners
    segments = {name: plan.buffers[name] if name in plan.buffers else owners[name][0] for name in names}
    turns = {segment: turn % group.size for turn, segment in enumerate(sorted(set(segments.values())))}
    tensors: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    result: dict[str, Tensor] = {}
    for name, segment in segments.items():
        saver = turns[segment]
        tensor = tensors[name]
        part = getattr(tensor, PART, None)
        whole = _gather(tensor.detach(), part, saver, group) if part is not None else tensor
        if saver == group.rank:
            assert whole is not None
            result[name] = whole
    return result


def _gather(shard: Tensor, part: Part, saver: int, group: TensorGroup) -> Tensor | None:
    """The whole tensor on shard `saver`, None on the others."""
    parts = [part.of_shard(number, group.size) for number in range(group.size)]
    sizes = [math.prod(each.local_shape) for each in parts]
    flat = torch.nn.functional.pad(shard.flatten(), (0, max(sizes) - shard.numel()))
    everyone = [torch.empty_like(flat) for _ in parts] if saver == group.rank else None
    dist.gather(flat, everyone, dist.get_global_rank(group.process_group, saver), group.process_group)
    if everyone is None:
        return None
    whole = torch.empty(part.shape, dtype=shard.dtype)
    for each, size, values in zip(parts, sizes, everyone, strict=True):
        each.put(whole, values[:size].cpu())
    return whole
