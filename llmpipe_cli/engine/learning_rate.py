"""Learning rates as a pure function of the step.

The curves are those of `transformers.get_scheduler`; only their lambda is used, so that nothing has to be saved or
replayed when a run goes on from a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import get_scheduler

from llmpipe_cli.recipe.schema import TrainSection


def learning_rate_curve(train: TrainSection, max_steps: int, warmup_steps: int) -> Callable[[int], float]:
    """The learning rate of optimizer step 0, 1, ... as a function.

    Args:
        train: the recipe's train section.
        max_steps: optimizer steps of the whole training.
        warmup_steps: steps over which the rate rises from zero.
    """
    decay_steps = max(1, math.ceil(train.decay_ratio * max_steps))
    curves: dict[str, tuple[str, dict[str, Any]]] = {
        "linear": ("linear", {}),
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": train.min_lr_ratio}),
        "constant": ("constant_with_warmup", {}),
        "inverse_sqrt": ("inverse_sqrt", {}),
        "wsd": (
            "warmup_stable_decay",
            {"num_decay_steps": decay_steps, "min_lr_ratio": train.min_lr_ratio, "decay_type": "cosine"},
        ),
    }
    name, options = curves[train.lr_scheduler_type]
    holder = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=train.learning_rate)
    scheduler = get_scheduler(name, holder, warmup_steps, max_steps, scheduler_specific_kwargs=options)
    factor = scheduler.lr_lambdas[0]
    return lambda step: train.learning_rate * float(factor(step))
