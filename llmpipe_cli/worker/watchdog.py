"""Ends a job that hangs, and says where.

A thread of every rank beats once a second: it puts a counter and what the rank is doing into the job's key-value store
(the one over which the ranks met). Ranks 0 and 1 read the beats of all. From this the kinds of hang can be told apart:

* a rank has been *working* on one piece of a step for too long: it says so itself, with its own stack;
* a rank's counter stands still, because its process is stopped or its machine is gone;
* every rank *waits* for another one;
* the store itself does not answer, because rank 0, which may hold it, is stopped. Calls to it then never return, so a
  second thread does the judging.

Whoever notices writes its failure and ends with the exit code of a failed rank; the launcher ends the others. Counters
are compared with the watcher's own clock, so the hosts' clocks may differ. Nothing is judged between steps, where
saving may rightly take long, other than counters that stand still.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from llmpipe_cli.engine.recorder import Recorder
from llmpipe_cli.errors import RankError
from llmpipe_cli.run import RunDirectory
from llmpipe_cli.worker.failure import write_failure

_BEAT_SECONDS = 1.0
_NUM_WATCHERS = 2  # the second one watches the first
# Tensor shards exchange within their work: a silent one is to be named before those that hang because of it.
_PATIENCE = 1.25
_STORE_TIMEOUT = timedelta(seconds=60)
_STOP_SECONDS = 5.0
_DONE = -1
_SHOWN = 4


@dataclass
class _Seen:
    """Last news of a rank: its beat, and when the counter and the piece changed by the watcher's clock."""

    beat: dict[str, Any]
    counter_since: float
    piece_since: float


class Watchdog:
    """Watches this rank and, on the first two ranks, all others; `start` and forget.

    Args:
        run: where a failure is written.
        rank: this rank.
        world_size: number of ranks.
        stage: its pipeline stage.
        recorder: what this rank is doing.
        step: the step it is in.
        limit_seconds: how long one piece of a step may take, and how long a rank may be silent.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        rank: int,
        world_size: int,
        stage: int,
        recorder: Recorder,
        step: Callable[[], int],
        limit_seconds: float,
    ) -> None:
        self._run, self._rank, self._world_size = run, rank, world_size
        self._place = {"host": socket.gethostname(), "stage": stage}
        self._recorder, self._step, self._limit = recorder, step, limit_seconds
        self._seen: dict[int, _Seen] = {}
        self._lock = threading.Lock()  # of `_seen`
        self._answered = time.monotonic()  # when the store last did
        self._stopped = threading.Event()
        self._main_thread = threading.get_ident()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._beat, "watchdog-beat"), (self._judge, "watchdog"))
        ]

    def start(self) -> None:
        """Begin to beat and to judge."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """The rank is done; its silence means nothing from here on."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(_STOP_SECONDS)

    def _beat(self) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = dist.PrefixStore("watchdog", dist.TCPStore(host, port, is_master=False, timeout=_STORE_TIMEOUT))
            counter = 0
            while not self._stopped.wait(_BEAT_SECONDS):
                counter += 1
                store.set(str(self._rank), json.dumps({"counter": counter, **self._position()}))
                if self._rank < _NUM_WATCHERS:
                    self._look(store)
                self._answered = time.monotonic()
            store.set(str(self._rank), json.dumps({"counter": _DONE, **self._position()}))
        except dist.DistError:
            self._answered = math.inf  # the store is gone, and with it the job: whoever ended it says why

    def _judge(self) -> None:
        while not self._stopped.wait(_BEAT_SECONDS):
            self._check_self()
            if self._rank < _NUM_WATCHERS:
                with self._lock:
                    self._check_others()

    def _position(self) -> dict[str, Any]:
        piece = self._recorder.open_piece()
        where = (
            {"kind": None, "micro_batch": None, "waiting": False, "begin": 0.0} if piece is None else piece._asdict()
        )
        return {**self._place, "step": self._step(), **where}

    def _check_self(self) -> None:
        piece = self._recorder.open_piece()
        if piece is None or piece.waiting or time.perf_counter() - piece.begin < _PATIENCE * self._limit:
            return
        stack = "".join(traceback.format_stack(sys._current_frames()[self._main_thread]))
        beat = self._position()
        self._fail(self._rank, beat, f"has been at {_doing(beat)} for more than {self._limit:g} s", stack)

    def _look(self, store: dist.Store) -> None:
        for rank in range(self._world_size):
            if not store.check([str(rank)]):
                continue  # it has not come that far yet
            beat = json.loads(store.get(str(rank)))
            now = time.monotonic()
            with self._lock:
                seen = self._seen.setdefault(rank, _Seen(beat, now, now))
                if beat["counter"] != seen.beat["counter"]:
                    seen.counter_since = now
                if _piece(beat) != _piece(seen.beat):
                    seen.piece_since = now
                seen.beat = beat

    def _check_others(self) -> None:
        now = time.monotonic()
        if now - self._answered > self._limit:
            self._fail_silent(0, self._seen[0].beat if 0 in self._seen else None)
        for rank, seen in self._seen.items():
            if seen.beat["counter"] != _DONE and now - seen.counter_since > self._limit:
                self._fail_silent(rank, seen.beat)
        if len(self._seen) == self._world_size and all(
            seen.beat["waiting"] and now - seen.piece_since > _PATIENCE * self._limit for seen in self._seen.values()
        ):
            beat = self._seen[self._rank].beat
            self._fail(self._rank, beat, f"every rank has waited for {self._limit:g} s{self._waiting()}")

    def _fail_silent(self, rank: int, beat: dict[str, Any] | None) -> None:
        last = "it never said anything" if beat is None else f"it was last seen at {_doing(beat)}"
        self._fail(rank, beat, f"has been silent for {self._limit:g} s; {last}{self._waiting()}")

    def _waiting(self) -> str:
        """What those ranks wait for that do wait."""
        beats = {rank: seen.beat for rank, seen in self._seen.items()} | {self._rank: self._position()}
        waiting = [(rank, beat) for rank, beat in beats.items() if beat["waiting"]]
        texts = [f"rank {rank} (stage {beat['stage']}) waits at {_doing(beat)}" for rank, beat in waiting[:_SHOWN]]
        more = f", and {len(waiting) - _SHOWN} more" if len(waiting) > _SHOWN else ""
        return f"; {'; '.join(texts)}{more}" if texts else ""

    def _fail(self, rank: int, beat: dict[str, Any] | None, what: str, stack: str = "") -> None:
        if self._stopped.is_set():
            return
        place = beat or {"host": os.environ["MASTER_ADDR"], "stage": 0}
        error = RankError(
            what,
            where=f"rank {rank} (host {place['host']}, stage {place['stage']})",
            hint="is that process stopped, its machine swapping, its disk or network gone? "
            "`train.hang_timeout_seconds` sets how long is too long",
        )
        write_failure(self._run, self._rank, error, stack)
        os._exit(error.exit_code)


def _piece(beat: dict[str, Any]) -> tuple[Any, ...]:
    return beat["step"], beat["kind"], beat["micro_batch"], beat["begin"]


def _doing(beat: dict[str, Any]) -> str:
    if beat["kind"] is None:
        return f"step {beat['step']}, between instructions"
    of = "" if beat["micro_batch"] is None else f" of micro-batch {beat['micro_batch']}"
    return f"step {beat['step']}, {beat['kind']}{of}"
