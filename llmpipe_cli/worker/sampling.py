"""The next token from a row of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llmpipe_cli.engine.randomness import derive_seed


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the most probable token.
        top_k: draw from the k most probable tokens; 0 from all.
        top_p: draw from the smallest set of tokens whose probabilities reach p.
        seed: decides the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class GenerationSettings:
    """How texts are generated.

    Attributes:
        max_new_tokens: most tokens that are added to a prompt, or that a decoder writes.
        num_beams: width of beam search; 1 is greedy search or sampling, None leaves it to the model's own
            generation_config.json (1 where that says nothing).
        sampling: how single tokens are drawn.
    """

    max_new_tokens: int = 64
    num_beams: int | None = None
    sampling: Sampling = Sampling()


class Sampler:
    """Draws next tokens; a draw depends on the seed, the prompt and the position alone, not on batch or layout.

    Args:
        sampling: how to draw.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._warpers = LogitsProcessorList()
        if sampling.temperature > 0:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k > 0:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1.0:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def next_token(self, logits: torch.Tensor, prompt: int, position: int) -> int:
        """One token id.

        Args:
            logits: [vocabulary], any float dtype.
            prompt: number of the prompt.
            position: number of the new token, from 0.
        """
        scores = logits.float().cpu()[None]
        if self._sampling.temperature <= 0:
            return int(scores.argmax())
        no_tokens: Any = torch.zeros(1, 0, dtype=torch.long)  # these warpers look at the scores alone
        scores = self._warpers(no_tokens, scores)
        generator = torch.Generator().manual_seed(derive_seed(self._sampling.seed, "token", prompt, position))
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=generator))
