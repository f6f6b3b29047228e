"""Translation, and any other text-to-text task: read one text, write another.

The source, after `source_prefix`, is cut to `sequence_len` and padded on the right; the target is cut to
`target_sequence_len`, and its padding is no target. The decoder's input is left to the model, which shifts the labels
by one as Hugging Face's encoder-decoder models do. -> loss, perplexity (over the target tokens); `llmpipe evaluate`
also generates a text for each source and scores it -> bleu, chrf, and ROUGE on request (`worker.hypotheses`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmpipe_cli.data.dataset import Sample, Samples
from llmpipe_cli.tasks.base import IGNORED, Batch, EvaluationBatch, EvaluationPass, LossPass, Task, pad


class Translation(Task):
    """Text to text; batches hold `input_ids` and `attention_mask` [micro_batch, length] and `labels`
    [micro_batch, target length]."""

    name = "translation"

    def collate(self, samples: Sequence[Sample], *, seed: tuple[int, ...]) -> Batch:
        input_ids, mask = pad([sample["input_ids"] for sample in samples], self.sequence_len, self.pad_id)
        labels, _ = pad([sample["labels"] for sample in samples], self.target_sequence_len, IGNORED)
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    def num_targets(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def evaluation_passes(
        self, samples: Samples, micro_batch_size: int, max_samples: int | None = None
    ) -> list[EvaluationPass]:
        return [_Targets(self, samples, micro_batch_size, max_samples)]


class _Targets(LossPass):
    """One row a pair of texts."""

    name = "target tokens"

    def __init__(self, task: Translation, samples: Samples, micro_batch_size: int, max_samples: int | None) -> None:
        super().__init__(min(len(samples), max_samples or len(samples)), micro_batch_size)
        self.task = task
        self.samples = samples

    def rows(self, indices: Sequence[int]) -> EvaluationBatch:
        inputs = self.task.collate([self.samples[index] for index in indices], seed=())
        targets: torch.Tensor = inputs["labels"].clone()
        return EvaluationBatch(inputs, targets)
