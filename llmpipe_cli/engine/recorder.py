"""What a rank did in a step, and when: a few clock readings an instruction, kept for the last step.

Times are of the host's clock. On an accelerator an instruction ends when its work has been handed over, not when it is
done.
"""

from __future__ import annotations

import time
from typing import NamedTuple


class Record(NamedTuple):
    """One piece of work.

    Attributes:
        kind: an instruction (F, B, I, W) or another part of the step: data, send, reduce, norm, optimizer, exchange.
        micro_batch: its micro-batch, counted within the replica; none outside instructions.
        chunk: the chunk of the stage that it ran; 0 outside instructions.
        begin: when it began to wait for its input, in seconds since the step began.
        start: when it began to work.
        end: when it was done.
    """

    kind: str
    micro_batch: int | None
    chunk: int
    begin: float
    start: float
    end: float


class OpenPiece(NamedTuple):
    """A piece of work that is not done.

    Attributes:
        kind: as in Record.
        micro_batch: as in Record.
        waiting: it waits for another rank.
        begin: when it began, by `time.perf_counter`.
    """

    kind: str
    micro_batch: int | None
    waiting: bool
    begin: float


PARTS = ("busy", "wait_activations", "wait_gradients", "send", "reduce", "optimizer", "data")
"""What a step's time is spent on: computing passes, waiting for the input of forward and of backward passes, waiting
until everything is sent, reducing gradients and their norm (with the wait for other stages), the optimizer, reading."""

_INSTRUCTIONS = frozenset("FBIW")
_NOTHING: tuple[str, int | None, int] = ("", None, 0)
# Pieces that wait for their input before they work, and pieces that are nothing but an exchange with other ranks.
_WITH_INPUT = frozenset("FBI")
# (The optimizer exchanges parts of its state under ZeRO.)
_COLLECTIVES = frozenset(("send", "reduce", "norm", "optimizer", "exchange"))


class Recorder:
    """Records the pieces of one step, one after another; pieces do not overlap."""

    def __init__(self) -> None:
        self._origin = time.perf_counter()
        self._rows: list[tuple[str, int | None, int, float, float, float]] = []
        self._open = _NOTHING
        self._begin = self._start = 0.0

    def restart(self) -> None:
        """Forget the last step; the next one begins now."""
        self._rows.clear()
        self._origin = time.perf_counter()

    def begin(self, kind: str, micro_batch: int | None = None, chunk: int = 0) -> None:
        """A piece begins, first waiting for its input if it calls `arrived`."""
        self._open = (kind, micro_batch, chunk)
        self._begin = self._start = time.perf_counter()

    def arrived(self) -> None:
        """The open piece has its input."""
        self._start = time.perf_counter()

    def end(self, waited: bool = False) -> None:
        """The open piece is done; `waited`: all of it was waiting for others."""
        now = time.perf_counter()
        self._rows.append((*self._open, self._begin, now if waited else self._start, now))
        self._open = _NOTHING

    def open_piece(self) -> OpenPiece | None:
        """What this rank is in the middle of; other threads may ask."""
        kind, micro_batch, *_ = self._open
        if not kind:
            return None
        waiting = kind in _COLLECTIVES or (kind in _WITH_INPUT and self._start == self._begin)
        return OpenPiece(kind, micro_batch, waiting, self._begin)

    def records(self) -> list[Record]:
        """The pieces since `restart`, in order."""
        origin = self._origin
        return [
            Record(kind, index, chunk, *(moment - origin for moment in moments))
            for kind, index, chunk, *moments in self._rows
        ]

    def seconds(self) -> dict[str, float]:
        """Where the time since `restart` went: see `PARTS`."""
        parts = dict.fromkeys(PARTS, 0.0)
        for kind, _, _, begin, start, end in self._rows:
            if kind in _INSTRUCTIONS:
                parts["busy"] += end - start
                parts["wait_activations" if kind == "F" else "wait_gradients"] += start - begin
            elif kind in ("reduce", "norm"):
                parts["reduce"] += end - begin
            elif kind in parts:
                parts[kind] += end - begin
        return parts
