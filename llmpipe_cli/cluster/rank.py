"""The guardian of one rank: a small process between the node's agent (torchrun) and the worker.

    python -m llmpipe_cli.cluster.rank          with RANK, LLMPIPE_RUN_DIR and LLMPIPE_WORKER in the environment

It starts ``python -m llmpipe_cli.worker RUN_DIR`` with its output in ``logs/rank-00003.log`` and then

* writes ``control/rank-00003.json`` at the start and again when the worker ends: exit code or signal, and when. The
  controller learns within a moment that, and how, a rank died, also by SIGKILL;
* passes SIGTERM, SIGINT and SIGUSR1 on to the worker;
* kills the worker and everything the worker started when the agent is gone;
* tells the agent that a worker that was stopped on request (75) ended well, so that it leaves the others time to save.

The run directory comes through the environment because torchrun changes ``$$`` and ``${...}`` in arguments. torch is
not imported here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from llmpipe_cli.cluster.processes import adopt_orphans, die_with_parent, kill_descendants
from llmpipe_cli.errors import EXIT_STOPPED
from llmpipe_cli.run import RunDirectory, write_json

RUN_VARIABLE = "LLMPIPE_RUN_DIR"
WORKER_VARIABLE = "LLMPIPE_WORKER"
DEFAULT_WORKER = "llmpipe_cli.worker"


def main() -> int:
    """Run the worker to its end; returns the exit code for the agent."""
    run = RunDirectory(Path(os.environ[RUN_VARIABLE]))
    rank = int(os.environ["RANK"])
    module = os.environ.get(WORKER_VARIABLE, DEFAULT_WORKER)
    guardian = _Guardian(run, rank)
    return guardian.run_worker([sys.executable, "-u", "-m", module, str(run.path)])


class _Guardian:
    def __init__(self, run: RunDirectory, rank: int) -> None:
        self._run = run
        self._rank = rank
        self._agent = os.getppid()
        self._worker: subprocess.Popen[bytes] | None = None
        self._told_to_end = False
        self._agent_lost = False

    def run_worker(self, argv: list[str]) -> int:
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
        with self._run.rank_log(self._rank).open("ab") as log:
            # A single-threaded process may use preexec_fn safely.
            self._worker = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: die_with_parent(signal.SIGKILL),
            )
        record["worker_pid"] = self._worker.pid
        write_json(self._run.rank_record(self._rank), record)
        if os.getppid() != self._agent:
            self._on_signal(signal.SIGTERM, None)
        returncode = self._worker.wait()
        record.update(
            returncode=returncode, told_to_end=self._told_to_end, agent_lost=self._agent_lost, ended=time.time()
        )
        write_json(self._run.rank_record(self._rank), record)
        kill_descendants()
        if returncode in (0, EXIT_STOPPED):
            return 0
        return returncode if returncode > 0 else 128 - returncode

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        worker = self._worker
        if os.getppid() != self._agent:
            self._agent_lost = True
            if worker is not None:
                worker.kill()
            return
        self._told_to_end = True
        if worker is not None and worker.poll() is None:
            worker.send_signal(signal.SIGTERM if signum in (signal.SIGINT, signal.SIGHUP) else signum)


if __name__ == "__main__":
    sys.exit(main())
