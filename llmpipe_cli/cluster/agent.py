"""The agent on a node of a multi-node job: ``python -m llmpipe_cli.cluster.agent``, started over ssh.

It reads JSON lines on stdin and writes JSON lines on stdout, so that plans, environments and secrets stand on no
command line and nodes need no shared storage. It answers questions about the node, takes files, starts torchrun, and
reports how that goes; the node's part of the run directory is copied to the controller (`cluster.mirror`) unless both
see the same one. When stdin ends, or the controller is silent for too long, it kills the node's ranks and ends.

    {"op": "facts", "output_dir", "cache_dir", "cwd", "environment"} -> {"is": "facts", ...}
    {"op": "listen"} / {"op": "reach", "address", "port"} -> {"is": "listening", "port"} / {"is": "reached", "seconds"}
    {"op": "missing", "folders": {path: digest}}     -> {"is": "missing", "folders", "different"}
    {"op": "file"} ..., {"op": "folder"}             -> {"is": "received", "folder", "whole"}
    {"op": "run", ...}                               -> {"is": "started"}, ..., {"is": "ended", "code", "vanished"}
    {"op": "stop"}, {"op": "kill"}, {"op": "beat"}

torch is not imported here.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from llmpipe_cli.cluster.devices import num_cores
from llmpipe_cli.cluster.facts import interface_to, node_facts
from llmpipe_cli.cluster.foreign import job_file
from llmpipe_cli.cluster.mirror import Outbox
from llmpipe_cli.cluster.outcome import vanished_guardians
from llmpipe_cli.cluster.processes import kill_commands
from llmpipe_cli.cluster.shipping import Receiver, digest
from llmpipe_cli.cluster.torchrun import RankProcesses, start_torchrun
from llmpipe_cli.run import RunDirectory, write_text

BEAT_SECONDS = 1.0
_POLL_SECONDS = 0.1


class Agent:
    """Serves one controller until its connection ends."""

    def __init__(self) -> None:
        # Whatever else is printed must not end up between the messages.
        self._output = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        self._write_lock = threading.Lock()
        self._inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._heard = self._beaten = time.monotonic()
        self._receiver = Receiver()
        self._listener: socket.socket | None = None
        self._node: _NodeJob | None = None

    def serve(self) -> int:
        """Handle messages until stdin ends; returns the exit code."""
        threading.Thread(target=self._read, daemon=True).start()
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    message = self._inbox.get(timeout=_POLL_SECONDS)
                    if message is None:
                        return 0
                    self._heard = time.monotonic()
                    self._handle_safely(message)
                now = time.monotonic()
                if self._node is not None:
                    self._node.poll()
                    if now - self._heard > self._node.silence_seconds:
                        return 1
                if now - self._beaten > BEAT_SECONDS:
                    self.send({"is": "beat"})
        except OSError:
            return 1  # the controller is gone
        finally:
            if self._node is not None:
                self._node.kill()

    def send(self, message: dict[str, Any]) -> None:
        """Write one message; safe from any thread.

        Raises:
            OSError: the controller is gone.
        """
        data = json.dumps(message).encode("ascii") + b"\n"
        with self._write_lock:
            self._output.write(data)
            self._output.flush()
            self._beaten = time.monotonic()

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            self._inbox.put(json.loads(line))
        self._inbox.put(None)

    def _handle_safely(self, message: dict[str, Any]) -> None:
        try:
            self._handle(message)
        except (OSError, ValueError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            self.send({"is": "problem", "op": message["op"], "message": f"{type(error).__name__}: {error}"})

    def _handle(self, message: dict[str, Any]) -> None:
        kind = message["op"]
        if kind == "facts":
            with contextlib.suppress(OSError):
                os.chdir(message["cwd"])
            os.environ.update(message["environment"])
            self.send({"is": "facts", **node_facts(message["output_dir"], message["cache_dir"])})
        elif kind == "listen":
            self._listen(message["port"])
        elif kind == "reach":
            self._reach(message["address"], message["port"])
        elif kind == "missing":
            found = {path: digest(Path(path)) for path in message["folders"]}
            missing = [path for path, value in found.items() if value is None]
            different = [path for path, value in found.items() if value not in (None, message["folders"][path])]
            self.send({"is": "missing", "folders": missing, "different": different})
        elif kind in ("file", "folder"):
            self._receiver.take(message, self.send)
        elif kind == "run":
            if self._listener is not None:
                self._listener.close()
            self._node = _NodeJob(message, self)
        elif kind == "stop" and self._node is not None:
            self._node.run.request_stop()
        elif kind == "kill" and self._node is not None:
            self._node.kill()

    def _listen(self, port: int) -> None:
        """Hold a port of this node, so that the others can see whether they reach it."""
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        while True:
            # Below the range from which the kernel takes the ports of outgoing connections.
            number = port or random.randrange(20000, 32000)
            try:
                self._listener = socket.create_server(
                    ("", number), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=256
                )
                break
            except OSError:
                if port:
                    raise
        self.send({"is": "listening", "port": self._listener.getsockname()[1]})

    def _reach(self, address: str, port: int) -> None:
        started = time.monotonic()
        try:
            with socket.create_connection((address, port), timeout=5):
                self.send({"is": "reached", "seconds": time.monotonic() - started})
        except OSError as error:
            self.send({"is": "reached", "problem": str(error)})


class _NodeJob:
    """This node's part of a job."""

    def __init__(self, message: dict[str, Any], agent: Agent) -> None:
        self.run = RunDirectory(Path(message["run"]))
        self.silence_seconds: float = message["silence_seconds"]
        self._agent = agent
        self._ranks: list[int] = message["ranks"]
        self._ended = self._reported = False
        self._code: int | None = None
        self._vanished: list[int] = []
        self._mark: str = message["mark"]
        self._outbox = None if self._sees_controllers_files(message) else self._own_files(message)
        environment = _environment(message)
        self._processes: RankProcesses | None = None
        if message["argv"] is None:
            # Another program starts the ranks; what they need waits for them in a file that only its owner reads.
            _write_private(job_file(self.run, self._mark), json.dumps(environment))
        else:
            log = self.run.logs / message["launcher_log"]
            self._processes = start_torchrun(message["argv"], environment, log, self._mark)
        agent.send({"is": "started", "shared": self._outbox is None})

    def poll(self) -> None:
        """Report what has changed."""
        if self._outbox is not None:
            self._outbox.flush()
        if self._ended:
            if not self._reported and (self._outbox is None or self._outbox.is_done()):
                self._reported = True
                self._agent.send({"is": "ended", "code": self._code, "vanished": self._vanished})
            return
        vanished = vanished_guardians(self.run, self._ranks)
        if vanished and not self._vanished:
            self._vanished = vanished
            self._agent.send({"is": "vanished", "ranks": vanished})
        if self._processes is not None and (code := self._processes.poll()) is not None:
            self._finish(code)

    def kill(self) -> None:
        """End the node's ranks now."""
        if not self._ended:
            self._finish(None if self._processes is None else self._processes.poll())

    def _finish(self, code: int | None) -> None:
        self._code = code
        if self._processes is not None:
            self._processes.kill()
        else:
            kill_commands(self._mark)
            with contextlib.suppress(OSError):
                job_file(self.run, self._mark).unlink()
        self._ended = True

    def _sees_controllers_files(self, message: dict[str, Any]) -> bool:
        """Whether the run directory here is the controller's own."""
        try:
            return (self.run.control / "token").read_text(encoding="ascii") == message["token"]
        except OSError:
            return False

    def _own_files(self, message: dict[str, Any]) -> Outbox:
        for folder in (self.run.logs, self.run.checkpoints, self.run.timeline, self.run.control):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(self.run.plan, message["plan"])
        return Outbox(self.run, self._ranks, message["launcher_log"], self._agent.send)


def _environment(message: dict[str, Any]) -> dict[str, str]:
    """The variables of this node's ranks: the controller's, and what depends on the node where they leave it open."""
    given: dict[str, str] = message["environment"]
    chosen = {"OMP_NUM_THREADS": str(max(1, num_cores() // len(message["ranks"]))), "LLMPIPE_NODE": message["node"]}
    interface = interface_to(message["address"])
    if interface is not None:
        chosen |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    return {key: value for key, value in chosen.items() if key not in os.environ} | given


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)


def main() -> int:
    """Serve; a hang-up of the connection is told by the end of stdin, signals by the controller."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        return Agent().serve()
    except SystemExit:
        return 1


if __name__ == "__main__":
    code = main()
    os._exit(code)  # the reading thread may still wait for input
