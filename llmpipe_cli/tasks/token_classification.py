"""Token classification: one tag a word, such as names of persons and places (CoNLL 2003).

The tag of a word is predicted at its first token; its other tokens and special ones are no targets. Words beyond
`sequence_len` are cut off and not scored. -> loss, accuracy (over words), and where the tags mark spans (``B-PER``,
``I-PER``, ``O``) `precision`, `recall` and `f1` over whole entities, micro-averaged over all of them, and
`f1_macro`, the mean of the types' own F1.

Entities are read as the CoNLL script (and seqeval in its default mode) does: a span begins at ``B-``, at a tag of
another type, or at ``I-`` after ``O``; it is right when type and both ends are. ``E-``, ``S-``, ``L-`` and ``U-`` mark
ends and single words (IOBES, BILOU).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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

Entity = tuple[str, int, int]


class TokenClassification(Task):
    """One tag a word; batches hold `input_ids`, `attention_mask` and `labels` [micro_batch, length]."""

    name = "token-classification"

    def collate(self, samples: Sequence[Sample], *, seed: tuple[int, ...]) -> Batch:
        input_ids, mask = pad([sample["input_ids"] for sample in samples], self.sequence_len, self.pad_id)
        labels, _ = pad([sample["tags"] for sample in samples], self.sequence_len, IGNORED)
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    def num_targets(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def evaluation_passes(
        self, samples: Samples, micro_batch_size: int, max_samples: int | None = None
    ) -> list[EvaluationPass]:
        return [_Tags(self, samples, micro_batch_size, max_samples)]


class _Tags(EvaluationPass):
    """One row a sentence."""

    name = "tags"

    def __init__(
        self, task: TokenClassification, samples: Samples, micro_batch_size: int, max_samples: int | None
    ) -> None:
        super().__init__(min(len(samples), max_samples or len(samples)), micro_batch_size)
        self.task = task
        self.samples = samples
        self.tags = task.data.label_names or []
        self.types = sorted({kind for tag in self.tags if (kind := _parts(tag)[1])}) if _mark_spans(self.tags) else []

    def rows(self, indices: Sequence[int]) -> EvaluationBatch:
        inputs = self.task.collate([self.samples[index] for index in indices], seed=())
        targets: torch.Tensor = inputs["labels"].clone()
        return EvaluationBatch(inputs, targets)

    def new_metrics(self) -> Metrics:
        return _EntityMetrics(self.tags, self.types)

    def result(self, vector: torch.Tensor) -> dict[str, float]:
        loss, count, correct = vector[:3].tolist()
        scores = {"loss": loss / count if count else math.nan, "accuracy": correct / count if count else math.nan}
        if self.types:
            scores |= entity_scores(vector[3:].reshape(len(self.types), 3))
        return scores

    def num_targets(self, vector: torch.Tensor) -> int:
        return round(vector[1].item())


class _EntityMetrics(Metrics):
    """Vector: summed loss, words, words with the right tag; then for each type the entities found rightly, found, and
    there."""

    def __init__(self, tags: Sequence[str], types: Sequence[str]) -> None:
        super().__init__(3 + 3 * len(types))
        self.tags = tags
        self.type_index = {kind: index for index, kind in enumerate(types)}

    def update(self, batch: EvaluationBatch, logits: torch.Tensor) -> None:
        total, count = negative_log_likelihood(logits, batch.targets)
        targets, predictions = batch.targets.cpu(), logits.detach().float().argmax(dim=-1).cpu()
        scored = targets != IGNORED
        correct = int((targets == predictions)[scored].sum())
        self.vector[:3] += torch.tensor([total, count, correct], dtype=torch.float64)
        if not self.type_index:
            return
        counts = self.vector[3:].view(-1, 3)
        for row in range(len(targets)):
            there = set(entities([self.tags[tag] for tag in targets[row][scored[row]].tolist()]))
            found = set(entities([self.tags[tag] for tag in predictions[row][scored[row]].tolist()]))
            for column, group in enumerate((there & found, found, there)):
                for kind, _, _ in group:
                    counts[self.type_index[kind], column] += 1


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities that a sentence's tags mark: type, first word, last word."""
    found, start, before = [], 0, ("O", "")
    for position, tag in enumerate([*tags, "O"]):
        mark, kind = _parts(tag)
        if before[0] != "O" and (mark in "OBSU" or before[0] in "ESLU" or kind != before[1]):
            found.append((before[1], start, position - 1))
        if mark != "O" and (mark in "BSU" or before[0] in "OESLU" or kind != before[1]):
            start = position
        before = (mark, kind)
    return found


def entity_scores(counts: torch.Tensor) -> dict[str, float]:
    """Scores from the entities of each type [types, 3]: found rightly, found, there. What divides by nothing is 0."""
    right, found, there = counts.sum(dim=0).tolist()
    per_type = [_f1(*row) for row in counts.tolist() if row[1] or row[2]]
    return {
        "precision": right / found if found else 0.0,
        "recall": right / there if there else 0.0,
        "f1": _f1(right, found, there),
        "f1_macro": sum(per_type) / len(per_type) if per_type else 0.0,
    }


def _f1(right: float, found: float, there: float) -> float:
    return 2 * right / (found + there) if found + there else 0.0


def _parts(tag: str) -> tuple[str, str]:
    """Mark and type of a tag: ("B", "PER") of B-PER; O has no type."""
    mark, dash, kind = tag.partition("-")
    return (mark, kind) if dash else (tag, "")


def _mark_spans(tags: Sequence[str]) -> bool:
    """Whether the tags are of the form that marks spans."""
    marked = [tag for tag in tags if tag != "O"]
    return bool(marked) and all(len(tag) > 2 and tag[0] in "BIESLU" and tag[1] == "-" for tag in marked)
