"""A model that stays loaded while a command talks to it (see `worker.serving`)."""

from __future__ import annotations

import contextlib
import json
import select
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpipe_cli.cli import console, jobs
from llmpipe_cli.errors import RankError, UsageError
from llmpipe_cli.run import RunDirectory

if TYPE_CHECKING:
    from llmpipe_cli.cluster.launchers.base import Job
    from llmpipe_cli.plan.plan import Plan

_POLL_SECONDS = 0.1
_END_SECONDS = 20.0


class ServedModel:
    """Ranks that hold a model and answer requests; a context manager that starts and ends them.

    Everything that waits also looks after the ranks: when one dies, the call raises what the launcher found.

    Args:
        plan: a plan of a serve job on this machine.
        output_dir: folder of the run directories.
        options: flags.

    Attributes:
        run: the run directory.
        note: why there is no cache over the stages, if there is none.
    """

    def __init__(self, plan: Plan, output_dir: Path, options: jobs.LaunchOptions) -> None:
        self._options = options
        self.run = RunDirectory.create(output_dir, f"{plan.name}-{plan.job}")
        # A folder of its own with a short path: those of Unix sockets end at 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="llmpipe-"))
        self._plan = plan.model_copy(update={"options": {**plan.options, "socket": str(self._folder / "s")}})
        self._plan.save(self.run.plan)
        self.run.write_controller()
        self.note: str | None = None
        self._buffer = b""
        self._job: Job | None = None
        self._socket: socket.socket | None = None

    def __enter__(self) -> ServedModel:
        try:
            with socket.socket(socket.AF_UNIX) as listener, console.working("loading the model"):
                listener.bind(str(self._folder / "s"))
                listener.listen(1)
                self._job = self._options.starter.start(jobs.launch_spec(self._plan, self.run, self._options))
                while not select.select([listener], [], [], _POLL_SECONDS)[0]:
                    self._look_after()
                self._socket = listener.accept()[0]
                self.note = self._receive().get("note")
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, kind: Any, *details: object) -> None:
        job = self._job
        try:
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._send({"op": "end"})
            end = time.monotonic() + _END_SECONDS
            while job is not None and job.poll() is None and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
            if kind is None and job is not None and (outcome := job.poll()) is not None:
                from llmpipe_cli.report.tables import progress_of

                jobs.conclude(self.run, outcome, progress_of(self.run))
        finally:
            self._kill()

    def answers(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Send a request; everything that comes back, the answer itself last.

        Raises:
            UsageError: the ranks refuse the request.
            RankError: a rank has died.
        """
        self._send(request)
        while True:
            message = self._receive()
            if "error" in message:
                raise UsageError(message["error"], hint=message.get("hint"))
            yield message
            if "token" not in message:
                return

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request; its answer."""
        return list(self.answers(request))[-1]

    def stop_reply(self) -> None:
        """End the generation that runs; its answer comes soon."""
        self._send({"op": "stop"})

    def _send(self, message: dict[str, Any]) -> None:
        assert self._socket is not None
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self._wait_for_failure()

    def _receive(self) -> dict[str, Any]:
        assert self._socket is not None
        while b"\n" not in self._buffer:
            if not select.select([self._socket], [], [], _POLL_SECONDS)[0]:
                self._look_after()
                continue
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                self._wait_for_failure()
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))

    def _look_after(self) -> None:
        """Raise when the ranks are gone."""
        assert self._job is not None
        outcome = self._job.poll()
        if outcome is not None:
            from llmpipe_cli.report.tables import progress_of

            jobs.conclude(self.run, outcome, progress_of(self.run))
            raise RankError("the ranks have ended", where=str(self.run.path), hint=f"see {self.run.logs}")

    def _wait_for_failure(self) -> None:
        """The connection is lost: the launcher will soon know why."""
        end = time.monotonic() + _END_SECONDS
        while time.monotonic() < end:
            self._look_after()
            time.sleep(_POLL_SECONDS)
        raise RankError("rank 0 has closed the connection", where=str(self.run.path), hint=f"see {self.run.logs}")

    def _kill(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._job is not None and self._job.poll() is None:
            self._job.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
