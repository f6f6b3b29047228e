"""How texts are generated, and the next tokens from scores.

What changes scores (temperature, top-k, top-p, repetition penalty) are transformers' own logits processors, set up by
its `generate` from `GenerationSettings.options`. Drawing is ours: a draw depends on the seed, the prompt's number and
the token's position alone, so the same prompt gives the same text in any batch and on any layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmpipe_cli.engine.randomness import derive_seed
from llmpipe_cli.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the most probable token.
        top_k: draw from the k most probable tokens; 0 from all.
        top_p: draw from the smallest set of tokens whose probabilities reach p.
        seed: decides the draws.
        repetition_penalty: divides the scores of tokens that are there already (Keskar et al. 2019); also without
            drawing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class GenerationSettings:
    """How texts are generated.

    Attributes:
        max_new_tokens: most tokens that are added to a prompt, or that a decoder writes.
        num_beams: width of beam search; 1 is greedy search or sampling, None leaves it to the model's own
            generation_config.json (1 where that says nothing).
        sampling: how single tokens are drawn.
        length_penalty: exponent of the length by which a beam's score is divided; None leaves it to the model.
        stop: texts after which a sample ends.
        use_cache: keep keys and values of the past; without, the whole prefix is computed for every token.
    """

    max_new_tokens: int = 64
    num_beams: int | None = None
    sampling: Sampling = Sampling()
    length_penalty: float | None = None
    stop: tuple[str, ...] = ()
    use_cache: bool = True

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `generate`, without `max_new_tokens`.

        Raises:
            UsageError: beam search with a temperature.
        """
        sampling = self.sampling
        if sampling.temperature > 0 and (self.num_beams or 1) > 1:
            raise UsageError("beam search takes the best texts and draws nothing", hint="leave out the temperature")
        given: dict[str, Any] = {"do_sample": sampling.temperature > 0, "use_cache": self.use_cache}
        if sampling.temperature > 0:
            given |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
            given["num_beams"] = 1
        elif self.num_beams is not None:
            given["num_beams"] = self.num_beams
        if sampling.repetition_penalty != 1.0:
            given["repetition_penalty"] = sampling.repetition_penalty
        if self.length_penalty is not None:
            given["length_penalty"] = self.length_penalty
        return given


class Picker:
    """Picks the next tokens of a batch.

    Args:
        sampling: how to draw.
        prompts: number of each row's prompt.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[int]) -> None:
        self._sampling, self._prompts = sampling, list(prompts)

    def __call__(self, scores: Tensor, position: int) -> Tensor:
        """Token ids, int64 [rows].

        Args:
            scores: float32 [rows, vocabulary], after all processors; minus infinity where a token is impossible.
            position: number of the new tokens, from 0.
        """
        if self._sampling.temperature <= 0:
            return scores.argmax(-1)
        # The first token whose cumulative probability exceeds a uniform number.
        cumulative = scores.double().softmax(-1).cumsum(-1)
        draws = torch.tensor([[self._uniform(prompt, position)] for prompt in self._prompts], dtype=torch.float64)
        targets = draws.to(scores.device) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, targets, right=True).clamp_(max=scores.shape[-1] - 1)[:, 0]

    def _uniform(self, prompt: int, position: int) -> float:
        generator = torch.Generator().manual_seed(derive_seed(self._sampling.seed, "token", prompt, position))
        return float(torch.rand((), generator=generator, dtype=torch.float64))
