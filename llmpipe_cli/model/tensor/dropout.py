"""Dropout inside divided layers with the masks that one process would draw.

Each shard draws the mask of the whole tensor from the same seed and keeps its own part. So the random state stays the
same on all shards, and a run with dropout does not depend on the number of shards. Fused attention draws inside its
kernel; with dropout it is computed step by step instead, as torch does on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmpipe_cli.model.tensor.collectives import TensorGroup
from llmpipe_cli.model.tensor.parts import Part, share


def with_whole_masks(module: nn.Module, plain: Callable[..., Any], group: TensorGroup) -> Callable[..., Any]:
    """The forward of a module that owns divided layers, with dropout between them drawn whole."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not module.training:
            return plain(*args, **kwargs)
        outer, group.region = group.region, None
        try:
            with _WholeMasks(group):
                return plain(*args, **kwargs)
        finally:
            group.region = outer

    return forward


def adapter_dropout(dropout: nn.Dropout, part: Part | None, group: TensorGroup) -> Callable[[Tensor], Tensor]:
    """The forward of the dropout before an adapter, with the mask that one process would draw for the whole input.

    Args:
        dropout: the layer.
        part: of A, if it is divided: which columns of the whole input the shard has.
        group: the shards.
    """

    def forward(inputs: Tensor) -> Tensor:
        if not dropout.training or dropout.p == 0:
            return inputs
        outer, group.region = group.region, None
        try:
            if part is None:
                return F.dropout(inputs, dropout.p)
            ones = torch.ones(*inputs.shape[:-1], part.shape[part.dim], dtype=inputs.dtype, device=inputs.device)
            mask = F.dropout(ones, dropout.p)
            return inputs * Part(tuple(mask.shape), mask.dim() - 1, part.ranges).take(mask)
        finally:
            group.region = outer

    return forward


class _WholeMasks(TorchFunctionMode):
    def __init__(self, group: TensorGroup) -> None:
        super().__init__()
        self._group = group

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._group.region is not None and func in _ANSWERED:
            region, self._group.region = self._group.region, None
            try:
                return getattr(self, _ANSWERED[func])(region, *args, **(kwargs or {}))
            finally:
                self._group.region = region
        return func(*args, **(kwargs or {}))

    def _dropout(
        self, region: Part, values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return values
        return values * self._mask(region, values, p)

    def _mask(self, region: Part, tensor: Tensor, p: float) -> Tensor:
        """This shard's part of the mask: of the heads [batch, heads, ...], else of the last dimension."""
        group = self._group
        if tensor.dim() == 4:
            dim, size = 1, tensor.shape[1] * group.size
        else:
            dim, size = tensor.dim() - 1, region.shape[region.dim] // len(region.ranges)
        start, stop = share(size, group.rank, group.size)
        shape = [*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]]
        whole = F.dropout(torch.ones(shape, dtype=tensor.dtype, device=tensor.device), p)
        return whole.narrow(dim, start, stop - start)

    def _attention(
        self,
        region: Part,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p == 0:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        factor = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        scores = (query * factor) @ (key * factor).transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights = scores.softmax(-1)
        return (weights * self._mask(region, weights, dropout_p)) @ value


_ANSWERED = {F.dropout: "_dropout", F.scaled_dot_product_attention: "_attention"}
