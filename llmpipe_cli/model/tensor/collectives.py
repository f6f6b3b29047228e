"""The communication between tensor shards that autograd can pass through.

Outside the divided layers all shards hold the same values and the same gradients. Four functions lead in and out:

    copy     values stay, gradients are summed     before a layer that is divided by columns
    reduce   values are summed, gradients stay     after a layer that is divided by rows
    gather   values are joined, gradients are cut  where the whole result of a divided layer is needed
    split    values are cut, gradients are joined  where a layer divided by rows gets a whole input
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmpipe_cli.model.tensor.parts import Part, share


class TensorGroup:
    """The ranks that share one stage of one replica.

    Args:
        process_group: their process group.

    Attributes:
        rank: number of this shard.
        size: number of shards.
        region: the part of the layer divided by columns whose results are at work; None outside of divided layers.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.region: Part | None = None
        self._last_copy: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the shards, in place."""
        dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """Elementwise largest over the shards, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.process_group)
        return tensor

    def join(self, tensor: Tensor, size: int) -> Tensor:
        """The shards' tensors side by side in the last dimension, `size` wide; each has its `share` of it."""
        widest = -(-size // self.size)
        padded = torch.nn.functional.pad(tensor, (0, widest - tensor.shape[-1])).contiguous()
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(everyone, padded, group=self.process_group)
        spans = [share(size, shard, self.size) for shard in range(self.size)]
        return torch.cat([part[..., : stop - start] for part, (start, stop) in zip(everyone, spans, strict=True)], -1)

    def own(self, tensor: Tensor) -> Tensor:
        """This shard's share of the last dimension."""
        start, stop = share(tensor.shape[-1], self.rank, self.size)
        return tensor[..., start:stop].contiguous()

    # -- with gradients ------------------------------------------------------------------------------------------------

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values; their gradients are summed over the shards.

        Layers that read one tensor after each other (queries, keys and values) share one copy, so that their gradients
        are summed here first and travel once.
        """
        if not torch.is_grad_enabled() or not tensor.requires_grad:
            return tensor
        if self._last_copy is not None and self._last_copy[0]() is tensor:
            last = self._last_copy[1]()
            if last is not None:
                return last
        copied = _Copy.apply(tensor, self)
        self._last_copy = weakref.ref(tensor), weakref.ref(copied)
        return copied

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the shards."""
        return _Reduce.apply(tensor, self)

    def gather(self, tensor: Tensor, size: int) -> Tensor:
        """`join` with gradients."""
        return _Gather.apply(tensor, size, self)

    def split(self, tensor: Tensor) -> Tensor:
        """`own` with gradients."""
        return _Split.apply(tensor, self)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(gradient.clone(memory_format=torch.contiguous_format)), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TensorGroup) -> Tensor:
        return group.sum(tensor.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, size: int, group: TensorGroup) -> Tensor:
        ctx.group = group
        return group.join(tensor, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.own(gradient), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TensorGroup) -> Tensor:
        ctx.group, ctx.size = group, tensor.shape[-1]
        return group.own(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.join(gradient.contiguous(), ctx.size), None
