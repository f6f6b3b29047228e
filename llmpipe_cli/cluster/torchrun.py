"""torchrun on one node: its command line, the environment it needs, and its processes.

    controller or agent -> torchrun -> one guardian a rank (cluster/rank.py) -> worker -> whatever the worker starts

Each arrow is tied: when the left side dies, however it dies, the right side is killed by the kernel. Processes carry
a random mark in their environment, and after the end whatever still carries it is killed; no other job can be hit.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llmpipe_cli.cluster.processes import guard_environment, guarded, kill_marked
from llmpipe_cli.cluster.rank import RUN_VARIABLE, WORKER_VARIABLE

MARK_VARIABLE = "LLMPIPE_JOB_MARK"
DEVICE_VARIABLE = "LLMPIPE_DEVICE"
_KILL_SECONDS = 10.0


@dataclass(frozen=True)
class Meeting:
    """Where the nodes of a job meet.

    Args:
        address: of the first node, as the others reach it.
        port: a free port there; ``0`` and one node let torchrun choose.
    """

    address: str
    port: int


def torchrun_argv(
    num_local_ranks: int, *, num_nodes: int = 1, node_rank: int = 0, meeting: Meeting | None = None
) -> list[str]:
    """The command line for one node's ranks.

    Args:
        num_local_ranks: ranks on this node.
        num_nodes: nodes of the job.
        node_rank: this node's number; ranks are counted through the nodes in this order.
        meeting: where several nodes meet; one node meets itself, on a port that torchrun binds before the ranks start.
    """
    argv = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={num_nodes}"]
    argv.append(f"--nproc-per-node={num_local_ranks}")
    if meeting is None:
        argv += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    else:
        argv += [f"--node-rank={node_rank}", f"--master-addr={meeting.address}", f"--master-port={meeting.port}"]
    return [*argv, "--max-restarts=0", "--monitor-interval=0.2", "-m", "llmpipe_cli.cluster.rank"]


def fixed_environment(run: Path, worker: str, grace_seconds: float, device: str) -> dict[str, str]:
    """Variables that guardians, ranks and torchrun need, whatever the user has set; `device` is cpu or cuda."""
    return {
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, round(grace_seconds))),
        RUN_VARIABLE: str(run),
        WORKER_VARIABLE: worker,
        DEVICE_VARIABLE: device,
    }


def start_torchrun(
    argv: Sequence[str], environment: Mapping[str, str], log: Path, mark: str | None = None
) -> RankProcesses:
    """Start torchrun, tied to this thread: call it in one that lives as long as the job.

    Args:
        argv: the command line.
        environment: variables besides this process's own.
        log: what torchrun itself says is added to this file.
        mark: marks the processes; None draws one.

    Raises:
        OSError: torchrun cannot be started.
    """
    mark = mark or draw_mark()
    file: IO[bytes]
    with log.open("ab") as file:
        agent = subprocess.Popen(
            guarded(list(argv)),
            env=os.environ | dict(environment) | guard_environment() | {MARK_VARIABLE: mark},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return RankProcesses(agent, mark)


def draw_mark() -> str:
    """A random mark for the processes of one job."""
    return secrets.token_hex(16)


class RankProcesses:
    """torchrun, or what stands in its place, and everything under it on this machine.

    Args:
        agent: the process, leader of a group of its own.
        mark: the value of `MARK_VARIABLE` in its environment.
    """

    def __init__(self, agent: subprocess.Popen[bytes], mark: str) -> None:
        self._agent, self._mark = agent, mark

    @property
    def pid(self) -> int:
        """torchrun's process."""
        return self._agent.pid

    def poll(self) -> int | None:
        """How torchrun ended; None while it runs."""
        return self._agent.poll()

    def kill(self) -> None:
        """Kill torchrun, its group, and whatever else carries this job's mark; wait until nothing does."""
        if self._agent.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._agent.pid, signal.SIGKILL)
            self._agent.wait()
        # The guardians see that torchrun is gone and end their workers; what they cannot reach is killed by its mark.
        end = time.monotonic() + _KILL_SECONDS
        time.sleep(0.1)
        while kill_marked(MARK_VARIABLE, self._mark) and time.monotonic() < end:
            time.sleep(0.05)
