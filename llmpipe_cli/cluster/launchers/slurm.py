"""Runs ranks under Slurm: submits a job, or starts a step inside the allocation that the command was typed in.

The batch script only starts `cluster.slurm` on the job's first node; run directory, environment and secrets travel as
Slurm carries the environment, never on a command line. The controller watches the run directory, which has to be on
shared storage, and asks Slurm how the job is. The job does not need the controller: with ``--detach``, or when the
controller dies, it goes on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from llmpipe_cli.cluster.devices import DeviceKind, Devices
from llmpipe_cli.cluster.launchers.base import Job, Launcher, LaunchSpec, NodeCommand, launch_script
from llmpipe_cli.cluster.launchers.placement import ON_THE_NODE
from llmpipe_cli.cluster.outcome import Outcome, judge
from llmpipe_cli.cluster.slurm import JOB_FILE, STEP_FILE
from llmpipe_cli.cluster.torchrun import Meeting, fixed_environment, torchrun_argv
from llmpipe_cli.errors import EXIT_INTERRUPTED, EXIT_STOPPED, NodeError, PreflightError, RankError, UsageError
from llmpipe_cli.run import read_json, write_json, write_text

_BATCH_SCRIPT = """#!/bin/sh
exec "$LLMPIPE_PYTHON" -P -m llmpipe_cli.cluster.slurm batch
"""
_ASK_SECONDS = 1.0
# Files that the nodes have written may be seen here a moment later.
_SETTLE_SECONDS = 2.0
_LIVING = {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "SUSPENDED", "STAGE_OUT", "SIGNALING",
           "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING", "STOPPED", "SPECIAL_EXIT"}  # fmt: skip


@dataclass(frozen=True)
class SlurmOptions:
    """What is asked of Slurm.

    Args:
        nodes: nodes of the job; None takes one, or all of the allocation.
        gpus_per_node: GPUs and ranks on each node; None runs on processor cores.
        ranks_per_node: ranks on each node without GPUs.
        signal_seconds: how long before the time limit the ranks are asked to save.
        attempts: how often the job may start at most.
        sbatch: further settings of sbatch by their long names: partition, account, time, qos, constraint and so on.
    """

    nodes: int | None = None
    gpus_per_node: int | None = None
    ranks_per_node: int = 1
    signal_seconds: int = 120
    attempts: int = 100
    sbatch: tuple[tuple[str, str], ...] = ()


class SlurmLauncher(Launcher):
    """All ranks as one Slurm job."""

    name = "slurm"

    def __init__(self, options: SlurmOptions, say: Callable[[str], None] = lambda text: None) -> None:
        self._options, self._say = options, say
        self._in_allocation = "SLURM_JOB_ID" in os.environ
        inside = int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) if self._in_allocation else 1
        self._nodes = options.nodes or inside
        self._ranks_per_node = options.gpus_per_node or options.ranks_per_node

    def devices(self, requested: int | None) -> Devices:
        for tool in ("sbatch", "srun", "squeue", "scontrol"):
            if shutil.which(tool) is None:
                raise PreflightError(f"{tool} is not found", hint="type the command where Slurm is installed")
        return self.planned_devices(requested)

    def planned_devices(self, requested: int | None) -> Devices:
        count = self._nodes * self._ranks_per_node
        if requested is not None and requested != count:
            raise UsageError(
                f"--devices {requested} does not fit {self._nodes} nodes x {self._ranks_per_node} ranks",
                hint="leave it away: nodes and gpus-per-node (or ranks-per-node) decide",
            )
        # Which devices these are, and their memory, is known when the job runs.
        kind: DeviceKind = "cpu" if self._options.gpus_per_node is None else "cuda"
        return Devices(kind, count, name="", memory_bytes=0, by_node=(self._ranks_per_node,) * self._nodes)

    def commands(self, spec: LaunchSpec) -> list[NodeCommand]:
        meeting = Meeting("(the first node)", 0)
        commands = []
        for index in range(self._nodes):
            argv = torchrun_argv(self._ranks_per_node, num_nodes=self._nodes, node_rank=index, meeting=meeting)
            commands.append(
                NodeCommand(f"Slurm node {index}", tuple(argv), self._environment(spec), tuple(self._submit(spec)))
            )
        return commands

    def start(self, spec: LaunchSpec) -> SlurmJob:
        if spec.num_ranks != self._nodes * self._ranks_per_node:
            raise UsageError(
                f"the layout has {spec.num_ranks} ranks, and the job {self._nodes} nodes x {self._ranks_per_node}",
                hint="make parallel.pipeline x parallel.data x parallel.tensor equal to them, or leave them at auto",
            )
        requeue = not self._in_allocation
        write_json(
            spec.run.control / JOB_FILE,
            {
                "stages": list(spec.stages),
                "nodes": self._nodes,
                "ranks_per_node": self._ranks_per_node,
                "worker": spec.worker,
                "device": spec.device,
                "grace_seconds": spec.grace_seconds,
                "requeue": requeue,
                "attempts": self._options.attempts,
                "srun": [f"--gpus-per-node={self._options.gpus_per_node}"] if self._options.gpus_per_node else [],
            },
        )
        write_text(spec.run.launch_script, launch_script(self.commands(spec)))
        environment = os.environ | self._environment(spec) | {"LLMPIPE_PYTHON": sys.executable}
        # What is inherited reaches the ranks as it is; the placeholders are filled in there.
        environment = {key: value for key, value in environment.items() if value != ON_THE_NODE}
        log = spec.run.launcher_log.open("ab")
        if self._in_allocation:
            with log:
                step = subprocess.Popen(
                    self._submit(spec), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            return SlurmJob(spec, None, step)
        script = spec.run.path / "job.sh"
        write_text(script, _BATCH_SCRIPT)
        with log:
            answer = subprocess.run(
                [*self._submit(spec), str(script)], env=environment, capture_output=True, text=True, check=False
            )
            log.write((answer.stdout + answer.stderr).encode())
        number = answer.stdout.strip().split(";")[0]
        if answer.returncode or not number.isdigit():
            raise NodeError(
                f"Slurm does not take the job: {answer.stderr.strip() or answer.stdout.strip()}",
                where="sbatch",
                hint="--launcher-option partition=..., account=..., time=... and so on",
            )
        write_json(spec.run.control / "slurm-job.json", {"job_id": number})
        self._say(f"Slurm job {number}")
        return SlurmJob(spec, number, None)

    def _submit(self, spec: LaunchSpec) -> list[str]:
        if self._in_allocation:
            return [sys.executable, "-P", "-m", "llmpipe_cli.cluster.slurm", "batch"]
        options = self._options
        # In the names of Slurm's output files % is special.
        output = str(spec.run.logs / "slurm").replace("%", "%%") + "-%j.log"
        argv = ["sbatch", "--parsable", f"--nodes={self._nodes}", "--ntasks-per-node=1", "--requeue"]
        argv += ["--open-mode=append", f"--signal=B:USR1@{options.signal_seconds}", f"--output={output}"]
        argv += [f"--job-name=llmpipe-{spec.run.recipe_name}", "--export=ALL"]
        if options.gpus_per_node is not None:
            argv.append(f"--gpus-per-node={options.gpus_per_node}")
        return argv + [f"--{key}={value}" for key, value in options.sbatch]

    def _environment(self, spec: LaunchSpec) -> dict[str, str]:
        chosen = {"TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": ON_THE_NODE}
        if spec.device == "cpu":
            chosen |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        chosen = {key: value for key, value in chosen.items() if key not in os.environ}
        fixed = fixed_environment(spec.run.path, spec.worker, spec.grace_seconds, spec.device)
        return chosen | dict(spec.environment) | fixed


class SlurmJob(Job):
    """A submitted job, or a step of an allocation."""

    def __init__(self, spec: LaunchSpec, number: str | None, step: subprocess.Popen[bytes] | None) -> None:
        self._spec, self._number, self._step = spec, number, step
        self._asked = 0.0
        self._state = "PENDING"
        self._deadline: float | None = None
        self._killed = False
        self._outcome: Outcome | None = None

    def poll(self) -> Outcome | None:
        now = time.monotonic()
        if self._outcome is not None:
            return self._outcome
        if self._deadline is not None and now > self._deadline:
            self._cancel()
        if self._step is not None:
            if self._step.poll() is None:
                return None
            self._state = "COMPLETED"
        elif now - self._asked > _ASK_SECONDS:
            self._asked = now
            self._state = self._ask()
        if self._state in _LIVING:
            return None
        self._outcome = self._finish()
        return self._outcome

    def request_stop(self) -> None:
        self._spec.run.request_stop()
        self._deadline = self._deadline or time.monotonic() + self._spec.grace_seconds
        if self._state == "PENDING":
            self._cancel()

    def kill(self) -> None:
        self._killed = True
        self._cancel()
        end = time.monotonic() + 40
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.2)

    def _ask(self) -> str:
        assert self._number is not None
        state, reason = job_state(self._number)
        if state != self._state or (state == "PENDING" and reason and reason not in self.note):
            self.note = f"Slurm job {self._number}: {state.lower()}" + (f" ({reason})" if state == "PENDING" else "")
        return state

    def _cancel(self) -> None:
        self._deadline = None
        if self._number is not None:
            argv = ["scancel", self._number]
        else:
            # Only this step: others of the allocation are none of our business.
            argv = ["scancel", "--signal=KILL", (read_json(self._spec.run.control / STEP_FILE) or {}).get("step", "")]
        subprocess.run(argv, check=False, capture_output=True)

    def _finish(self) -> Outcome:
        run = self._spec.run
        end = time.monotonic() + _SETTLE_SECONDS
        while not run.status_file.exists() and time.monotonic() < end:
            time.sleep(0.1)
        if self._killed:
            return Outcome(EXIT_INTERRUPTED)
        if self._state == "CANCELLED" and not run.metrics.exists():
            return Outcome(EXIT_STOPPED)
        written = read_json(run.status_file) or {}
        outcome = judge(run, self._spec.stages, 0 if self._state == "COMPLETED" else 1, [])
        if isinstance(outcome.error, NodeError):
            message = str(written.get("message") or f"Slurm ended the job: {self._state.lower()}")
            error = NodeError(message, where=f"Slurm job {self._number}", hint=f"see {run.logs}; {outcome.error.hint}")
            return Outcome(error.exit_code, error, None, outcome.traceback)
        if self._state == "TIMEOUT" and outcome.error is None:
            late = RankError("the job ran into its time limit before the ranks had saved", hint="raise signal-seconds")
            return Outcome(late.exit_code, late)
        return outcome


def job_state(number: str) -> tuple[str, str]:
    """State and reason of a Slurm job; a job that Slurm no longer knows is COMPLETED."""
    shown = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, check=False)
    if shown.returncode:
        known = "Invalid job id" not in shown.stderr
        return ("RUNNING" if known else "COMPLETED"), ""
    state, reason = re.search(r"JobState=(\w+)", shown.stdout), re.search(r"Reason=(\S+)", shown.stdout)
    return (state[1] if state else "RUNNING"), (reason[1] if reason and reason[1] != "None" else "")


def cancel_if_waiting(number: str) -> None:
    """Take a job out of the queue that has not begun; nobody would see its run's stop file."""
    if job_state(number)[0] == "PENDING":
        subprocess.run(["scancel", number], check=False, capture_output=True)
