"""The guardian of one rank: a small process between the node's agent (torchrun) and the worker.

    python -m llmpipe_cli.cluster.rank          with RANK, LLMPIPE_RUN_DIR and LLMPIPE_WORKER in the environment

It starts ``python -m llmpipe_cli.worker RUN_DIR`` with its output in ``logs/rank-00003.log`` and then

* writes ``control/rank-00003.json`` at the start and again when the worker ends: exit code or signal, and when. The
  controller learns within a moment that, and how, a rank died, also by SIGKILL;
* passes SIGTERM, SIGINT and SIGUSR1 on to the worker;
* kills the worker and everything the worker started when the agent is gone;
* tells the agent that a worker that was stopped on request (75) ended well, so that it leaves the others time to save.

The run directory comes through the environment because torchrun changes ``$$`` and ``${...}`` in arguments. torch is
not imported here. Where the agent is a process that has imported everything (`cluster.warm`), guardian and worker are
forks of it instead of new programs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from llmpipe_cli.cluster.processes import adopt_orphans, die_with_parent, kill_descendants, redirect
from llmpipe_cli.errors import EXIT_STOPPED
from llmpipe_cli.run import RunDirectory, write_json

RUN_VARIABLE = "LLMPIPE_RUN_DIR"
WORKER_VARIABLE = "LLMPIPE_WORKER"
DEFAULT_WORKER = "llmpipe_cli.worker"


# What the worker's process does from its beginning to its end.
Work = Callable[[Path], NoReturn]


def guard(work: Work) -> int:
    """Run this rank's worker to its end; returns the exit code for the agent."""
    run = RunDirectory(Path(os.environ[RUN_VARIABLE]))
    return _Guardian(run, int(os.environ["RANK"])).run_worker(work)


def _become_program(run: Path) -> NoReturn:
    module = os.environ.get(WORKER_VARIABLE, DEFAULT_WORKER)
    os.execv(sys.executable, [sys.executable, "-u", "-m", module, str(run)])


def _fork(work: Work, run: RunDirectory, log: Path) -> int:
    """Fork the worker, tied to this process, with its output in `log`; returns its process id."""
    guardian = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        die_with_parent(signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        redirect(Path(os.devnull), 0)
        redirect(log, 1, 2)
        if os.getppid() == guardian:
            work(run.path)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)  # nothing of the guardian may run in the worker, whatever happens


class _Guardian:
    def __init__(self, run: RunDirectory, rank: int) -> None:
        self._run = run
        self._rank = rank
        self._agent = os.getppid()
        self._worker: int | None = None
        """Process id of the worker while it runs."""
        self._told_to_end = False
        self._agent_lost = False

    def run_worker(self, work: Work) -> int:
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(sig, self._on_signal)
        adopt_orphans()
        die_with_parent(signal.SIGTERM)
        record: dict[str, Any] = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "worker_pid": None,
            "started": time.time(),
        }
        write_json(self._run.rank_record(self._rank), record)
        worker = self._worker = _fork(work, self._run, self._run.rank_log(self._rank))
        record["worker_pid"] = worker
        write_json(self._run.rank_record(self._rank), record)
        if os.getppid() != self._agent:
            self._on_signal(signal.SIGTERM, None)
        _, status = os.waitpid(worker, 0)
        self._worker = None
        returncode = os.waitstatus_to_exitcode(status)
        record.update(
            returncode=returncode, told_to_end=self._told_to_end, agent_lost=self._agent_lost, ended=time.time()
        )
        write_json(self._run.rank_record(self._rank), record)
        kill_descendants()
        if returncode in (0, EXIT_STOPPED):
            return 0
        return returncode if returncode > 0 else 128 - returncode

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if os.getppid() != self._agent:
            self._agent_lost = True
            self._send(signal.SIGKILL)
            return
        self._told_to_end = True
        self._send(signal.SIGTERM if signum in (signal.SIGINT, signal.SIGHUP) else signal.Signals(signum))

    def _send(self, signum: signal.Signals) -> None:
        if self._worker is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._worker, signum)


if __name__ == "__main__":
    sys.exit(guard(_become_program))
