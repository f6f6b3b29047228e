"""What a rank did in a step, and when: a few clock readings an instruction, kept for the last step.

An accelerator is handed its work long before it does it, so there times are the device's own (`engine.device_clock`).
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple


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
        begin: when it began, by `time.perf_counter`; on an accelerator when it was handed over.
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
# How many pieces the host may be ahead of what is done: enough that the device always has work, few enough that a piece
# which does not end is noticed before the whole step has been handed over.
_PIECES_AHEAD = 4


class Clock:
    """The host's clock, for work that is done when the call that does it returns."""

    def restart(self) -> None:
        """No earlier moment is asked for any more."""

    def moment(self) -> Any:
        """Now."""
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two moments that are past."""
        return end - start

    def is_past(self, moment: Any) -> bool:
        """Whether a moment has come."""
        return True

    def wait(self, moment: Any) -> None:
        """Wait until a moment has come."""


class _Row(NamedTuple):
    """A piece whose work is done or handed over; moments of the recorder's clock, and the host's time at its begin."""

    kind: str
    micro_batch: int | None
    chunk: int
    begin: Any
    start: Any
    end: Any
    host_begin: float


class Recorder:
    """Records the pieces of one step, one after another; pieces do not overlap.

    Args:
        clock: tells when work is done; by default on the host.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or Clock()
        self._rows: list[_Row] = []
        self._open = _NOTHING
        self._host_begin = 0.0
        self._origin = self._begin = self._start = self._clock.moment()
        self._arrived = False

    def restart(self) -> None:
        """Forget the last step; the next one begins now."""
        self._rows.clear()
        self._clock.restart()
        self._origin = self._clock.moment()

    def begin(self, kind: str, micro_batch: int | None = None, chunk: int = 0) -> None:
        """A piece begins, first waiting for its input if it calls `arrived`."""
        if len(self._rows) >= _PIECES_AHEAD:
            self._clock.wait(self._rows[-_PIECES_AHEAD].end)
        self._arrived, self._host_begin = False, time.perf_counter()
        self._open = (kind, micro_batch, chunk)
        self._begin = self._start = self._clock.moment()

    def arrived(self) -> None:
        """The open piece has its input, or the device stands still until it has."""
        self._start = self._clock.moment()
        self._arrived = True

    def end(self, waited: bool = False) -> None:
        """The open piece is done or handed over; `waited`: all of it was waiting for others."""
        now = self._clock.moment()
        self._rows.append(_Row(*self._open, self._begin, now if waited else self._start, now, self._host_begin))
        self._open = _NOTHING

    def open_piece(self) -> OpenPiece | None:
        """What this rank is in the middle of; other threads may ask."""
        row = next((row for row in list(self._rows) if not self._clock.is_past(row.end)), None)
        if row is not None:
            has_input = self._clock.is_past(row.start)
            kind, micro_batch, begin = row.kind, row.micro_batch, row.host_begin
        else:
            has_input = self._arrived and self._clock.is_past(self._start)
            (kind, micro_batch, _), begin = self._open, self._host_begin
        if not kind:
            return None
        waiting = kind in _COLLECTIVES or (kind in _WITH_INPUT and not has_input)
        return OpenPiece(kind, micro_batch, waiting, begin)

    def records(self) -> list[Record]:
        """The pieces since `restart`, in order; waits until they are done."""
        since = self._clock.seconds
        return [
            Record(kind, index, chunk, *(since(self._origin, moment) for moment in moments))
            for kind, index, chunk, *moments, _ in self._done()
        ]

    def seconds(self) -> dict[str, float]:
        """Where the time since `restart` went, see `PARTS`; waits until all of it is done."""
        parts, between = dict.fromkeys(PARTS, 0.0), self._clock.seconds
        for kind, _, _, begin, start, end, _ in self._done():
            if kind in _INSTRUCTIONS:
                parts["busy"] += between(start, end)
                parts["wait_activations" if kind == "F" else "wait_gradients"] += between(begin, start)
            elif kind in ("reduce", "norm"):
                parts["reduce"] += between(begin, end)
            elif kind in parts:
                parts[kind] += between(begin, end)
        return parts

    def _done(self) -> list[_Row]:
        if self._rows:
            self._clock.wait(self._rows[-1].end)
        return self._rows
