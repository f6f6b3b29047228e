"""Tokenises a stream of records into the files of a split, on all cores and in constant memory.

The records are cut into chunks of about `_CHUNK_CHARS` characters. Worker processes tokenise chunks; this process
writes the results in the order of the chunks, whatever order they come back in, so the files do not depend on how many
processes there are. Only a few chunks a process are on their way at any time. A small corpus is tokenised right here:
starting processes would take longer.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llmpipe_cli.data.sources import NUM_KEPT_EXAMPLES, Record, SkipLog
from llmpipe_cli.data.store import SplitWriter
from llmpipe_cli.data.tokenizer import Encoder
from llmpipe_cli.errors import PreflightError, UsageError
from llmpipe_cli.tasks.features import FeatureOptions, encode_records

_CHUNK_CHARS = 1 << 18
_CHUNK_RECORDS = 1024
_CHUNKS_A_PROCESS = 3  # one being tokenised, one waiting for its process, one finished and not yet written


@dataclass(frozen=True)
class _Tokenised:
    """A chunk's results: for each column all values, int32 [n], and each row's number of them; the rest as in
    `tasks.features.Features`."""

    tokens: dict[str, npt.NDArray[np.int32]]
    num_tokens: dict[str, list[int]]
    num_white_spaces: list[int]
    num_bytes: list[int]
    num_rows: list[int]
    truncated: list[int]
    errors: dict[int, str]
    examples: list[dict[str, Any]]


@dataclass
class Truncated:
    """Texts that were cut to the sequence length: how many, and the places of the first."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        """Counts one."""
        self.count += 1
        if len(self.examples) < NUM_KEPT_EXAMPLES:
            self.examples.append(where)


def tokenise(
    records: Iterator[Record],
    options: FeatureOptions,
    tokenizer_dir: str,
    writer: SplitWriter,
    label_id: Callable[[Record], int] | None,
    skipped: SkipLog,
    *,
    num_processes: int | None = None,
    progress: Callable[[], None] | None = None,
) -> Truncated:
    """Writes the features of all `records`; gives the texts that were cut to the sequence length.

    `label_id` gives the id of a record's label. A record that becomes nothing is reported to `skipped`. `progress` is
    called after each chunk.
    """
    truncated = Truncated()
    for chunk, result in _results(_chunks(records), options, tokenizer_dir, num_processes or available_cores()):
        for column, tokens in result.tokens.items():
            writer.append_tokens(column, tokens)
        for example in result.examples:
            writer.append_example(example)
        row = 0
        for index, record in enumerate(chunk):
            if index in result.errors:
                skipped.report(UsageError(result.errors[index], where=record.where))
            label = label_id(record) if label_id and result.num_rows[index] else None
            for number in range(result.num_rows[index]):
                writer.append_piece(
                    {column: counts[row] for column, counts in result.num_tokens.items()},
                    result.num_white_spaces[index] if number == 0 else 0,
                    result.num_bytes[index] if number == 0 else 0,
                    last=record.last,
                    label=label,
                )
                row += 1
        for index in result.truncated:
            truncated.add(chunk[index].where)
        if progress:
            progress()
    return truncated


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    num_chars = 0
    for record in records:
        chunk.append(record)
        num_chars += sum(len(text) for text in record.texts)
        if num_chars >= _CHUNK_CHARS or len(chunk) >= _CHUNK_RECORDS:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk


def _results(
    chunks: Iterator[list[Record]], options: FeatureOptions, tokenizer_dir: str, num_processes: int
) -> Iterator[tuple[list[Record], _Tokenised]]:
    """Each chunk with its result, in the chunks' order."""
    first = list(itertools.islice(chunks, 2 * num_processes))
    if num_processes == 1 or len(first) < 2 * num_processes:
        encoder = Encoder(tokenizer_dir)
        for chunk in itertools.chain(first, chunks):
            yield chunk, _encode(options, encoder, chunk)
        return
    # "spawn": a fork would copy the threads' locks of torch and tokenizers in whatever state they are
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, context, _start_process, (options, tokenizer_dir))
    try:
        waiting: deque[tuple[list[Record], Future[_Tokenised]]] = deque()
        for chunk in itertools.chain(first, chunks):
            with _interrupts_ignored():
                waiting.append((chunk, pool.submit(_encode_in_process, chunk)))
            if len(waiting) >= _CHUNKS_A_PROCESS * num_processes:
                oldest, result = waiting.popleft()
                yield oldest, result.result()
        while waiting:
            oldest, result = waiting.popleft()
            yield oldest, result.result()
    except BrokenProcessPool as error:
        raise PreflightError(
            "a process that tokenises was killed",
            hint="the machine may be out of memory: `dmesg | grep -i killed` tells; very long documents need most",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(options: FeatureOptions, encoder: Encoder, records: Sequence[Record]) -> _Tokenised:
    features = encode_records(options, encoder, records)
    return _Tokenised(
        {
            column: np.fromiter(itertools.chain.from_iterable(rows), np.int32, sum(map(len, rows)))
            for column, rows in features.tokens.items()
        },
        {column: [len(row) for row in rows] for column, rows in features.tokens.items()},
        features.num_white_spaces,
        features.num_bytes,
        features.num_rows,
        features.truncated,
        features.errors,
        features.examples,
    )


_process: tuple[FeatureOptions, Encoder] | None = None  # of a worker process


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started in here ignore Ctrl-C from their first moment, also while they import; the parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start_process(options: FeatureOptions, tokenizer_dir: str) -> None:
    global _process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _process = options, Encoder(tokenizer_dir)


def _end_with_parent() -> None:
    """Ends this process when its parent was killed and could not end it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_process(records: list[Record]) -> _Tokenised:
    assert _process is not None
    options, encoder = _process
    return _encode(options, encoder, records)
