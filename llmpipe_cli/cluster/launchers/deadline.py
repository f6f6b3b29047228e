"""How long the ranks of a job may still take, once something has set a limit to it."""

from __future__ import annotations

import math
import time

from llmpipe_cli.cluster.outcome import Outcome
from llmpipe_cli.errors import RankError

# After a first failure the others get this long to fail too, so that the real cause is known before all are killed.
COLLECT_SECONDS = 3.0


class Deadline:
    """The end of the ranks' time: set by a request to stop, and by a failure, which leaves them less.

    Args:
        grace_seconds: how long the ranks may take to save and end after a stop is asked for.
    """

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._end = math.inf
        self._stopping = False
        self.failed = False

    def stop(self) -> None:
        """A stop was asked for; asking again gives no more time."""
        if not self._stopping and not self.failed:
            self._stopping, self._end = True, time.monotonic() + self._grace_seconds

    def fail(self) -> None:
        """A rank has failed."""
        if not self.failed:
            self.failed = True
            self._end = min(self._end, time.monotonic() + COLLECT_SECONDS)

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._end

    def unsaved(self) -> Outcome | None:
        """Outcome of ranks that did not end in time after a request to stop; None without one, or after a failure."""
        if not self._stopping or self.failed:
            return None
        error = RankError(
            f"the ranks did not save and end within {self._grace_seconds:g} s and were killed",
            hint="an earlier checkpoint is whole; --grace-seconds gives them more time",
        )
        return Outcome(error.exit_code, error)
