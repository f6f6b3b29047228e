"""Commands in this process, with their ranks on a pool: all that a user's command does but the start of processes.

A command of its own spends most of its time on imports; tests of how commands start, stop and end real processes are
in test_train_command.py, test_launcher_local.py and test_ssh_*.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rank_pool import RankPool

from llmpipe_cli.cli import app
from llmpipe_cli.cluster.devices import Devices
from llmpipe_cli.cluster.launchers.base import Job, Launcher, LaunchSpec, NodeCommand
from llmpipe_cli.cluster.outcome import Outcome
from llmpipe_cli.errors import NumericsError


@dataclass(frozen=True)
class Printed:
    """What a command wrote."""

    stdout: str
    stderr: str


class Commands:
    """Runs commands in one folder, which also holds their cache.

    Args:
        folder: the working directory.
        pool: where ranks run; None for commands that start none.
    """

    def __init__(self, folder: Path, pool: RankPool | None) -> None:
        self.folder, self._pool = folder, pool

    def run(self, *arguments: str, exit_code: int = 0) -> Printed:
        """Run ``llmpipe ARGUMENTS``; fails unless it ends with `exit_code` and without a traceback."""
        out, err = io.StringIO(), io.StringIO()
        handlers = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        code: object = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setenv("LLMPIPE_CACHE", str(self.folder / "cache"))
            patch.setenv("NO_COLOR", "1")
            patch.setattr(sys, "argv", ["llmpipe", *arguments])
            pool = self._pool
            if pool is not None:
                patch.setattr("llmpipe_cli.cli.jobs.make_launcher", lambda name, flags: PoolLauncher(pool))
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    app.main()
            except SystemExit as end:
                code = end.code or 0
            finally:
                for sig, handler in handlers.items():
                    signal.signal(sig, handler)
        printed = Printed(out.getvalue(), err.getvalue())
        assert code == exit_code, printed.stderr
        assert "Traceback" not in printed.stderr
        return printed

    def json(self, *arguments: str) -> dict[str, Any]:
        """The document that the command prints with ``--json``."""
        document = json.loads(self.run(*arguments, "--json").stdout)
        assert isinstance(document, dict)
        return document


class PoolJob(Job):
    """A job whose ranks are members of a pool."""

    def __init__(self, pool: RankPool, spec: LaunchSpec) -> None:
        self.run = spec.run
        self._codes: list[int] = []
        self._thread = threading.Thread(target=lambda: self._codes.extend(pool.run(spec.run, spec.num_ranks)))
        self._thread.start()

    def poll(self) -> Outcome | None:
        if self._thread.is_alive():
            return None
        self._thread.join()
        code = max(self._codes)
        return Outcome(code, NumericsError("the loss is nan") if code == 7 else None)

    def request_stop(self) -> None:
        self.run.request_stop()

    def kill(self) -> None:
        self.run.request_stop()
        self._thread.join()


class PoolLauncher(Launcher):
    """Starts jobs on a pool."""

    name = "local"

    def __init__(self, pool: RankPool) -> None:
        self.pool = pool

    def devices(self, requested: int | None) -> Devices:
        return Devices("cpu", requested or min(self.pool.size, 2), "cpu", 2**30)

    def commands(self, spec: LaunchSpec) -> list[NodeCommand]:
        return []

    def start(self, spec: LaunchSpec) -> Job:
        return PoolJob(self.pool, spec)
