"""Checkpoints in the background: training stands still for the copy only.

A save copies what this rank holds between two steps, into memory that is kept for the next save, and hands the copy to
a thread, which writes it together with the threads of the other ranks, over a process group of their own. One
checkpoint is written at a time: the next save, a request to stop and the end of training wait for it. A rank that could
not write makes all threads fail alike; training hears of it at the end of the step in which the first of them did.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llmpipe_cli.engine.checkpoint import HostCopies, take_snapshot, write_checkpoint
from llmpipe_cli.engine.pipeline import Engine
from llmpipe_cli.model.weights import stage_state_dict

# Writing is not urgent: on a machine without cores to spare it takes time from nobody.
_NICENESS = 10


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on disk.

    Attributes:
        step: optimizer steps done.
        path: its directory.
        seconds: from the request until it was whole.
        stall_seconds: for how long training stood still.
    """

    step: int
    path: Path
    seconds: float
    stall_seconds: float


class Saver:
    """Writes this rank's part of checkpoints; every rank has one, and they are made and used together.

    Args:
        engine: what will be saved.
    """

    def __init__(self, engine: Engine) -> None:
        self._group = dist.new_group(backend="gloo")
        self._copies = HostCopies()
        # transformers makes up its tables of weight names at the first call: a quarter of a second, better spent here.
        stage_state_dict(engine.module.skeleton, [])
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        self._problem: Exception | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the checkpoint under way could not be written; `wait` raises why."""
        return self._problem is not None

    def start(
        self,
        engine: Engine,
        directory: Path,
        step: int,
        state: dict[str, Any],
        write_assets: Callable[[Path], None],
        max_shard_size: str,
        finish: Callable[[Path], None],
    ) -> None:
        """Copy, and begin to write. The one before has to be done (`wait`).

        Args:
            engine, directory, step, state, write_assets, max_shard_size: see `engine.checkpoint`; `state` and
                `write_assets` must not look at what training changes.
            finish: rank 0: called with the whole checkpoint, in the thread.
        """
        assert self._thread is None, "the last checkpoint is still being written"
        started = time.perf_counter()
        snapshot = take_snapshot(engine, max_shard_size, self._copies)
        stall_seconds = time.perf_counter() - started

        def write() -> None:
            try:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
                path = write_checkpoint(snapshot, directory, step, state, write_assets, self._group, finish)
                self._saved = Saved(step, path, time.perf_counter() - started, stall_seconds)
            except Exception as error:
                self._problem = error

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> Saved | None:
        """The checkpoint that was finished since the last call, if one was; does not wait."""
        if self._thread is None or self._thread.is_alive() or self.has_failed:
            return None
        return self.wait()

    def wait(self) -> Saved | None:
        """Wait for the checkpoint under way, if there is one.

        Raises:
            CheckpointError: on every rank, when any rank could not write.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread, saved, problem = None, self._saved, self._problem
        self._saved = self._problem = None
        if problem is not None:
            raise problem
        return saved
