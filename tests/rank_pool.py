"""A pool of rank processes that run worker jobs one after another.

Importing torch, transformers and DeepSpeed takes seconds a process. A fork server pays for it once a test session and
forks every member of every pool from there. Each job is the real worker (`llmpipe_cli.worker`) over a real gloo process
group of the size that the plan asks for.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from llmpipe_cli.run import RunDirectory, read_json

_GOOD = (0, 75)
_GRACE_SECONDS = 10
_PRELOAD = [
    *(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "gpt2", "llama", "mixtral", "qwen2", "t5")),
    *(f"llmpipe_cli.worker.{name}" for name in ("bench", "evaluation", "generation", "training")),
]
_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_context = get_context("forkserver")


class RankPool:
    """`size` processes; use as a context manager.

    Args:
        size: number of processes.
        prepare: a module's function that each of them calls before its first job.
    """

    def __init__(self, size: int, prepare: Callable[[], None] | None = None) -> None:
        self.size, self._prepare = size, prepare
        self._members: list[tuple[BaseProcess, Connection]] = []

    def __enter__(self) -> RankPool:
        self._start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def _start(self) -> None:
        before = dict(os.environ)
        os.environ.update(_ENVIRONMENT)  # the fork server keeps what it finds when the first member is started
        try:
            _context.set_forkserver_preload(_PRELOAD)
            for _ in range(self.size):
                ours, theirs = _context.Pipe()
                member = _context.Process(target=_serve, args=(theirs, self._prepare), daemon=True)
                member.start()
                theirs.close()
                self._members.append((member, ours))
        finally:
            os.environ.clear()
            os.environ.update(before)

    def _stop(self) -> None:
        for member, connection in self._members:
            member.kill()
            member.join()
            connection.close()
        self._members = []

    def run(self, run: RunDirectory, num_ranks: int) -> list[int]:
        """Run the plan of `run` on the first `num_ranks` members; returns their exit codes, -1 for one that died."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        connections = [connection for _, connection in self._members[:num_ranks]]
        for rank, connection in enumerate(connections):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
            connection.send((str(run.path), {name: str(value) for name, value in place.items()}))
        codes: dict[Connection, int] = {}
        failed = False
        while waiting := [connection for connection in connections if connection not in codes]:
            # After a failure the others may wait for the failed one for ever.
            ready = wait(waiting, timeout=_GRACE_SECONDS if failed else None)
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                codes[connection] = _answer(connection)
            failed = failed or any(code not in _GOOD for code in codes.values())
        answers = [codes.get(connection, -1) for connection in connections]
        if failed:
            self._stop()
            self._start()
        return answers

    def run_well(self, run: RunDirectory, num_ranks: int) -> None:
        """Run the plan and fail with the first rank's traceback unless every rank ended with 0."""
        codes = self.run(run, num_ranks)
        if any(codes):
            errors = [read_json(run.rank_error(rank)) for rank in range(num_ranks)]
            first = min((error for error in errors if error), key=lambda error: error["time"])
            raise AssertionError(f"exit codes {codes}; rank {first['rank']}:\n{first['traceback']}")


def _answer(connection: Connection) -> int:
    try:
        return connection.recv()
    except EOFError:
        return -1


def _serve(connection: Connection, prepare: Callable[[], None] | None) -> None:
    """A member: takes a run directory and its place in the process group, answers with the worker's exit code."""
    import sys

    import deepspeed.comm.comm
    import torch.distributed

    from llmpipe_cli.worker.__main__ import main

    os.dup2(2, 1)  # whatever a job prints goes to stderr
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    if prepare is not None:
        prepare()
    while True:
        try:
            run, place = connection.recv()
        except EOFError:
            return
        os.environ.update(place)
        sys.argv = ["worker", run]
        code = main()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        deepspeed.comm.comm.cdb = None
        connection.send(code)
