"""The optimizers a recipe can name, all from libraries."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from llmpipe_cli.recipe.schema import TrainSection


def build_optimizer(train: TrainSection, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimizer over this stage's parameters.

    Matrices and embeddings decay; vectors (biases and norms) do not.

    Args:
        train: the recipe's train section.
        parameters: trainable parameters of this rank's stage; may be empty.
    """
    trainable = list(parameters)
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate = train.learning_rate
    if train.optimizer == "adamw":
        betas = (train.adam_beta1, train.adam_beta2)
        return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=train.adam_epsilon, fused=True)
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=train.momentum)
    if train.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=rate)
    from lion_pytorch import Lion

    return Lion(groups, lr=rate, betas=(train.adam_beta1, train.adam_beta2))
