"""Reading a prepared split by index: `Samples` are memory-mapped and cost nothing to open on every rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmpipe_cli.data.prepared import PreparedSplit
from llmpipe_cli.data.store import Documents

Sample = dict[str, npt.NDArray[np.int64]]

# Columns that say something of a document as a whole: cutting its tokens leaves them as they are.
_NOT_A_VALUE_A_TOKEN = ("facts", "offsets", "classes")


class Samples(ABC):
    """The samples of a split; `samples[i]` is a dict of int64 arrays [n] (`label`: a 0-d array)."""

    split: PreparedSplit
    documents: Documents | None = None
    """The arrays behind the samples; None for synthetic data."""

    def __len__(self) -> int:
        return self.split.num_samples

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...


def open_split(split: PreparedSplit) -> Samples:
    """Opens a split that `prepare` wrote."""
    if split.kind == "packed":
        return PackedSamples(split)
    if split.kind == "records":
        return RecordSamples(split)
    return SyntheticSamples(split)


class PackedSamples(Samples):
    """Consecutive blocks of `sequence_len` tokens: `input_ids` and any column beside it, int64 [sequence_len] (shorter
    only where the whole split is shorter than a block)."""

    def __init__(self, split: PreparedSplit) -> None:
        self.split = split
        self.documents = Documents(Path(split.directory))

    def __getitem__(self, index: int) -> Sample:
        assert self.documents is not None
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.split.sequence_len
        stop = start + self.split.sequence_len
        columns = self.documents.meta.columns
        return {name: self.documents.tokens[name][start:stop].astype(np.int64) for name in columns}


class RecordSamples(Samples):
    """One document a sample: the token columns cut to their lengths, int64 [n], and `label`, int64 [], if any."""

    def __init__(self, split: PreparedSplit) -> None:
        self.split = split
        self.documents = Documents(Path(split.directory))

    def __getitem__(self, index: int) -> Sample:
        documents = self.documents
        assert documents is not None
        if not 0 <= index < len(self):
            raise IndexError(index)
        sample: Sample = {}
        for name in documents.meta.columns:
            start = int(documents.starts[name][index])
            count = int(documents.counts[name][index]) + documents.meta.separated
            if name not in _NOT_A_VALUE_A_TOKEN:
                limit = self.split.target_sequence_len if name == "labels" else self.split.sequence_len
                count = min(count, limit)
            sample[name] = documents.tokens[name][start : start + count].astype(np.int64)
        if documents.labels is not None:
            sample["label"] = np.asarray(documents.labels[index], np.int64)
        return sample


class SyntheticSamples(Samples):
    """Random token ids of full length; sample i is always the same."""

    def __init__(self, split: PreparedSplit) -> None:
        self.split = split
        self._key = int(split.fingerprint, 16)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        random = np.random.default_rng((self._key, index))
        split = self.split
        sample: Sample = {"input_ids": random.integers(0, split.vocab_size, split.sequence_len)}
        if split.task == "translation":
            sample["labels"] = random.integers(0, split.vocab_size, split.target_sequence_len)
        elif split.task == "chat":
            sample["answered"] = np.ones(split.sequence_len, np.int64)
        elif split.task == "question-answering":
            start, end = np.sort(random.integers(0, split.sequence_len, 2))
            sample["facts"] = np.array([1, start, end, 0, 0], np.int64)
            sample["token_types"] = np.zeros(split.sequence_len, np.int64)
        elif split.task == "token-classification":
            sample["tags"] = random.integers(0, split.num_labels, split.sequence_len)
        elif split.num_labels:
            sample["label"] = np.asarray(random.integers(0, split.num_labels), np.int64)
        return sample
