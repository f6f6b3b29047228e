"""Activation checkpointing of single layer calls.

`full` keeps only a layer's inputs and computes the layer again in the backward pass. `selective` also keeps the results
of matrix products with weights and of fused attention, and computes the rest again: scores, norms, activations and
dropout. Both restore the random state, so dropout draws the same values again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llmpipe_cli.model.slicing.recorder import draws_numbers

CheckpointingMode = Literal["none", "full", "selective"]

aten = torch.ops.aten
_WEIGHT_PRODUCTS = {aten.mm.default, aten.addmm.default}
_EXPERT_PRODUCTS = {aten._grouped_mm.default}
_FUSED_ATTENTION = {
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_flash_attention_forward",
    "_efficient_attention_forward",
}


def layer_runner(mode: CheckpointingMode, model: nn.Module) -> Callable[..., Any] | None:
    """A function that calls ``forward(*args, **kwargs)`` of a layer of `model` under checkpointing; None for none."""
    if mode == "none":
        return None
    if mode == "full":
        return functools.partial(checkpoint, use_reentrant=False)
    # experts with biases add them in place to their products, which therefore cannot be kept
    biased = any("experts" in name and "bias" in name for name, _ in model.named_parameters())
    products = _WEIGHT_PRODUCTS if biased else _WEIGHT_PRODUCTS | _EXPERT_PRODUCTS
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, products))
    return functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)


def _policy(products: set[Any], context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if func in products:
        return CheckpointPolicy.MUST_SAVE
    # attention with dropout has to run again: skipping it would leave the random state behind
    if func._overloadpacket.__name__ in _FUSED_ATTENTION and not draws_numbers(func, args, kwargs):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
