"""Nodes for tests: network namespaces on this machine, each with an sshd of its own and a link to this one.

    controller (this process's namespace) -- bridge -- node a: 10.x.y.1, node b: 10.x.y.2

On port 22 a node sees the same files as the controller; on port 2222 it has an empty folder of its own in the place of
`Nodes.folder`, as a cluster without shared storage. Needs root, iproute2 and OpenSSH's server.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

SHARED, UNSHARED = 22, 2222


def why_not() -> str | None:
    """Why this machine cannot have such nodes; None when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "ssh", "ssh-keygen", "unshare", "/usr/sbin/sshd") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    name = f"lp{os.getpid()}t"
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"no network namespaces: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


class Nodes:
    """Two running nodes.

    Args:
        folder: an empty folder; the unshared nodes have another one in its place.
        tools: a folder for keys and settings, seen by all.
    """

    def __init__(self, folder: Path, tools: Path) -> None:
        self.folder, self._tools = folder, tools
        number = os.getpid()
        self._subnet = f"10.{200 + number % 50}.{number // 50 % 250}"
        self._bridge = f"lp{number}"
        self.names = [f"lp{number}{letter}" for letter in "ab"]
        self.addresses = [f"{self._subnet}.{index}" for index in (1, 2)]
        self.private = [tools / f"private-{letter}" for letter in "ab"]
        self.servers: dict[tuple[int, int], subprocess.Popen[bytes]] = {}
        self.ssh_config = tools / "ssh_config"

    def start(self) -> None:
        """Make the namespaces, the links and the servers."""
        for name in ("id", "host"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._tools / name))
        self.ssh_config.write_text(
            f"Host *\n  User root\n  IdentityFile {self._tools}/id\n  IdentitiesOnly yes\n  LogLevel ERROR\n"
            "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
        )
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self._subnet}.254/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        Path("/run/sshd").mkdir(exist_ok=True)
        for index, name in enumerate(self.names):
            _ip("netns", "add", name)
            _ip("link", "add", f"{name}v", "type", "veth", "peer", "name", f"{name}w")
            _ip("link", "set", f"{name}v", "master", self._bridge, "up")
            _ip("link", "set", f"{name}w", "netns", name, "name", "eth0")
            _ip("-n", name, "addr", "add", f"{self.addresses[index]}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
            self.private[index].mkdir()
            for port in (SHARED, UNSHARED):
                self.start_server(index, port)

    def start_server(self, index: int, port: int, before: str = "true") -> None:
        """Start one node's sshd; `before` is a shell command in its mount namespace, which only it sees."""
        config = self._tools / f"sshd-{index}-{port}"
        config.write_text(
            f"Port {port}\nHostKey {self._tools}/host\nAuthorizedKeysFile {self._tools}/id.pub\nStrictModes no\n"
            "PidFile none\nPermitRootLogin yes\nPasswordAuthentication no\nUsePAM no\nMaxStartups 200\n"
        )
        if port == UNSHARED:
            before += f" && mount --bind '{self.private[index]}' '{self.folder}'"
        host = f"node-{'ab'[index]}"
        command = f"hostname {host} && mount --make-rprivate / && {before} && exec /usr/sbin/sshd -D -f {config}"
        self.servers[index, port] = subprocess.Popen(
            ["ip", "netns", "exec", self.names[index], "unshare", "-m", "-u", "sh", "-c", command],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection((self.addresses[index], port), timeout=1):
                return
            time.sleep(0.05)
        raise AssertionError("sshd does not start")

    def stop_server(self, index: int, port: int) -> None:
        """Stop a node's sshd; connections that are open stay open."""
        server = self.servers.pop((index, port))
        server.terminate()
        server.wait()

    def inside(self, index: int, *argv: str) -> str:
        """Run a command in a node's network namespace; returns its output."""
        return _run("ip", "netns", "exec", self.names[index], *argv)

    def link(self, index: int, state: str) -> None:
        """Take a node's link ``down`` or ``up``."""
        _ip("link", "set", f"{self.names[index]}v", state)

    def hostfile(self, path: Path, slots: Sequence[int] = (1, 1), port: int = SHARED) -> Path:
        """Write a hostfile of both nodes."""
        lines = [f"{address}:{port} slots={n}" for address, n in zip(self.addresses, slots, strict=True) if n]
        path.write_text("\n".join(lines) + "\n")
        return path

    @contextlib.contextmanager
    def lossy_link(self, delay_seconds: float, loss: float) -> Iterator[list[str]]:
        """Addresses of the nodes between which packets are delayed and lost, while the context lasts."""
        script = Path(__file__).with_name("lossy_link.py")
        relay = subprocess.Popen(
            ["ip", "netns", "exec", self.names[0], sys.executable, str(script), self.names[1], str(delay_seconds),
             str(loss)],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert relay.stdout is not None
            assert relay.stdout.readline() == b"ready\n"
            addresses = [address.replace(f"{self._subnet}.", f"{self._subnet}.10") for address in self.addresses]
            for index, name in enumerate(self.names):
                _ip("-n", name, "addr", "add", f"{addresses[index]}/32", "dev", "lossy0")
                _ip("-n", name, "link", "set", "lossy0", "up")
                _ip("-n", name, "route", "add", f"{addresses[1 - index]}/32", "dev", "lossy0", "src", addresses[index])
                _ip("route", "add", f"{addresses[index]}/32", "via", self.addresses[index])
            yield addresses
        finally:
            relay.kill()
            relay.wait()
            for address in self.addresses:
                far = address.replace(f"{self._subnet}.", f"{self._subnet}.10")
                with contextlib.suppress(subprocess.CalledProcessError):
                    _ip("route", "del", f"{far}/32")

    def add_addresses(self, count: int) -> list[str]:
        """More addresses, dealt to both nodes; those of earlier calls are among them."""
        found = [f"{self._subnet}.{number}" for number in range(10, 10 + count)]
        for number, address in enumerate(found):
            _ip("-n", self.names[number % 2], "addr", "replace", f"{address}/24", "dev", "eth0")
        return found

    def add_hole(self, address: str) -> None:
        """Let an address swallow packets: they are sent to a neighbour that is not there."""
        _ip("neigh", "replace", address, "lladdr", "02:00:00:00:00:99", "dev", self._bridge, "nud", "permanent")

    def processes(self, index: int, words: str = "") -> list[int]:
        """Processes in a node's network namespace with these words in their command line, sshd's own left out."""
        found = []
        for line in _ip("netns", "pids", self.names[index]).split():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{line}/cmdline").read_bytes().replace(b"\0", b" ")
                if command and b"sshd" not in command and words.encode() in command:
                    found.append(int(line))
        return found

    def stop(self) -> None:
        """Remove everything."""
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                for pid in _ip("netns", "pids", name).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
        for server in self.servers.values():
            server.wait()
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._bridge)


@contextlib.contextmanager
def running_nodes(folder: Path, tools: Path) -> Iterator[Nodes]:
    """Two nodes while the context lasts."""
    nodes = Nodes(folder, tools)
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.stop()


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout
