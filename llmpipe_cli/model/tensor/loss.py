"""Cross entropy over a vocabulary that is divided over tensor shards.

transformers' own loss functions run as they are, with their shifting, masking and averaging; only the call of
`cross_entropy` inside them is answered here, from this shard's columns of the logits and three numbers a token that
the shards exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmpipe_cli.errors import RankError
from llmpipe_cli.model.tensor.collectives import TensorGroup
from llmpipe_cli.model.tensor.parts import Part


def parallel_loss(plain: Callable[..., Tensor], part: Part, group: TensorGroup) -> Callable[..., Tensor]:
    """A model's `loss_function` for logits that hold this shard's part of the vocabulary, or all of it.

    Args:
        plain: the model's own loss function.
        part: the shard's part of the head's weight [vocabulary, hidden].
        group: the shards.
    """
    local_size = part.local_shape[0]

    def loss(logits: Tensor, labels: Tensor, vocab_size: int | None = None, **options: Any) -> Tensor:
        if logits.shape[-1] != local_size:
            return plain(logits=logits, labels=labels, vocab_size=vocab_size, **options)
        with _AnswerCrossEntropy(part.ranges[0][0], group):
            return plain(logits=logits, labels=labels, vocab_size=local_size, **options)

    return loss


class _AnswerCrossEntropy(TorchFunctionMode):
    def __init__(self, first: int, group: TensorGroup) -> None:
        super().__init__()
        self._first, self._group = first, group

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.cross_entropy:
            return self._cross_entropy(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _cross_entropy(
        self, logits: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean", **others: Any
    ) -> Tensor:
        if any(others.values()) or logits.dim() != 2:
            raise RankError("this model's loss cannot be computed from a part of the vocabulary")
        losses: Tensor = _CrossEntropy.apply(logits, target, self._first, ignore_index, self._group)
        if reduction == "none":
            return losses
        return losses.sum() / (target != ignore_index).sum() if reduction == "mean" else losses.sum()


class _CrossEntropy(torch.autograd.Function):
    """Negative log-likelihood of each row [rows] from this shard's logits [rows, part of the vocabulary]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, first: int, ignored: int, group: TensorGroup) -> Tensor:
        highest = group.largest(logits.amax(-1))
        shifted = logits - highest.unsqueeze(-1)
        index = target - first
        inside = (index >= 0) & (index < logits.shape[-1]) & (target != ignored)
        index = index.masked_fill(~inside, 0).unsqueeze(-1)
        own_score = shifted.gather(-1, index).squeeze(-1) * inside
        weights = shifted.exp_()
        total, score = group.sum(torch.stack([weights.sum(-1), own_score])).unbind()
        weights /= total.unsqueeze(-1)
        counted = target != ignored
        ctx.save_for_backward(weights, index, inside, counted)
        return (total.log() - score) * counted

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        weights, index, inside, counted = ctx.saved_tensors
        result = weights.scatter_add(-1, index, -inside.to(weights.dtype).unsqueeze(-1))
        return result * (gradient * counted).unsqueeze(-1), None, None, None, None
