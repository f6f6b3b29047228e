"""Training samples straight from the source, for text that is too much to prepare: nothing is written to disk.

    records -> tokens -> blocks of `sequence_len` -> buffers of `shuffle_buffer` blocks, each in an order of its own

One rank reads; a thread tokenises ahead of it. At its end the source begins again. The order follows from the source
and the seed: place p of the stream is in buffer p // `shuffle_buffer`, and each buffer is permuted like an epoch of
finite data. So a position is a buffer's number and where that buffer begins in the source: a round, a record, and a
token in it. Going on from there reads the records before it once more, without tokenising them.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmpipe_cli.data.cleaning import Cleaner
from llmpipe_cli.data.order import SampleOrder
from llmpipe_cli.data.prepared import PreparedSplit
from llmpipe_cli.data.sources import Record, SkipLog, open_source
from llmpipe_cli.data.tokenizer import Encoder
from llmpipe_cli.errors import UsageError
from llmpipe_cli.recipe.schema import Cleaning, DataSource
from llmpipe_cli.tasks.features import FeatureOptions, encode_records, record_fields

_CHUNK_RECORDS = 256
_BUFFERS_AHEAD = 2


@dataclass(frozen=True)
class Place:
    """Where a buffer begins: `round` counts passes over the source, `record` its records (pieces of long documents),
    `token` the tokens of that record which came before."""

    round: int = 0
    record: int = 0
    token: int = 0


@dataclass(frozen=True)
class Buffer:
    """Blocks in the source's order.

    Attributes:
        number: of the buffer, from 0.
        start: where it begins.
        stop: where the next one does.
        tokens: int32 [blocks, sequence_len].
        begins: bool, of the same shape: the first token of a document.
    """

    number: int
    start: Place
    stop: Place
    tokens: npt.NDArray[np.int32]
    begins: npt.NDArray[np.bool_]


class SampleStream:
    """The samples of a streamed split, by their place in the stream; places are asked for in rising order.

    Args:
        split: of the kind "stream".
        seed: decides the order within buffers.
        shuffle: off keeps the source's order.
        state: what `state` gave; None begins at the beginning.

    Attributes:
        skipped: records that were left out since this object began.
    """

    def __init__(self, split: PreparedSplit, seed: int, shuffle: bool, state: dict[str, int] | None = None) -> None:
        assert split.stream is not None
        self.split = split
        self.size = int(split.stream["shuffle_buffer"])
        self.order = SampleOrder(self.size, seed, shuffle)
        self.skipped = SkipLog(DataSource.model_validate(split.stream["source"]).on_error)
        first = dict(state or {"buffer": 0, **asdict(Place())})
        number = first.pop("buffer")
        self._next = (number, Place(**first))
        self._held: dict[int, Buffer] = {}
        self._queue: queue.Queue[Buffer | BaseException] = queue.Queue(_BUFFERS_AHEAD)
        self._thread = threading.Thread(target=self._produce, args=self._next, daemon=True)
        self._thread.start()

    def samples(self, start: int, stop: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Tokens and first places of documents at places [start, stop), [stop - start, sequence_len] each.

        Raises:
            UsageError: a malformed record, or a source that cannot be read.
        """
        while self._next[0] * self.size < stop:
            found = self._queue.get()
            if isinstance(found, BaseException):
                raise found
            self._held[found.number] = found
            self._next = (found.number + 1, found.stop)
        for number in [each for each in self._held if (each + 1) * self.size <= start]:
            del self._held[number]
        rows = self.order.at(np.arange(start, stop))
        chosen = [(self._held[place // self.size], row) for place, row in zip(range(start, stop), rows, strict=True)]
        return np.stack([each.tokens[row] for each, row in chosen]), np.stack(
            [each.begins[row] for each, row in chosen]
        )

    def state(self, place: int) -> dict[str, int]:
        """What going on at `place` needs, as JSON; `place` is the end of what was asked for."""
        number = place // self.size
        start = self._held[number].start if number in self._held else self._next[1]
        return {"buffer": number, **asdict(start)}

    def _produce(self, number: int, start: Place) -> None:
        try:
            for buffer in buffers(self.split, number, start, self.skipped):
                self._queue.put(buffer)
        except BaseException as error:  # raised where the samples are asked for
            self._queue.put(error)


def buffers(split: PreparedSplit, number: int, start: Place, skipped: SkipLog) -> Iterator[Buffer]:
    """All buffers from `number` on, which begins at `start`; they never end."""
    assert split.stream is not None
    size = int(split.stream["shuffle_buffer"]) * split.sequence_len
    tokens: list[npt.NDArray[np.int32]] = []
    begins: list[npt.NDArray[np.bool_]] = []
    count = 0
    for place, ids, first in _encoded(split, start, skipped):
        used = 0
        while count + len(ids) - used >= size:
            end = used + size - count
            tokens.append(ids[used:end])
            begins.append(_first_places(end - used, first and used == 0))
            stop = replace(place, token=place.token + end)
            shape = (-1, split.sequence_len)
            yield Buffer(
                number, start, stop, np.concatenate(tokens).reshape(shape), np.concatenate(begins).reshape(shape)
            )
            number, start, used, count, tokens, begins = number + 1, stop, end, 0, [], []
        if used < len(ids):
            tokens.append(ids[used:])
            begins.append(_first_places(len(ids) - used, first and used == 0))
            count += len(ids) - used


def _first_places(count: int, first: bool) -> npt.NDArray[np.bool_]:
    marks = np.zeros(count, np.bool_)
    marks[:1] = first
    return marks


def _encoded(
    split: PreparedSplit, start: Place, skipped: SkipLog
) -> Iterator[tuple[Place, npt.NDArray[np.int32], bool]]:
    """Each record's place (of the first token given), its tokens from there, and whether they begin a document."""
    about: dict[str, Any] = split.stream or {}
    options = FeatureOptions(**{**about["options"], "texts": tuple(about["options"]["texts"])})
    encoder, first_record, first_token = Encoder(about["tokenizer_dir"]), start.record, start.token
    for turn in itertools.count(start.round):
        num_tokens = 0
        records = enumerate(_records(split, options, skipped))
        wanted = itertools.islice(records, first_record, None)
        while chunk := list(itertools.islice(wanted, _CHUNK_RECORDS)):
            rows = encode_records(options, encoder, [record for _, record in chunk]).tokens["input_ids"]
            for (index, record), row in zip(chunk, rows, strict=True):
                skip = first_token if index == first_record else 0
                num_tokens += len(row)
                yield Place(turn, index, skip), np.asarray(row[skip:], np.int32), record.first and skip == 0
        if num_tokens == 0 and first_record == 0:
            raise UsageError("there is no text in the stream", where="data.train")
        first_record = first_token = 0


def _records(split: PreparedSplit, options: FeatureOptions, skipped: SkipLog) -> Iterator[Record]:
    about: dict[str, Any] = split.stream or {}
    section = DataSource.model_validate(about["source"])
    source = open_source(section, Path(about["base_dir"]), where="data.train", default_split="train")
    records = source.records(record_fields(options), skipped, section.max_documents)
    if about["clean"] is not None:
        records = Cleaner(Cleaning.model_validate(about["clean"])).records(records, skipped)
    return records


def positions_of(begins: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Place of each token within its document, as far as that lies in the block; int64 of the shape of `begins`."""
    places = np.broadcast_to(np.arange(begins.shape[-1]), begins.shape)
    return places - np.maximum.accumulate(np.where(begins, places, 0), axis=-1)
