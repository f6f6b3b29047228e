"""A pool of rank processes that run worker jobs one after another.

Importing torch and DeepSpeed takes seconds a process; the pool pays for it once a test module. Each job is the real
worker (`llmpipe_cli.worker`) over a real gloo process group of the size the plan asks for. Run as a script, this file
is one member of the pool: it reads a job a line from stdin and answers with the exit code on stdout.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from llmpipe_cli.run import RunDirectory, read_json

_GOOD = (0, 75)
_GRACE_SECONDS = 10


class RankPool:
    """`size` processes; use as a context manager."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._members: list[subprocess.Popen[str]] = []

    def __enter__(self) -> RankPool:
        self._start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def _start(self) -> None:
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__]
        self._members = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            for _ in range(self.size)
        ]

    def _stop(self) -> None:
        for member in self._members:
            member.kill()
            member.wait()

    def run(self, run: RunDirectory, num_ranks: int) -> list[int]:
        """Run the plan of `run` on the first `num_ranks` members; returns their exit codes."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        members = self._members[:num_ranks]
        for rank, member in enumerate(members):
            job = {"run": str(run.path), "rank": rank, "world": num_ranks, "port": port}
            assert member.stdin is not None
            member.stdin.write(json.dumps(job) + "\n")
            member.stdin.flush()
        with ThreadPoolExecutor(num_ranks) as threads:
            answers = [threads.submit(_answer, member) for member in members]
            while not all(answer.done() for answer in answers):
                wait(answers, timeout=0.2, return_when=FIRST_COMPLETED)
                if any(answer.done() and answer.result() not in _GOOD for answer in answers):
                    # The others may wait for the failed one for ever.
                    wait(answers, timeout=_GRACE_SECONDS)
                    self._stop()
                    self._start()
                    break
            return [answer.result() for answer in answers]

    def run_well(self, run: RunDirectory, num_ranks: int) -> None:
        """Run the plan and fail with the first rank's traceback unless every rank ended with 0."""
        codes = self.run(run, num_ranks)
        if any(codes):
            errors = [read_json(run.rank_error(rank)) for rank in range(num_ranks)]
            first = min((error for error in errors if error), key=lambda error: error["time"])
            raise AssertionError(f"exit codes {codes}; rank {first['rank']}:\n{first['traceback']}")


def _answer(member: subprocess.Popen[str]) -> int:
    """The member's exit code; -1 when it died without one."""
    assert member.stdout is not None
    for line in member.stdout:
        if line.startswith("EXIT "):
            return int(line.split()[1])
    return -1


def _serve() -> None:
    import deepspeed.comm.comm
    import torch.distributed

    from llmpipe_cli.worker.__main__ import main

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a job prints goes to stderr
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        os.environ.update(
            RANK=str(job["rank"]),
            LOCAL_RANK=str(job["rank"]),
            WORLD_SIZE=str(job["world"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(job["port"]),
        )
        sys.argv = ["worker", job["run"]]
        code = main()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        deepspeed.comm.comm.cdb = None
        answers.write(f"EXIT {code}\n")
        answers.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    _serve()
