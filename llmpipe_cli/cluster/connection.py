"""The controller's end of one node: an ssh process with the agent behind it (`cluster.agent`).

Every connection has a thread that reads; the rest happens where the controller polls. `connect_all` opens all of them
at once, so that a cluster answers, or is known not to, within one connect time-out.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmpipe_cli.cluster.agent import BEAT_SECONDS
from llmpipe_cli.cluster.hostfile import Host
from llmpipe_cli.errors import PreflightError

_SSH_FAILED = 255
_ANSWER_SECONDS = 60.0
_CLOSE_SECONDS = 5.0
_SETTLE_SECONDS = 2.0
"""How long after the last time-out or failure others may still arrive: ssh processes do not start at one instant."""

T = TypeVar("T")


@dataclass(frozen=True)
class SshOptions:
    """How nodes are reached.

    Args:
        connect_timeout_seconds: for the connection to one node; all are opened at once.
        silence_seconds: a node that says nothing for so long while ranks run is lost.
        config: file for ``ssh -F``; None takes ssh's own.
        python: the interpreter on the nodes; None takes the path of this one.
    """

    connect_timeout_seconds: int = 10
    silence_seconds: float = 30.0
    config: Path | None = None
    python: str | None = None


def ssh_argv(host: Host, options: SshOptions) -> list[str]:
    """The command that starts the agent on `host`: no password is asked for, nothing is forwarded."""
    settings = {
        "BatchMode": "yes",
        "ConnectTimeout": str(options.connect_timeout_seconds),
        "ServerAliveInterval": "5",
        "ControlPath": "none",
        "ClearAllForwardings": "yes",
    }
    argv = ["ssh", "-T", "-a", "-x"]
    if options.config is not None:
        argv += ["-F", str(options.config)]
    for key, value in settings.items():
        argv += ["-o", f"{key}={value}"]
    if host.port is not None:
        argv += ["-p", str(host.port)]
    # -P: the home directory, where ssh lands, must not be searched for modules.
    command = [options.python or sys.executable, "-P", "-m", "llmpipe_cli.cluster.agent"]
    if path := os.environ.get("PYTHONPATH"):
        command = ["env", f"PYTHONPATH={path}", *command]
    return [*argv, "--", host.target, "exec " + shlex.join(command)]


class NodeConnection:
    """One node. Messages arrive in `events`; `lost` says why there will be none any more.

    Args:
        host: the node.
        options: how it is reached.
    """

    def __init__(self, host: Host, options: SshOptions) -> None:
        self.host = host
        self.events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.last_heard = time.monotonic()
        self._answered = False
        self._closed = False
        self._last_beat = 0.0
        self._noise: deque[str] = deque(maxlen=12)
        self._write_lock = threading.Lock()
        try:
            self._ssh = subprocess.Popen(
                ssh_argv(host, options),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C in the terminal is for the controller
            )
        except OSError as error:
            raise PreflightError(
                f"ssh cannot be started: {error.strerror}", hint="install the OpenSSH client"
            ) from error
        self._readers = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def lost(self) -> str | None:
        """Why the connection is at its end; None while it is open."""
        if self._ssh.poll() is None:
            return None
        for reader in self._readers:
            reader.join(1.0)
        said = self._noise[-1] if self._noise else ""
        if self._ssh.returncode == _SSH_FAILED:
            return said or "ssh failed without saying why"
        return f"the agent ended with code {self._ssh.returncode}" + (f": {said}" if said else "")

    @property
    def said(self) -> str:
        """The last lines that ssh or the agent wrote beside the messages."""
        return "\n".join(self._noise)

    def send(self, message: dict[str, Any]) -> None:
        """Send one message; a connection that has ended swallows it and says so in `lost`."""
        assert self._ssh.stdin is not None
        data = json.dumps(message).encode("ascii") + b"\n"
        with contextlib.suppress(OSError, ValueError), self._write_lock:
            self._ssh.stdin.write(data)
            self._ssh.stdin.flush()

    def beat(self) -> None:
        """Show the agent that the controller is there; call it often."""
        now = time.monotonic()
        # A full pipe must not block the controller: whoever writes into it shows that it is there.
        if now - self._last_beat >= BEAT_SECONDS and not self._write_lock.locked():
            self._last_beat = now
            self.send({"op": "beat"})

    def ask(self, message: dict[str, Any], kind: str, seconds: float = _ANSWER_SECONDS) -> dict[str, Any]:
        """Send a message and wait for the answer of this kind; only before ranks run.

        Raises:
            PreflightError: the connection ended, the node reports a problem, or no answer came.
        """
        self.send(message)
        return self.answer(kind, seconds)

    def answer(self, kind: str, seconds: float = _ANSWER_SECONDS) -> dict[str, Any]:
        """Wait for a message of this kind; see `ask`."""
        end = time.monotonic() + seconds
        while True:
            try:
                message = self.events.get(timeout=0.1)
            except queue.Empty:
                if (reason := self.lost) is not None and self.events.empty():
                    raise PreflightError(reason, where=str(self.host)) from None
                if time.monotonic() > end:
                    raise PreflightError(f"no answer within {seconds:g} s", where=str(self.host)) from None
                continue
            if message["is"] == kind:
                return message
            if message["is"] == "problem":
                raise PreflightError(message["message"], where=str(self.host))

    def close(self, *, at_once: bool = False) -> None:
        """End the connection; the agent kills what it has started."""
        if self._closed:
            return
        self._closed = True
        assert self._ssh.stdin is not None
        if at_once:
            self._ssh.kill()
        with contextlib.suppress(OSError):
            self._ssh.stdin.close()
        try:
            self._ssh.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._ssh.kill()
            self._ssh.wait()

    def _read(self) -> None:
        assert self._ssh.stdout is not None
        for line in self._ssh.stdout:
            try:
                message = json.loads(line)
                message["is"]
            except (ValueError, KeyError, TypeError):
                # What the login shell's start-up files print.
                self._noise.append(line.decode("utf-8", errors="replace").rstrip())
                continue
            self.last_heard = time.monotonic()
            if message["is"] != "beat":
                self.events.put(message)

    def _read_errors(self) -> None:
        assert self._ssh.stderr is not None
        for line in self._ssh.stderr:
            if text := line.decode("utf-8", errors="replace").strip():
                self._noise.append(text)


def connect_all(
    hosts: Sequence[Host], options: SshOptions, question: dict[str, Any]
) -> tuple[list[NodeConnection], list[dict[str, Any]], list[PreflightError]]:
    """Open all connections at once and ask each node the same first question, for its facts.

    Returns:
        The connections; the answers, each with ``heard``, this machine's clock when it came, empty for a node without
        one; what is wrong, an error a node. When one node cannot be reached, slow answers of others are not waited for.
    """
    connections = [NodeConnection(host, options) for host in hosts]
    started = time.monotonic()
    answers: list[dict[str, Any]] = [{} for _ in hosts]
    problems: list[PreflightError] = []
    waiting = set(range(len(hosts)))
    for connection in connections:
        connection.send(question)
    settled = started + options.connect_timeout_seconds + _SETTLE_SECONDS
    while waiting:
        now = time.monotonic()
        known = len(problems)
        for index in sorted(waiting):
            connection = connections[index]
            try:
                answers[index] = {**_first_answer(connection), "heard": time.time()}
                waiting.discard(index)
            except PreflightError as error:
                problems.append(error)
                waiting.discard(index)
            except queue.Empty:
                if (reason := connection.lost) is not None and connection.events.empty():
                    problems.append(_unreachable(connection, reason))
                    waiting.discard(index)
        if len(problems) > known:
            settled = max(settled, now + _SETTLE_SECONDS)
        if problems and now > settled:
            break
        if now - started > options.connect_timeout_seconds + _ANSWER_SECONDS:
            problems += [
                PreflightError("the node does not answer", where=str(connections[index].host)) for index in waiting
            ]
            break
        time.sleep(0.02)
    return connections, answers, problems


def _first_answer(connection: NodeConnection) -> dict[str, Any]:
    message = connection.events.get_nowait()
    if message["is"] == "problem":
        raise PreflightError(message["message"], where=str(connection.host))
    return message


def _unreachable(connection: NodeConnection, reason: str) -> PreflightError:
    host = connection.host
    hint = f"`ssh {host.target}` has to work without a password"
    if "No such file" in reason or "not found" in reason or "No module named" in reason or "code 12" in reason:
        hint = f"llmpipe has to be installed on every node at the same path ({sys.prefix})"
    elif "Host key verification" in reason:
        hint = f"connect once by hand, `ssh {host.target}`, and accept its key"
    elif "resolve hostname" in reason:
        hint = "correct its name in the hostfile, or give its address"
    elif "Connection refused" in reason:
        hint = f"no sshd listens there: start it, or give its port in the hostfile, {host.name}:PORT"
    elif "timed out" in reason or "No route to host" in reason:
        hint = "look whether the node is up, and at its address and firewall"
    return PreflightError(f"{host.name} cannot be used: {reason}", where=host.place or host.name, hint=hint)


def on_all(connections: Sequence[NodeConnection], work: Callable[[NodeConnection], T]) -> list[T]:
    """Do the same with every node at once; the first failure in the hosts' order is raised."""
    with ThreadPoolExecutor(max_workers=max(1, len(connections))) as pool:
        return [future.result() for future in [pool.submit(work, connection) for connection in connections]]


def close_all(connections: Sequence[NodeConnection], *, at_once: bool = False) -> None:
    """End all connections at once."""
    if connections:
        on_all(connections, lambda connection: connection.close(at_once=at_once))
