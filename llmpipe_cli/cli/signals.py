"""Requests to stop: Ctrl-C, SIGTERM (preemption, `kill`) and SIGHUP (a closed terminal).

Before ranks run there is nothing to save, and `StopRequested` ends the command at once. While they run, `StopSignals`
counts the requests and its user decides: the first asks the ranks to save and stop, a Ctrl-C after that kills them.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequested(BaseException):
    """A signal came while no rank was running. Not an `Exception`, so that nothing on the way swallows it."""


def raise_on_signals() -> None:
    """From now on a request to stop raises `StopRequested` in the main thread."""

    def handler(_signum: int, _frame: FrameType | None) -> None:
        for sig in _SIGNALS:
            signal.signal(sig, signal.SIG_IGN)
        raise StopRequested

    for sig in _SIGNALS:
        # nohup leaves SIGHUP ignored, and so it stays.
        if signal.getsignal(sig) is not signal.SIG_IGN:
            signal.signal(sig, handler)


class StopSignals:
    """While entered, requests are counted instead of raised."""

    def __init__(self) -> None:
        self.stop = False
        """A stop was asked for."""
        self.kill = False
        """Ctrl-C came after that."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for sig in _SIGNALS:
            if signal.getsignal(sig) is not signal.SIG_IGN:
                self._before[sig] = signal.signal(sig, self._handle)
        return self

    def __exit__(self, *details: object) -> None:
        for sig, handler in self._before.items():
            signal.signal(sig, handler)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        self.kill = self.kill or (self.stop and signum == signal.SIGINT)
        self.stop = True
