"""Causal language modelling: predict each token from those before it.

Training samples are consecutive blocks of the corpus (each document ends with the end-of-text token), or with
`packing: false` one document each, padded on the right. The labels are the tokens themselves: Hugging Face's models
shift them. With block attention tokens see their own document alone, in training and in the blocks of an evaluation.

Two passes score a model:

- blocks: the validation text without special tokens, cut into consecutive blocks of `sequence_len`; each token of a
  block but its first is a target. A last block that is not full is left out, unless it is the only one.
  -> loss, perplexity.
- windows: each token of each document is scored once, with as much of the document before it as a rolling window of
  `sequence_len` holds; a prefix token (beginning of text, else end of text) stands before the first. The sum is divided
  by the words, and by the bytes, of the original text, over the whole corpus, as lm-evaluation-harness does.
  -> word_perplexity, byte_perplexity, bits_per_byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from llmpipe_cli.data.dataset import Sample, Samples
from llmpipe_cli.data.store import Documents
from llmpipe_cli.tasks.base import (
    IGNORED,
    Batch,
    EvaluationBatch,
    EvaluationPass,
    LossPass,
    Task,
    exponential,
    in_blocks,
    pad,
)


class CausalLM(Task):
    """Next-token prediction; batches hold `input_ids`, `labels` and, without packing, `attention_mask`."""

    name = "causal-lm"

    def collate(self, samples: Sequence[Sample], *, seed: tuple[int, ...]) -> Batch:
        batch = self.batch([sample["input_ids"] for sample in samples])
        if not self.data.block_attention:
            return batch
        return in_blocks(batch, [sample.get("positions") for sample in samples])

    def batch(self, rows: Sequence[np.ndarray]) -> Batch:
        """The micro-batch of these token rows, each at most `sequence_len` long."""
        input_ids, mask = pad(rows, self.sequence_len, self.pad_id)
        labels = input_ids.masked_fill(mask == 0, IGNORED)
        if self.data.packing:  # nothing before the padding can see it, so no mask is needed
            return {"input_ids": input_ids, "labels": labels}
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    def num_targets(self, batch: Batch) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def evaluation_passes(
        self, samples: Samples, micro_batch_size: int, max_samples: int | None = None
    ) -> list[EvaluationPass]:
        passes: list[EvaluationPass] = [_Blocks(self, samples, micro_batch_size, max_samples)]
        ids = self.data.special_token_ids
        prefix = ids.get("bos", ids.get("eos"))
        if samples.documents is not None and prefix is not None:
            passes.append(_Windows(self, samples.documents, prefix, micro_batch_size, max_samples))
        return passes


class _Blocks(LossPass):
    """One row a block."""

    name = "blocks"

    def __init__(self, task: CausalLM, samples: Samples, micro_batch_size: int, max_samples: int | None) -> None:
        super().__init__(min(len(samples), max_samples or len(samples)), micro_batch_size)
        self.task = task
        self.samples = samples

    def rows(self, indices: Sequence[int]) -> EvaluationBatch:
        inputs = self.task.collate([self.samples[index] for index in indices], seed=())
        targets = torch.full_like(inputs["labels"], IGNORED)
        targets[:, :-1] = inputs["labels"][:, 1:]
        return EvaluationBatch(inputs, targets)


class _Windows(LossPass):
    """One row a window of a document. Windows end at every multiple of `sequence_len` tokens and at the document's end;
    a window's input is the `sequence_len` tokens before its last target, so only the last window, which may have few
    targets, sees more than one token of its predecessor. `max_samples` takes whole documents as far as they fit, or
    else the first windows of the first, with its words and bytes in proportion."""

    name = "windows"

    def __init__(
        self, task: CausalLM, documents: Documents, prefix: int, micro_batch_size: int, max_samples: int | None
    ) -> None:
        counts = np.asarray(documents.counts["input_ids"])
        self.last_rows = np.cumsum(-(-counts // task.sequence_len))
        num_documents = len(documents)
        share = 1.0
        if max_samples is not None:
            num_documents = int(np.searchsorted(self.last_rows, max_samples, side="right"))
            if num_documents == 0:  # not even the first document fits: as many words and bytes as tokens of it
                num_documents = 1
                share = max_samples * task.sequence_len / int(counts[0])
        self.num_words = float(documents.words[:num_documents].sum()) * share
        self.num_bytes = float(documents.bytes[:num_documents].sum()) * share
        num_rows = int(self.last_rows[num_documents - 1]) if share == 1 else max_samples
        assert num_rows is not None
        super().__init__(num_rows, micro_batch_size)
        self.task = task
        self.documents = documents
        self.prefix = prefix

    def rows(self, indices: Sequence[int]) -> EvaluationBatch:
        windows = [self._window(index) for index in indices]
        inputs = self.task.batch([window for window, _ in windows])
        targets, _ = pad([target for _, target in windows], self.task.sequence_len, IGNORED)
        return EvaluationBatch(inputs, targets)

    def _window(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Input and targets of one window, int64 [n], n <= sequence_len."""
        length = self.task.sequence_len
        document = int(np.searchsorted(self.last_rows, row, side="right"))
        first_row = int(self.last_rows[document - 1]) if document else 0
        tokens = np.concatenate([[self.prefix], self.documents.document(document)])  # tokens[i + 1] follows tokens[i]
        start = (row - first_row) * length
        stop = min(start + length, len(tokens) - 1)
        begin = max(0, stop - length)
        targets = tokens[begin + 1 : stop + 1].copy()
        targets[: start - begin] = IGNORED  # scored in the window before
        return tokens[begin:stop], targets

    def result(self, vector: torch.Tensor) -> dict[str, float]:
        total = vector[0].item()
        return {
            "word_perplexity": exponential(total / self.num_words),
            "byte_perplexity": exponential(total / self.num_bytes),
            "bits_per_byte": total / self.num_bytes / math.log(2),
        }
