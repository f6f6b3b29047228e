"""The loss of a micro-batch: the model's own, or a smoothed or weighted cross entropy over the same targets.

Mixtures of experts add losses for their routers when their config says `output_router_logits: true`. Those are taken
apart: they are no mean over targets, and belong to the global batch as a mean over its micro-batches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from llmpipe_cli.engine.executor import Loss, LossFunction, MicroBatch
from llmpipe_cli.errors import UsageError

_IGNORED = -100
_AUXILIARY = ("aux_loss", "z_loss")
"""How the names of transformers' router losses end (`aux_loss`, `encoder_z_loss`)."""


def make_loss(task: str, label_smoothing: float, class_weights: Sequence[float] | None = None) -> LossFunction:
    """Loss of one micro-batch from the model's output and inputs: scalars, the mean over its targets in nats.

    Args:
        task: the recipe's task; decides whether logits are shifted against labels.
        label_smoothing: probability mass spread evenly over all classes (Szegedy et al. 2016); 0 takes the model's own
            loss.
        class_weights: classification: factor on the loss of each sample, by its class. The mean is over samples, not
            over weights, so that it does not depend on how samples fall into micro-batches.
    """

    def own_loss(output: Any, batch: MicroBatch) -> Loss:
        if output.loss is None:
            raise UsageError(f"{type(output).__name__} has no loss: the model does not train on the task's labels")
        term, auxiliary = _auxiliary_losses(output)
        mean = output.loss if term is None else output.loss - term
        if batch.num_targets == 0:
            mean = _finite_without_targets(mean, output.logits, batch)
        return Loss(mean, term, auxiliary)

    def smoothed_loss(output: Any, batch: MicroBatch) -> Loss:
        logits, labels = output.logits, batch.inputs["labels"]
        if task in ("causal-lm", "chat"):
            labels = F.pad(labels[:, 1:], (0, 1), value=_IGNORED)
        mean = F.cross_entropy(
            logits.flatten(0, -2).float(), labels.flatten(), ignore_index=_IGNORED, label_smoothing=label_smoothing
        )
        return Loss(_finite_without_targets(mean, logits, batch), *_auxiliary_losses(output))

    def weighted_loss(output: Any, batch: MicroBatch) -> Loss:
        labels = batch.inputs["labels"]
        losses = F.cross_entropy(
            output.logits.float(),
            labels,
            weight=weights_on(labels.device),
            ignore_index=_IGNORED,
            label_smoothing=label_smoothing,
            reduction="none",
        )
        return Loss(losses.sum() / max(batch.num_targets, 1), *_auxiliary_losses(output))

    @functools.cache
    def weights_on(device: torch.device) -> torch.Tensor:
        return torch.tensor(class_weights, device=device)

    if class_weights is not None:
        return weighted_loss
    return smoothed_loss if label_smoothing else own_loss


def _auxiliary_losses(output: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the output's loss holds for the routers, and the sum of those losses before their coefficients.

    Each architecture keeps its coefficients elsewhere, so they are read from the graph: the coefficient of an auxiliary
    loss is the derivative of the whole loss with respect to it. Only the sum between the two is walked for that.
    """
    parts = [value for name, value in output.items() if name.endswith(_AUXILIARY) and torch.is_tensor(value)]
    parts = [part for part in parts if part.requires_grad]
    if not parts:
        return None, None
    coefficients = torch.autograd.grad(output.loss, parts, retain_graph=True, allow_unused=True)
    used = [(part, c) for part, c in zip(parts, coefficients, strict=True) if c is not None]
    if not used:
        return None, None
    term = torch.stack([part * coefficient for part, coefficient in used]).sum()
    return term, torch.stack([part.detach() for part, _ in used]).sum()


def _finite_without_targets(loss: torch.Tensor, logits: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """A micro-batch without a single target has a mean of nothing; it adds zero and a gradient of zero instead."""
    return loss if batch.num_targets else logits.sum() * 0.0
