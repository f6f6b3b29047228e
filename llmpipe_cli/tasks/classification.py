"""Classification: one label a text.

The text is cut to `sequence_len` and padded on the right. Scores come from the confusion matrix, summed over ranks
-> loss, accuracy, precision_macro, recall_macro, f1_macro, f1_micro. Macro averages give each class the same weight,
whatever its size, over the classes that occur among the labels or the predictions; a class that is never predicted has
precision 0. With one label a text f1_micro equals accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llmpipe_cli.data.dataset import Sample, Samples
from llmpipe_cli.tasks.base import (
    IGNORED,
    Batch,
    EvaluationBatch,
    EvaluationPass,
    Metrics,
    Task,
    negative_log_likelihood,
    pad,
)


class Classification(Task):
    """One label a sample; batches hold `input_ids`, `attention_mask` and `labels` [micro_batch]."""

    name = "classification"

    def collate(self, samples: Sequence[Sample], *, seed: tuple[int, ...]) -> Batch:
        input_ids, mask = pad([sample["input_ids"] for sample in samples], self.sequence_len, self.pad_id)
        labels = torch.from_numpy(np.array([sample["label"] for sample in samples], dtype=np.int64))
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    def num_targets(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def evaluation_passes(
        self, samples: Samples, micro_batch_size: int, max_samples: int | None = None
    ) -> list[EvaluationPass]:
        return [_Labels(self, samples, micro_batch_size, max_samples)]


class _Labels(EvaluationPass):
    """One row a sample; vector: summed loss, number of samples, then the confusion matrix row by row."""

    name = "labels"

    def __init__(self, task: Classification, samples: Samples, micro_batch_size: int, max_samples: int | None) -> None:
        super().__init__(min(len(samples), max_samples or len(samples)), micro_batch_size)
        self.task = task
        self.samples = samples
        self.num_labels = len(task.data.label_names or ())

    def rows(self, indices: Sequence[int]) -> EvaluationBatch:
        inputs = self.task.collate([self.samples[index] for index in indices], seed=())
        return EvaluationBatch(inputs, inputs["labels"].clone())

    def new_metrics(self) -> Metrics:
        return ConfusionMetrics(self.num_labels)

    def result(self, vector: torch.Tensor) -> dict[str, float]:
        loss, count = vector[:2].tolist()
        confusion = vector[2:].reshape(self.num_labels, self.num_labels)
        return {"loss": loss / count if count else float("nan"), **classification_scores(confusion)}

    def num_targets(self, vector: torch.Tensor) -> int:
        return round(vector[1].item())


class ConfusionMetrics(Metrics):
    """Vector: summed loss, number of samples, then how often a text of class i was given label j, at 2 + i * n + j."""

    def __init__(self, num_labels: int) -> None:
        super().__init__(2 + num_labels * num_labels)
        self.num_labels = num_labels

    def update(self, batch: EvaluationBatch, logits: torch.Tensor, loss: torch.Tensor | None = None) -> None:
        total, count = negative_log_likelihood(logits, batch.targets)
        self.vector[:2] += torch.tensor([total, count], dtype=torch.float64)
        targets = batch.targets.to("cpu")
        predictions = logits.detach().float().argmax(dim=-1).to("cpu")
        scored = targets != IGNORED
        cells = targets[scored] * self.num_labels + predictions[scored]
        self.vector[2:] += torch.bincount(cells, minlength=self.num_labels**2).double()


def classification_scores(confusion: torch.Tensor) -> dict[str, float]:
    """Accuracy, macro and micro scores of a confusion matrix [true class, predicted class] of counts."""
    correct = confusion.diagonal()
    true, predicted = confusion.sum(dim=1), confusion.sum(dim=0)
    occurring = (true + predicted) > 0
    # the classes that occur have a denominator of at least 1, or a numerator of 0
    precision = (correct / predicted.clamp(min=1))[occurring].mean().item()
    recall = (correct / true.clamp(min=1))[occurring].mean().item()
    f1 = (2 * correct / (true + predicted).clamp(min=1))[occurring].mean().item()
    accuracy = (correct.sum() / confusion.sum()).item()
    return {
        "accuracy": accuracy,
        "precision_macro": precision,
        "recall_macro": recall,
        "f1_macro": f1,
        "f1_micro": accuracy,
    }
