"""Jobs whose ranks somebody else starts on nodes that share the run directory: by hand, or Kubernetes.

The controller has no process to hold on to: it reads the records that the ranks leave in the run directory.
"""

from __future__ import annotations

from collections.abc import Callable

from llmpipe_cli.cluster.launchers.base import Job, LaunchSpec
from llmpipe_cli.cluster.launchers.deadline import Deadline
from llmpipe_cli.cluster.outcome import Outcome, ended_ranks, has_failed, judge
from llmpipe_cli.errors import EXIT_INTERRUPTED, NodeError


class WatchedJob(Job):
    """A job that is known by its files alone.

    Args:
        spec: the job.
        remove: ends whatever still runs; None where nobody but the user can.
    """

    def __init__(self, spec: LaunchSpec, remove: Callable[[], None] | None = None) -> None:
        self._spec, self._remove = spec, remove
        self._deadline = Deadline(spec.grace_seconds)
        self._killed = False
        self._outcome: Outcome | None = None

    def poll(self) -> Outcome | None:
        if self._outcome is None:
            run, count = self._spec.run, self._spec.num_ranks
            if has_failed(run, count):
                self._deadline.fail()
            if self._killed or self._deadline.is_over or len(ended_ranks(run, count)) == count:
                self._outcome = self._finish()
        return self._outcome

    def request_stop(self) -> None:
        self._spec.run.request_stop()
        self._deadline.stop()

    def kill(self) -> None:
        self._killed = True
        self._spec.run.request_stop()
        self.poll()

    def _finish(self) -> Outcome:
        if self._remove is not None:
            self._remove()
        if self._killed:
            return Outcome(EXIT_INTERRUPTED)
        outcome = judge(self._spec.run, self._spec.stages, 0)
        if isinstance(outcome.error, NodeError):
            error = NodeError("not all ranks have ended", where=str(self._spec.run.path), hint="look at their nodes")
            return Outcome(error.exit_code, error)
        return outcome
