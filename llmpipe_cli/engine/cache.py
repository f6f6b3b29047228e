"""The key-value cache of one pipeline stage.

transformers asks a cache's first layer for the length of the past, and the first layer of each kind for the sizes of
masks, on every stage; but a stage computes keys and values of its own layers only. The layers of other stages are
therefore kept as stand-ins of one head and one channel: they go through the same updates, crops and reorderings by
transformers' own code, so that lengths and sliding windows are right everywhere and cost next to no memory.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)


def why_uncached(model: PreTrainedModel) -> str | None:
    """Why a stage of this model cannot have a cache; None when it can.

    Layers of other kinds than plain and sliding-window attention keep a state that is not a growing list of keys and
    values (state-space models, linear attention, sparse indices).
    """
    name = model.config.model_type
    if "past_key_values" not in inspect.signature(type(model).forward).parameters:
        return f"{name} has no key-value cache"
    kind: Any = type(model)
    if kind._is_stateful or not kind._supports_default_dynamic_cache():
        return f"{name} keeps a state of another kind than keys and values"
    layers = {type(layer) for layer in DynamicCache(config=model.config).layers}
    others = sorted(layer.__name__ for layer in layers if layer not in _ATTENTION)
    return f"the cache of {name} has layers that cannot be cut: {', '.join(others)}" if others else None


class StageCache(DynamicCache):
    """A cache in which some layers belong to other stages.

    Around every pass of the stage's forward call `begin` and `end`.

    Args:
        config: of the model.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self._waiting: list[int] = []  # layers that have not seen the tokens of this pass, ascending
        self._new = torch.empty(0)

    def begin(self, batch_size: int, num_tokens: int, device: torch.device) -> None:
        """A pass over `num_tokens` new tokens of each sample begins."""
        self._waiting = list(range(len(self.layers)))
        self._new = torch.zeros(batch_size, 1, num_tokens, 1, device=device)

    def end(self) -> None:
        """The pass is over: layers of other stages are as long as the stage's own from now on."""
        self._fill(len(self.layers))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `DynamicCache.update`, called by a layer of this stage."""
        self._fill(layer_idx)
        if layer_idx in self._waiting:
            self._waiting.remove(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _fill(self, stop: int) -> None:
        """Let the layers before `stop` that this stage does not compute see the new tokens."""
        while self._waiting and self._waiting[0] < stop:
            layer: Any = self.layers[self._waiting.pop(0)]
            layer.update(self._new, self._new)
