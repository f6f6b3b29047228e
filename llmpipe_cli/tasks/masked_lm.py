"""Masked language modelling: predict tokens that were hidden, from both sides.

Of each sample 15 % of the tokens are chosen, never special ones: 80 % of those become the mask token, 10 % a random
token, 10 % stay, and all are targets. The choice is new each time a sample is drawn, and depends on the seed, step and
micro-batch alone. With `whole_word_masking` 15 % of the words are chosen, each with all its tokens; what becomes of a
token is then drawn for each. In an evaluation it depends on the sample alone: every evaluation of the same data hides
the same tokens, whatever the micro-batch size. -> loss, perplexity (over the hidden tokens).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from llmpipe_cli.data.dataset import Sample, Samples
from llmpipe_cli.data.prepared import PreparedData
from llmpipe_cli.tasks.base import IGNORED, Batch, EvaluationBatch, EvaluationPass, LossPass, Task, pad

_CHOSEN = 0.15
_MASKED = 0.8  # of the chosen
_RANDOM = 0.1  # of the chosen
_EVALUATION_SEED = 0x6D61736B

Ids = npt.NDArray[np.int64]


class MaskedLM(Task):
    """Hidden-token prediction; batches hold `input_ids`, `labels` and, without packing, `attention_mask`."""

    name = "masked-lm"

    def __init__(self, data: PreparedData, sequence_len: int, target_sequence_len: int) -> None:
        super().__init__(data, sequence_len, target_sequence_len)
        self.mask_id = data.special_token_ids.get("mask", 0)  # random ids have no tokenizer, and no mask token
        self.special_ids = np.array(data.all_special_ids, dtype=np.int64)

    def collate(self, samples: Sequence[Sample], *, seed: tuple[int, ...]) -> Batch:
        random = np.random.default_rng(seed)
        return self._batch([self._hide(sample["input_ids"], random, sample.get("words")) for sample in samples])

    def collate_for_evaluation(self, samples: Sequence[Sample], indices: Sequence[int]) -> Batch:
        """The micro-batch of these samples, sample i always with the same tokens hidden."""
        rows = [
            self._hide(sample["input_ids"], np.random.default_rng((_EVALUATION_SEED, index)), sample.get("words"))
            for sample, index in zip(samples, indices, strict=True)
        ]
        return self._batch(rows)

    def num_targets(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def evaluation_passes(
        self, samples: Samples, micro_batch_size: int, max_samples: int | None = None
    ) -> list[EvaluationPass]:
        return [_HiddenTokens(self, samples, micro_batch_size, max_samples)]

    def _batch(self, rows: Sequence[tuple[Ids, Ids]]) -> Batch:
        input_ids, mask = pad([inputs for inputs, _ in rows], self.sequence_len, self.pad_id)
        labels, _ = pad([labels for _, labels in rows], self.sequence_len, IGNORED)
        if self.data.packing:
            return {"input_ids": input_ids, "labels": labels}
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    def _hide(self, tokens: Ids, random: np.random.Generator, words: Ids | None = None) -> tuple[Ids, Ids]:
        """Input and labels of one sample, int64 [n] each. `words` has a number for each token's word, which differs
        from that of its neighbours."""
        draw, what, other = random.random((3, len(tokens)))
        if words is not None and len(tokens):
            begins = np.concatenate([[True], words[1:] != words[:-1]])
            draw = draw[begins][np.cumsum(begins) - 1]  # one draw a word
        draw[np.isin(tokens, self.special_ids)] = np.inf
        chosen = draw < _CHOSEN
        if len(tokens) and np.isfinite(draw.min()):
            chosen[draw == draw.min()] = True  # a sample without any target would have no loss
        inputs = tokens.copy()
        inputs[chosen & (what < _MASKED)] = self.mask_id
        randomised = chosen & (what >= _MASKED) & (what < _MASKED + _RANDOM)
        inputs[randomised] = (other[randomised] * self.data.vocab_size).astype(np.int64)
        return inputs, np.where(chosen, tokens, IGNORED)


class _HiddenTokens(LossPass):
    """One row a sample."""

    name = "hidden tokens"

    def __init__(self, task: MaskedLM, samples: Samples, micro_batch_size: int, max_samples: int | None) -> None:
        super().__init__(min(len(samples), max_samples or len(samples)), micro_batch_size)
        self.task = task
        self.samples = samples

    def rows(self, indices: Sequence[int]) -> EvaluationBatch:
        inputs = self.task.collate_for_evaluation([self.samples[index] for index in indices], indices)
        targets: torch.Tensor = inputs["labels"].clone()
        return EvaluationBatch(inputs, targets)
