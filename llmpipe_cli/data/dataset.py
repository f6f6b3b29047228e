"""Reading a prepared split by index: `Samples` are memory-mapped and cost nothing to open on every rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmpipe_cli.data.bins import best_fit
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
    if split.kind == "stream":
        raise ValueError("a stream has no samples by index")
    if split.kind == "mixture":
        return MixedSamples(split)
    if split.kind == "packed":
        return PackedSamples(split)
    if split.kind == "bins":
        return BinnedSamples(split)
    if split.kind == "records":
        return RecordSamples(split)
    return SyntheticSamples(split)


class PackedSamples(Samples):
    """Consecutive blocks of `sequence_len` tokens: `input_ids`, any column beside it, and `positions`, which begin at 0
    with each document and with the block; int64 [sequence_len] (shorter only where the whole split is shorter)."""

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
        sample = {name: self.documents.tokens[name][start:stop].astype(np.int64) for name in columns}
        return sample | {"positions": self._positions(start, start + len(sample["input_ids"]))}

    def _positions(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Place of each token within its document, as far as that lies in [start, stop)."""
        assert self.documents is not None
        starts = self.documents.starts["input_ids"]
        # not numpy's search, which would copy the whole column out of the mapped table
        first, last = bisect_right(starts, start), bisect_right(starts, stop - 1)
        begins = np.concatenate([[start], starts[first:last]]).astype(np.int64)
        places = np.arange(start, stop)
        return places - begins[np.searchsorted(begins, places, side="right") - 1]


class RecordSamples(Samples):
    """One document a sample: the token columns cut to their lengths, int64 [n], and `label`, int64 [], if any."""

    def __init__(self, split: PreparedSplit) -> None:
        self.split = split
        self.documents = Documents(Path(split.directory))

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.record(index)

    def record(self, index: int) -> Sample:
        """Document `index`."""
        documents = self.documents
        assert documents is not None
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


class BinnedSamples(RecordSamples):
    """Several whole documents a sample, `sequence_len` tokens at most: the columns of `RecordSamples` one after the
    other, and `positions`, which begin at 0 with each document; int64 [n]."""

    def __init__(self, split: PreparedSplit) -> None:
        super().__init__(split)
        assert self.documents is not None
        self.bins = best_fit(self.documents.counts["input_ids"], split.sequence_len)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        parts = [self.record(document) for document in self.bins[index]]
        positions = [np.arange(len(part["input_ids"])) for part in parts]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return joined | {"positions": np.concatenate(positions)}


class MixedSamples(Samples):
    """The samples of several sources, counted through one after the other."""

    def __init__(self, split: PreparedSplit) -> None:
        self.split = split
        self.parts = [open_split(part) for part in split.parts]
        self.sizes = [len(part) for part in self.parts]
        self._stops = np.cumsum(self.sizes)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._stops, index, side="right"))
        return self.parts[part][index - (int(self._stops[part]) - self.sizes[part])]


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
