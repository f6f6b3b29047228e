"""Several loops that take turns on one rank, so that a pipeline has work for every stage.

A loop that generates text alternates between computing and waiting for the last stage's tokens. With one loop for each
batch in flight, a rank goes on with another batch instead of waiting. Each loop is a thread, but only one runs at a
time, and they follow each other in a fixed order: all ranks of a pipeline run the same loops and pause at the same
places, so their transfers match without any further agreement.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence


class Turns:
    """Runs loops in turns."""

    def __init__(self) -> None:
        self._running: _Loop | None = None

    def run(self, bodies: Sequence[Callable[[], None]]) -> None:
        """Run all bodies to their ends; what one of them raises is raised here at once."""
        if len(bodies) == 1:
            bodies[0]()
            return
        loops = [_Loop(body) for body in bodies]
        try:
            while loops:
                for loop in list(loops):
                    self._running = loop
                    loop.go_on()
                    if loop.is_over:
                        loops.remove(loop)
        finally:
            self._running = None

    def pause(self) -> None:
        """Called by a body: let the others have their turns. Returns at once when there are no others."""
        if self._running is not None:
            self._running.pause()


class _Loop:
    def __init__(self, body: Callable[[], None]) -> None:
        self.is_over = False
        self._error: BaseException | None = None
        self._body = body
        self._may_run, self._has_paused = threading.Semaphore(0), threading.Semaphore(0)
        # A loop that waits for its turn must not keep a failed process alive.
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Let the body run until it pauses or ends."""
        self._may_run.release()
        self._has_paused.acquire()
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        self._has_paused.release()
        self._may_run.acquire()

    def _run(self) -> None:
        self._may_run.acquire()
        try:
            self._body()
        except BaseException as error:
            self._error = error
        self.is_over = True
        self._has_paused.release()
