"""What runs inside a Slurm job: ``python -m llmpipe_cli.cluster.slurm batch`` on its first node, ``... node`` on each.

`batch` starts one `node` a node with srun, judges how the job ended and writes the run's status. SIGUSR1, which Slurm
sends before the time limit or a preemption and which ``scancel --signal=USR1`` sends at any time, has the ranks save
and stop; then the job is put back into the queue. A later attempt goes on in the same run directory, from its newest
checkpoint: to the user it is one job. What the job is stands in ``control/slurm.json``; storage is shared.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llmpipe_cli.cluster.facts import interface_to
from llmpipe_cli.cluster.launchers.deadline import Deadline
from llmpipe_cli.cluster.outcome import Outcome, has_failed, judge, write_status
from llmpipe_cli.cluster.rank import RUN_VARIABLE
from llmpipe_cli.cluster.torchrun import Meeting, fixed_environment, start_torchrun, torchrun_argv
from llmpipe_cli.errors import EXIT_STOPPED, LlmpipeError, NodeError
from llmpipe_cli.run import RunDirectory, read_json, write_json, write_text

JOB_FILE = "slurm.json"
STEP_FILE = "slurm-step.json"
_PREEMPTED = "preempted"
_FIRST_PORT, _NUM_PORTS = 20000, 12000


def batch(run: RunDirectory) -> int:
    """Run all nodes' ranks and write how they ended; returns the exit code of the project."""
    job = read_json(run.control / JOB_FILE)
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if attempt:
        begin_again(run, attempt)
    if run.status()["state"] != "running":
        run.write_controller()  # nobody watches from outside
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda signum, _: _ask_to_stop(run, preempted=signum == signal.SIGUSR1))
    meeting = {"address": _first_address(), "port": _FIRST_PORT + int(os.environ["SLURM_JOB_ID"]) % _NUM_PORTS}
    write_json(run.control / "meeting.json", meeting)
    command = ["srun", f"--nodes={job['nodes']}", f"--ntasks={job['nodes']}", "--ntasks-per-node=1"]
    command += ["--kill-on-bad-exit=1", *job["srun"]]
    step = subprocess.Popen([*command, sys.executable, "-P", "-m", "llmpipe_cli.cluster.slurm", "node"])
    while True:
        try:
            code = step.wait()
            break
        except InterruptedError:
            continue
    outcome = judge(run, job["stages"], code, [])
    preempted = (run.control / _PREEMPTED).exists()
    if outcome.exit_code == EXIT_STOPPED and preempted and job["requeue"] and attempt + 1 < job["attempts"]:
        requeued = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
        if requeued.returncode == 0:
            time.sleep(60)  # Slurm ends this process
    write_status(run, outcome)
    return outcome.exit_code


def node(run: RunDirectory) -> int:
    """Run this node's ranks to their end; returns 0 unless one failed."""
    job, meeting = read_json(run.control / JOB_FILE), read_json(run.control / "meeting.json")
    number, count = int(os.environ["SLURM_NODEID"]), int(job["ranks_per_node"])
    if number == 0:
        write_json(run.control / STEP_FILE, {"step": f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"})
    for sig in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(sig, lambda signum, _: _ask_to_stop(run, preempted=signum == signal.SIGUSR1))
    environment = fixed_environment(run.path, job["worker"], job["grace_seconds"], job["device"])
    interface = interface_to(meeting["address"])
    if interface is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", interface))
        environment.setdefault("NCCL_SOCKET_IFNAME", os.environ.get("NCCL_SOCKET_IFNAME", f"={interface}"))
    argv = torchrun_argv(count, num_nodes=job["nodes"], node_rank=number, meeting=Meeting(**meeting))
    processes = start_torchrun(argv, environment, run.logs / f"launcher-{number:03d}.log")
    deadline = Deadline(job["grace_seconds"])
    while (code := processes.poll()) is None and not deadline.is_over:
        if has_failed(run, len(job["stages"])):
            deadline.fail()
        time.sleep(0.2)
    processes.kill()
    return 1 if code is None or code else 0


def begin_again(run: RunDirectory, attempt: int) -> None:
    """Make the run directory ready for another attempt, which goes on from the newest checkpoint.

    Args:
        run: the run directory.
        attempt: 1 for the second attempt; the files of the ranks of the one before are kept under this number.
    """
    kept = run.logs / f"attempt-{attempt - 1}"
    kept.mkdir(exist_ok=True)
    for path in [*run.logs.glob("rank-*"), *run.control.glob("rank-*")]:
        path.rename(kept / path.name)
    for path in (run.stop_file, run.control / _PREEMPTED, run.status_file):
        path.unlink(missing_ok=True)
    checkpoint = run.latest_checkpoint()
    plan = run.read_plan()
    if checkpoint is not None and plan.get("training"):
        plan["training"]["resume_from"] = str(checkpoint)
        plan["weights" if plan.get("adapters") is None else "adapter_weights"] = str(checkpoint)
        write_json(run.plan, plan)
    _forget_steps_after(run, int(checkpoint.name.split("-")[1]) if checkpoint is not None else 0)


def _ask_to_stop(run: RunDirectory, *, preempted: bool) -> None:
    if preempted:
        (run.control / _PREEMPTED).touch()
    run.request_stop()


def _forget_steps_after(run: RunDirectory, step: int) -> None:
    """Take the lines of steps that will be done once more out of metrics.jsonl; nothing to do after a clean stop."""
    try:
        lines = run.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
    if kept != lines:
        write_text(run.metrics, "".join(kept))


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line).get("step", 0))
    except ValueError:
        return 0


def _first_address() -> str:
    """The address of the job's first node, as Slurm itself reaches it."""
    names = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], capture_output=True, text=True, check=True
    ).stdout.split()
    shown = subprocess.run(["scontrol", "show", "node", names[0]], capture_output=True, text=True, check=True).stdout
    found: Any = re.search(r"NodeAddr=(\S+)", shown)
    return found[1] if found else names[0]


def main() -> int:
    """Entry point."""
    run = RunDirectory(Path(os.environ[RUN_VARIABLE]))
    if sys.argv[1] == "node":
        return node(run)
    try:
        return batch(run)
    except (LlmpipeError, OSError, subprocess.SubprocessError) as error:
        failure = error if isinstance(error, LlmpipeError) else NodeError(f"the Slurm job cannot run: {error}")
        write_status(run, Outcome(failure.exit_code, failure))
        return failure.exit_code


if __name__ == "__main__":
    sys.exit(main())
