"""Ranks on this machine's processors, forked from one process that imported torch, transformers and DeepSpeed early.

    python -m llmpipe_cli.cluster.warm          reads one order, a line of JSON, from stdin

The controller starts it before it prepares data and plans. Once the plan is known it sends the order, and this process
becomes the node's agent: torchrun's own, with its rendezvous, store and supervision, but with ``start_method="fork"``.
The guardians and their workers are forks as well, so nothing is imported again. Ties, logs, records and exit codes are
those of ranks that are started one by one (`cluster.torchrun`, `cluster.rank`).

CUDA does not survive a fork, so a machine with a driver for accelerators is never served in this way.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from llmpipe_cli.cluster.processes import guard_environment, guarded, redirect
from llmpipe_cli.cluster.rank import WORKER_VARIABLE, guard
from llmpipe_cli.cluster.torchrun import MARK_VARIABLE, RankProcesses, draw_mark

_IMPORTS = (
    "torch.distributed.launcher.api",
    "torch.distributed.elastic.rendezvous.registry",
    *(f"llmpipe_cli.worker.{name}" for name in ("training", "evaluation", "generation")),
)
# What libraries read while they are imported; the order brings the rest.
_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class WarmStart:
    """The process, from the controller's side. Build it in a thread that lives as long as the job.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self) -> None:
        self._mark = draw_mark()
        self._process = subprocess.Popen(
            guarded([sys.executable, "-u", "-m", "llmpipe_cli.cluster.warm"]),
            env=_ENVIRONMENT | os.environ | guard_environment() | {MARK_VARIABLE: self._mark},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def start_ranks(self, num_ranks: int, environment: Mapping[str, str], log: Path) -> RankProcesses | None:
        """Send the order; the process is an agent from then on.

        Args:
            num_ranks: how many ranks there are.
            environment: variables of the ranks besides this process's own.
            log: what the agent says is added to this file.

        Returns:
            The ranks' processes; None when the process has died, and the ranks have to be started without it.
        """
        order = {"num_ranks": num_ranks, "environment": dict(environment), "log": str(log)}
        assert self._process.stdin is not None
        try:
            with self._process.stdin as stdin:
                stdin.write(json.dumps(order).encode() + b"\n")
        except OSError:
            self.close()
            return None
        return RankProcesses(self._process, self._mark)

    def close(self) -> None:
        """End the process; for one that got no order."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def main() -> None:
    """Import, wait for the order, and be the agent of its ranks."""
    gc.disable()  # modules are no garbage
    for name in _IMPORTS:
        with contextlib.suppress(Exception):  # who needs it imports it again, and says where its output is read
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what was imported is shared with the forks as long as nobody touches it
    gc.enable()
    line = sys.stdin.buffer.readline()
    if not line:
        return
    order = json.loads(line)
    os.environ.update(order["environment"])
    redirect(Path(os.devnull), 0)
    redirect(Path(order["log"]), 1, 2)
    _be_agent(order["num_ranks"])


def _be_agent(num_ranks: int) -> None:
    """What `torchrun_argv` asks of torchrun, in this process."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        run_id="none",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="fork",
    )
    try:
        elastic_launch(config, _guard)()
    except ChildFailedError as error:
        print(error, file=sys.stderr)  # noqa: T201 (the agent's log)
        sys.exit(1)


def _guard() -> None:
    """A guardian: returns when its rank ended well, which tells the agent so, and exits with its code otherwise."""
    agent = os.getppid()
    os.setsid()  # as a guardian that torchrun starts: it outlives the agent's group for as long as it has to clean up
    code = guard(_work)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if code or os.getppid() != agent:
        sys.exit(code or 1)


def _work(run: Path) -> NoReturn:
    """Be ``python -m WORKER RUN_DIR``."""
    sys.argv = ["", str(run)]
    code: object = 0
    try:
        runpy.run_module(os.environ[WORKER_VARIABLE], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)


if __name__ == "__main__":
    main()
