"""Classification: one label a text, or with `multi_label` any number of them.

The text is cut to `sequence_len` and padded on the right. Scores come from the confusion matrix, summed over ranks
-> loss, accuracy, precision_macro, recall_macro, f1_macro, f1_micro. Macro averages give each class the same weight,
whatever its size, over the classes that occur among the labels or the predictions; a class that is never predicted has
precision 0. With one label a text f1_micro equals accuracy. The matrix goes to confusion_matrix.json.

With several labels a text each label is a yes or no of its own, given where its probability is at least `threshold`
-> loss (binary cross entropy, mean over labels and texts), accuracy (all labels of a text are right), precision, recall
and F1 as macro averages over all labels and micro averages over all decisions; where nothing is there to divide by, 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

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
        batch = {"input_ids": input_ids, "attention_mask": mask}
        if self.data.multi_label:
            given = torch.zeros(len(samples), len(self.data.label_names or ()))
            for row, sample in enumerate(samples):
                given[row, torch.from_numpy(sample["classes"])] = 1.0
            return {**batch, "labels": given}
        labels = torch.from_numpy(np.array([sample["label"] for sample in samples], dtype=np.int64))
        return {**batch, "labels": labels}

    def num_targets(self, batch: Batch) -> int:
        if self.data.multi_label:
            return len(batch["labels"])
        return int((batch["labels"] != IGNORED).sum())

    def evaluation_passes(
        self, samples: Samples, micro_batch_size: int, max_samples: int | None = None
    ) -> list[EvaluationPass]:
        kind = _ManyLabels if self.data.multi_label else _Labels
        return [kind(self, samples, micro_batch_size, max_samples)]


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

    def tables(self, vector: torch.Tensor) -> dict[str, str]:
        matrix = vector[2:].reshape(self.num_labels, self.num_labels).round().int().tolist()
        document = {"labels": self.task.data.label_names, "matrix": matrix, "rows": "true", "columns": "predicted"}
        return {"confusion_matrix.json": json.dumps(document, ensure_ascii=False) + "\n"}


class _ManyLabels(_Labels):
    """One row a sample; vector: summed loss, number of samples, samples with all labels right, then for each label how
    often it was given rightly, given, and there."""

    def new_metrics(self) -> Metrics:
        return LabelSetMetrics(self.num_labels, self.task.data.scoring["threshold"])

    def result(self, vector: torch.Tensor) -> dict[str, float]:
        loss, count, right = vector[:3].tolist()
        scores = label_set_scores(vector[3:].reshape(self.num_labels, 3))
        return {"loss": loss / max(count, 1), "accuracy": right / max(count, 1), **scores}

    def tables(self, vector: torch.Tensor) -> dict[str, str]:
        return {}


class LabelSetMetrics(Metrics):
    """Vector: summed loss, number of samples, samples with all labels right, then for each label how often it was given
    rightly, given, and there."""

    def __init__(self, num_labels: int, threshold: float) -> None:
        super().__init__(3 + 3 * num_labels)
        self.threshold = threshold

    def update(self, batch: EvaluationBatch, logits: torch.Tensor) -> None:
        targets, logits = batch.targets.cpu(), logits.detach().float().cpu()
        scored = (targets != IGNORED).all(dim=-1)
        targets, logits = targets[scored], logits[scored]
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").double().mean(dim=-1)
        there, given = targets > 0.5, logits.sigmoid() >= self.threshold
        right = (there == given).all(dim=-1)
        counts = torch.stack([(there & given).sum(0), given.sum(0), there.sum(0)], dim=-1)
        self.vector[:3] += torch.stack([losses.sum(), scored.sum().double(), right.sum().double()])
        self.vector[3:] += counts.flatten().double()


def label_set_scores(counts: torch.Tensor) -> dict[str, float]:
    """Macro and micro scores of counts [labels, 3]: given rightly, given, there."""
    scores = {}
    for name, rows in (("macro", counts), ("micro", counts.sum(dim=0, keepdim=True))):
        right, given, there = rows.unbind(dim=-1)
        scores[f"precision_{name}"] = (right / given.clamp(min=1)).mean().item()
        scores[f"recall_{name}"] = (right / there.clamp(min=1)).mean().item()
        scores[f"f1_{name}"] = (2 * right / (given + there).clamp(min=1)).mean().item()
    return scores


class ConfusionMetrics(Metrics):
    """Vector: summed loss, number of samples, then how often a text of class i was given label j, at 2 + i * n + j."""

    def __init__(self, num_labels: int) -> None:
        super().__init__(2 + num_labels * num_labels)
        self.num_labels = num_labels

    def update(self, batch: EvaluationBatch, logits: torch.Tensor) -> None:
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
