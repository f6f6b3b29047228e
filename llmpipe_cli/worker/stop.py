"""Requests to stop: SIGTERM or SIGUSR1 to any rank, or the run's stop file.

A request only sets a flag; the ranks share it where they can leave together: training at the end of a step, so that all
save the same step, evaluation and generation between micro-batches.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType


class StopRequested(Exception):  # noqa: N818 (a request, not an error)
    """Work was left because a rank was asked to stop; raised on all ranks of the job together."""


class StopFlag:
    """Whether this rank was asked to stop.

    Args:
        file: a file whose existence is a request; none looks at signals only.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the controller hears Ctrl-C and decides

    def is_set(self) -> bool:
        """Whether a request came in."""
        return self._signalled or (self._file is not None and self._file.exists())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
