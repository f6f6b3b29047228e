"""The loss of a micro-batch: the model's own, or a smoothed cross entropy over the same targets."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from llmpipe_cli.engine.executor import LossFunction, MicroBatch
from llmpipe_cli.errors import UsageError

_IGNORED = -100


def make_loss(task: str, label_smoothing: float) -> LossFunction:
    """Loss of one micro-batch from the model's output and inputs: a scalar, the mean over its targets, in nats.

    Args:
        task: the recipe's task; decides whether logits are shifted against labels.
        label_smoothing: probability mass spread evenly over all classes (Szegedy et al. 2016); 0 takes the model's own
            loss.
    """

    def own_loss(output: Any, batch: MicroBatch) -> torch.Tensor:
        if output.loss is None:
            raise UsageError(f"{type(output).__name__} has no loss: the model does not train on the task's labels")
        return output.loss if batch.num_targets else _finite_without_targets(output.loss, output.logits, batch)

    def smoothed_loss(output: Any, batch: MicroBatch) -> torch.Tensor:
        logits, labels = output.logits, batch.inputs["labels"]
        if task in ("causal-lm", "chat"):
            labels = F.pad(labels[:, 1:], (0, 1), value=_IGNORED)
        loss = F.cross_entropy(
            logits.flatten(0, -2).float(), labels.flatten(), ignore_index=_IGNORED, label_smoothing=label_smoothing
        )
        return _finite_without_targets(loss, logits, batch)

    return smoothed_loss if label_smoothing else own_loss


def _finite_without_targets(loss: torch.Tensor, logits: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """A micro-batch without a single target has a mean of nothing; it adds zero and a gradient of zero instead."""
    return loss if batch.num_targets else logits.sum() * 0.0
