"""Runs all ranks on this machine under torchrun, and watches over them (see `cluster.torchrun`).

On a machine without accelerators the ranks are forks of a process that was started before the plan was made
(`cluster.warm`), unless the job brings variables of its own, which libraries may read while they are imported.
"""

from __future__ import annotations

import contextlib
import os
import socket

from llmpipe_cli.cluster.devices import Devices, has_driver, local_devices, num_cores
from llmpipe_cli.cluster.launchers.base import Job, Launcher, LaunchSpec, NodeCommand, launch_script
from llmpipe_cli.cluster.launchers.deadline import Deadline
from llmpipe_cli.cluster.outcome import Outcome, has_failed, judge, vanished_guardians
from llmpipe_cli.cluster.torchrun import RankProcesses, fixed_environment, start_torchrun, torchrun_argv
from llmpipe_cli.cluster.warm import WarmStart
from llmpipe_cli.errors import EXIT_INTERRUPTED, NodeError
from llmpipe_cli.run import write_text


class LocalLauncher(Launcher):
    """All ranks on this machine."""

    name = "local"

    def __init__(self) -> None:
        self._warm: WarmStart | None = None

    def devices(self, requested: int | None) -> Devices:
        return local_devices(requested)

    def commands(self, spec: LaunchSpec) -> list[NodeCommand]:
        argv = torchrun_argv(spec.num_ranks)
        return [NodeCommand(socket.gethostname(), tuple(argv), _environment(spec))]

    def warm_up(self) -> None:
        if self._warm is None and not has_driver():
            with contextlib.suppress(OSError):
                self._warm = WarmStart()

    def start(self, spec: LaunchSpec) -> LocalJob:
        command = self.commands(spec)[0]
        write_text(spec.run.launch_script, launch_script([command]))
        spec.run.launch_script.chmod(0o755)
        processes = self._start_warm(spec, command)
        if processes is None:
            try:
                processes = start_torchrun(command.argv, command.environment, spec.run.launcher_log)
            except OSError as error:
                raise NodeError(f"torchrun cannot be started: {error}", where=command.host) from error
        return LocalJob(spec, processes)

    def close(self) -> None:
        if self._warm is not None:
            self._warm.close()
            self._warm = None

    def _start_warm(self, spec: LaunchSpec, command: NodeCommand) -> RankProcesses | None:
        if self._warm is None or spec.environment:
            return None
        warm, self._warm = self._warm, None
        return warm.start_ranks(spec.num_ranks, command.environment, spec.run.launcher_log)


class LocalJob(Job):
    """A job that runs on this machine."""

    def __init__(self, spec: LaunchSpec, processes: RankProcesses) -> None:
        self._spec, self._processes = spec, processes
        self._outcome: Outcome | None = None
        self._deadline = Deadline(spec.grace_seconds)
        self._kill_requested = False
        self._vanished: list[int] = []

    @property
    def agent_pid(self) -> int:
        return self._processes.pid

    def poll(self) -> Outcome | None:
        if self._outcome is None:
            if self._processes.poll() is None and not self._deadline.is_over:
                self._watch()
                return None
            self._outcome = self._finish()
        return self._outcome

    def request_stop(self) -> None:
        self._spec.run.request_stop()
        self._deadline.stop()

    def kill(self) -> None:
        self._kill_requested = True
        self._processes.kill()

    def _watch(self) -> None:
        """Start the clock when a rank has failed, so that the others cannot hold up the end."""
        if self._deadline.failed:
            return
        self._vanished = vanished_guardians(self._spec.run, range(self._spec.num_ranks))
        if self._vanished or has_failed(self._spec.run, self._spec.num_ranks):
            self._deadline.fail()

    def _finish(self) -> Outcome:
        agent_code = self._processes.poll()
        self._processes.kill()
        if self._kill_requested:
            return Outcome(EXIT_INTERRUPTED)
        outcome = judge(self._spec.run, self._spec.stages, agent_code, self._vanished)
        if agent_code is None and outcome.rank is None:
            return self._deadline.unsaved() or outcome
        return outcome


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
    fixed = fixed_environment(spec.run.path, spec.worker, spec.grace_seconds, spec.device)
    return chosen | dict(spec.environment) | fixed
