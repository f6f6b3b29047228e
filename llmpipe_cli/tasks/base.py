"""What a task is: how samples become a micro-batch, and how a model's outputs become metrics.

A task is opened from `PreparedData` alone, so every rank has it without a tokenizer. Every micro-batch of a run has the
same keys and types, as a pipeline needs; the keys are the keyword arguments of the Hugging Face model. Rows are as long
as the longest of their micro-batch: short texts cost what they are, and since layouts do not decide which samples share
a micro-batch, they do not decide its shape either.

An evaluation is one or more named passes. A pass is a list of micro-batches, read by index in any order on any rank; on
the last stage `Metrics.update` adds each micro-batch's share to a vector of float64 numbers, and where sums are not
enough (the answer to a question lies in one of several rows) to a list of records. Vectors are summed and records
collected over micro-batches and ranks, and the pass turns them into metrics, so no result depends on the layout.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from llmpipe_cli.data.dataset import Sample, Samples
from llmpipe_cli.data.prepared import PreparedData

IGNORED = -100
"""Label of positions that are no target, as in Hugging Face's losses."""

LENGTH_STEP = 8
"""Rows of a micro-batch are padded to a multiple of this: what matrix units like, and few different shapes."""

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class EvaluationBatch:
    """One micro-batch of an evaluation.

    Attributes:
        inputs: keyword arguments of the model, with the keys of a training micro-batch.
        targets: what `Metrics.update` compares the logits with, `IGNORED` where nothing is scored; int64, of the shape
            of the logits without their last dimension.
        rows: index of each row among the pass's samples; filled in by the pass.
    """

    inputs: Batch
    targets: torch.Tensor
    rows: tuple[int, ...] = ()


class Metrics(ABC):
    """Sums over micro-batches.

    Attributes:
        vector: float64 [size]; sum it over ranks before `EvaluationPass.result`.
        records: plain JSON values; collect them from all ranks before `EvaluationPass.scores`.
    """

    def __init__(self, size: int) -> None:
        self.vector = torch.zeros(size, dtype=torch.float64)
        self.records: list[Any] = []

    @abstractmethod
    def update(self, batch: EvaluationBatch, logits: torch.Tensor) -> None:
        """Adds one micro-batch.

        Args:
            batch: the micro-batch, on any device.
            logits: the model's logits, [micro_batch, length, vocabulary] or [micro_batch, classes].
        """


class EvaluationPass(ABC):
    """A list of micro-batches and what their sums mean.

    Attributes:
        name: of the pass, in progress views.
        num_samples: rows that are scored, padding rows left out.
    """

    name: str

    def __init__(self, num_samples: int, micro_batch_size: int) -> None:
        self.num_samples = num_samples
        self.micro_batch_size = micro_batch_size

    def __len__(self) -> int:
        return -(-self.num_samples // self.micro_batch_size)

    def __getitem__(self, index: int) -> EvaluationBatch:
        """Micro-batch `index`; the last one is filled up with rows that are not scored."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.micro_batch_size
        rows = list(range(first, min(first + self.micro_batch_size, self.num_samples)))
        batch = self.rows(rows + [rows[0]] * (self.micro_batch_size - len(rows)))
        batch.targets[len(rows) :] = IGNORED
        return replace(batch, rows=tuple(rows))

    @abstractmethod
    def rows(self, indices: Sequence[int]) -> EvaluationBatch:
        """The micro-batch of these rows."""

    @abstractmethod
    def new_metrics(self) -> Metrics:
        """Sums at zero."""

    @abstractmethod
    def result(self, vector: torch.Tensor) -> dict[str, float]:
        """The metrics, from the vector summed over all micro-batches and ranks."""

    @abstractmethod
    def num_targets(self, vector: torch.Tensor) -> int:
        """Targets scored, from the summed vector."""

    def scores(self, records: Sequence[Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Metrics that sums do not give, from the records of all ranks in any order, and files worth keeping (name and
        text), such as the predictions."""
        return {}, {}

    def tables(self, vector: torch.Tensor) -> dict[str, str]:
        """Files worth keeping (name and text) that follow from the summed vector, such as a confusion matrix."""
        return {}


class Task(ABC):
    """How to batch and score; one subclass a task.

    Attributes:
        name: as in the recipe.
    """

    name: str

    def __init__(self, data: PreparedData, sequence_len: int, target_sequence_len: int) -> None:
        self.data = data
        self.sequence_len = sequence_len
        self.target_sequence_len = target_sequence_len
        ids = data.special_token_ids
        self.pad_id = ids.get("pad", ids.get("eos", 0))

    @abstractmethod
    def collate(self, samples: Sequence[Sample], *, seed: tuple[int, ...]) -> Batch:
        """A micro-batch, int64 tensors. `seed` decides everything random in it."""

    @abstractmethod
    def num_targets(self, batch: Batch) -> int:
        """How many targets the model's mean loss over this micro-batch averages."""

    def logits(self, output: Any) -> torch.Tensor:
        """What `Metrics.update` reads, of a model's output."""
        logits: torch.Tensor = output.logits
        return logits

    @abstractmethod
    def evaluation_passes(
        self, samples: Samples, micro_batch_size: int, max_samples: int | None = None
    ) -> list[EvaluationPass]:
        """The passes that score these samples; the first `max_samples` of each pass only, if given."""


def pad(rows: Sequence[np.ndarray], limit: int, value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows filled up on the right to the longest of them, and a mask that is 1 on what was there.

    Args:
        rows: int64 [n] each; those longer than `limit` are cut.
        limit: longest row of the result.
        value: what they are filled up with.

    Returns:
        Both int64 [rows, length]; `length` is a multiple of `LENGTH_STEP` or the limit.
    """
    longest = max(len(row) for row in rows)
    length = min(-(-max(longest, 1) // LENGTH_STEP) * LENGTH_STEP, limit)
    padded = np.full((len(rows), length), value, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row[:length]
        mask[index, : len(row)] = 1
    return torch.from_numpy(padded), torch.from_numpy(mask)


def in_blocks(batch: Batch, positions: Sequence[np.ndarray | None]) -> Batch:
    """A packed micro-batch in which no token attends to another document.

    transformers tells the documents apart by `position_ids` that begin anew, if there is no mask. Padding becomes a
    document of its own. The first token of a document is no target: nothing before it belongs to it.

    Args:
        batch: `input_ids` and `labels`, int64 [rows, length]; its mask is dropped.
        positions: place of each token in its document, int64 [n] a row; None takes the row for one document.
    """
    length = batch["input_ids"].shape[1]
    rows = [np.arange(length) if row is None else row for row in positions]
    whole = [np.concatenate([row, np.arange(length - len(row))]) for row in rows]
    position_ids = torch.from_numpy(np.stack(whole).astype(np.int64))
    labels = batch["labels"].masked_fill(position_ids == 0, IGNORED)
    return {"input_ids": batch["input_ids"], "position_ids": position_ids, "labels": labels}


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, int]:
    """Sum of -log p(target) in nats over the targets that are not `IGNORED`, and how many those are.

    Args:
        logits: [..., vocabulary], any float type; computed in float32.
        targets: int64 [...].
    """
    total, count = 0.0, 0
    targets = targets.to(logits.device)
    # Row by row: a float32 copy of all logits at once could be larger than everything else on the device.
    for row_logits, row_targets in zip(logits, targets, strict=True):
        scored = row_targets != IGNORED
        if row_logits.dim() == 1:  # one distribution a row
            row_logits, row_targets, scored = row_logits[None], row_targets[None], scored[None]
        if not scored.any():
            continue
        log_probabilities = torch.log_softmax(row_logits[scored].float(), dim=-1)
        chosen = log_probabilities.gather(-1, row_targets[scored][:, None])
        total -= chosen.double().sum().item()
        count += int(scored.sum().item())
    return total, count


class LossMetrics(Metrics):
    """Summed loss and number of targets: vector [2]."""

    def __init__(self) -> None:
        super().__init__(2)

    def update(self, batch: EvaluationBatch, logits: torch.Tensor) -> None:
        total, count = negative_log_likelihood(logits, batch.targets)
        self.vector += torch.tensor([total, count], dtype=torch.float64)


class LossPass(EvaluationPass):
    """A pass whose result is `loss`, the mean over all targets in nats, and `perplexity`."""

    def new_metrics(self) -> Metrics:
        return LossMetrics()

    def result(self, vector: torch.Tensor) -> dict[str, float]:
        total, count = vector.tolist()
        loss = total / count if count else math.nan
        return {"loss": loss, "perplexity": exponential(loss)}

    def num_targets(self, vector: torch.Tensor) -> int:
        return round(vector[1].item())


def exponential(value: float) -> float:
    """e ** value, infinity where that is too large for a float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
