"""Chat: go on with a conversation, and learn only what the assistant says.

A sample is one conversation as the chat template writes it, cut to `sequence_len` and padded on the right. Tokens of
the system and the user, and the marks that begin a turn, are no targets (`data.chat`). With packing a sample holds
several whole conversations, which do not see each other; an evaluation has one a row all the same.
-> loss, perplexity (over what the assistant says).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmpipe_cli.data.dataset import Sample, Samples
from llmpipe_cli.tasks.base import IGNORED, Batch, EvaluationBatch, EvaluationPass, LossPass, Task, in_blocks, pad


class Chat(Task):
    """Next-token prediction in answers; batches hold `input_ids`, `attention_mask` and `labels`
    [micro_batch, length]."""

    name = "chat"

    def collate(self, samples: Sequence[Sample], *, seed: tuple[int, ...]) -> Batch:
        input_ids, mask = pad([sample["input_ids"] for sample in samples], self.sequence_len, self.pad_id)
        answered, _ = pad([sample["answered"] for sample in samples], self.sequence_len, 0)
        labels = input_ids.masked_fill(answered == 0, IGNORED)
        batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        if self.data.block_attention and "positions" in samples[0]:
            return in_blocks(batch, [sample["positions"] for sample in samples])
        return batch

    def num_targets(self, batch: Batch) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def evaluation_passes(
        self, samples: Samples, micro_batch_size: int, max_samples: int | None = None
    ) -> list[EvaluationPass]:
        return [_Said(self, samples, micro_batch_size, max_samples)]


class _Said(LossPass):
    """One row a conversation."""

    name = "answers"

    def __init__(self, task: Chat, samples: Samples, micro_batch_size: int, max_samples: int | None) -> None:
        super().__init__(min(len(samples), max_samples or len(samples)), micro_batch_size)
        self.task = task
        self.samples = samples

    def rows(self, indices: Sequence[int]) -> EvaluationBatch:
        inputs = self.task.collate([self.samples[index] for index in indices], seed=())
        targets = torch.full_like(inputs["labels"], IGNORED)
        targets[:, :-1] = inputs["labels"][:, 1:]
        return EvaluationBatch(inputs, targets)
