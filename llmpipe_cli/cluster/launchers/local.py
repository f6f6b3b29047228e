"""Runs all ranks on this machine under torchrun, and watches over them.

    llmpipe (controller) -> torchrun -> one guardian a rank (cluster/rank.py) -> worker -> whatever the worker starts

Each arrow is tied: when the left side dies, however it dies, the right side is killed by the kernel. Processes carry
a random mark in their environment, and after the end whatever still carries it is killed; no other job can be hit.
torchrun picks a free port itself and binds it before the ranks start, so no port can be taken in between.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from typing import IO

from llmpipe_cli.cluster.devices import num_cores
from llmpipe_cli.cluster.launchers.base import Job, Launcher, LaunchSpec, NodeCommand, launch_script
from llmpipe_cli.cluster.outcome import Outcome, has_failed, judge, vanished_guardians
from llmpipe_cli.cluster.processes import guard_environment, guarded, kill_marked
from llmpipe_cli.cluster.rank import RUN_VARIABLE, WORKER_VARIABLE
from llmpipe_cli.errors import EXIT_INTERRUPTED, NodeError, RankError
from llmpipe_cli.run import write_text

_MARK = "LLMPIPE_JOB_MARK"
# After a first failure the others get this long to fail too, so that the real cause is known before all are killed.
_COLLECT_SECONDS = 3.0


class LocalLauncher(Launcher):
    """All ranks on this machine."""

    name = "local"

    def commands(self, spec: LaunchSpec) -> list[NodeCommand]:
        argv = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=1",
            f"--nproc-per-node={spec.num_ranks}",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0",
            "--local-addr=127.0.0.1",
            "--max-restarts=0",
            "--monitor-interval=0.2",
            "-m",
            "llmpipe_cli.cluster.rank",
        ]
        return [NodeCommand(socket.gethostname(), tuple(argv), _environment(spec))]

    def start(self, spec: LaunchSpec) -> LocalJob:
        return LocalJob(spec, self.commands(spec)[0])


class LocalJob(Job):
    """A job that runs on this machine."""

    def __init__(self, spec: LaunchSpec, command: NodeCommand) -> None:
        self._spec = spec
        self._mark = secrets.token_hex(16)
        self._outcome: Outcome | None = None
        self._deadline: float | None = None
        self._deadline_reason = ""
        self._kill_requested = False
        self._vanished: list[int] = []
        write_text(spec.run.launch_script, launch_script([command]))
        spec.run.launch_script.chmod(0o755)
        environment = os.environ | dict(command.environment) | guard_environment() | {_MARK: self._mark}
        log: IO[bytes]
        with spec.run.launcher_log.open("ab") as log:
            try:
                self._agent = subprocess.Popen(
                    guarded(list(command.argv)),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise NodeError(f"torchrun cannot be started: {error}", where=command.host) from error

    @property
    def agent_pid(self) -> int:
        return self._agent.pid

    def poll(self) -> Outcome | None:
        if self._outcome is None:
            if self._agent.poll() is None and not self._time_is_up():
                self._watch()
                return None
            self._outcome = self._finish()
        return self._outcome

    def request_stop(self) -> None:
        self._spec.run.request_stop()
        if self._deadline is None:
            self._set_deadline(self._spec.grace_seconds, "stop")

    def kill(self) -> None:
        self._kill_requested = True
        self._kill_all()

    def _watch(self) -> None:
        """Start the clock when a rank has failed, so that the others cannot hold up the end."""
        if self._deadline_reason == "failure":
            return
        self._vanished = vanished_guardians(self._spec.run, self._spec.num_ranks)
        if self._vanished or has_failed(self._spec.run, self._spec.num_ranks):
            self._set_deadline(_COLLECT_SECONDS, "failure")

    def _set_deadline(self, seconds: float, reason: str) -> None:
        self._deadline = time.monotonic() + seconds
        self._deadline_reason = reason

    def _time_is_up(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _finish(self) -> Outcome:
        agent_code = self._agent.poll()
        self._kill_all()
        if self._kill_requested:
            return Outcome(EXIT_INTERRUPTED)
        outcome = judge(self._spec.run, self._spec.stages, agent_code, self._vanished)
        if agent_code is None and self._deadline_reason == "stop" and outcome.rank is None:
            error = RankError(
                f"the ranks did not save and end within {self._spec.grace_seconds:g} s and were killed",
                hint="an earlier checkpoint is whole; --grace-seconds gives them more time",
            )
            return Outcome(error.exit_code, error)
        return outcome

    def _kill_all(self) -> None:
        """Kill the agent, its group, and whatever else carries this job's mark; wait until nothing does."""
        if self._agent.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._agent.pid, signal.SIGKILL)
            self._agent.wait()
        # The guardians see that the agent is gone and end their workers; what they cannot reach is killed by its mark.
        end = time.monotonic() + 10.0
        time.sleep(0.1)
        while kill_marked(_MARK, self._mark) and time.monotonic() < end:
            time.sleep(0.05)


def _environment(spec: LaunchSpec) -> dict[str, str]:
    """Variables for the ranks; what the user has set in the shell wins over the defaults chosen here."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, num_cores() // spec.num_ranks)),
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if spec.device == "cpu":
        defaults["DS_ACCELERATOR"] = "cpu"
    chosen = {key: value for key, value in defaults.items() if key not in os.environ}
    fixed = {
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, round(spec.grace_seconds))),
        RUN_VARIABLE: str(spec.run.path),
        WORKER_VARIABLE: spec.worker,
    }
    return chosen | dict(spec.environment) | fixed
