"""What a node is: versions, devices, disk, clock, addresses. Runs on the node, in the agent or in `llmpipe doctor`.

torch is imported only where there is an accelerator; versions are read from the installed packages' metadata.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import platform
import shutil
import socket
import struct
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import llmpipe_cli
from llmpipe_cli.cluster.devices import local_devices, num_cores
from llmpipe_cli.errors import PreflightError

_PACKAGES = ("torch", "deepspeed", "transformers")
_SIOCGIFADDR = 0x8915


def node_facts(output_dir: str, cache_dir: str) -> dict[str, Any]:
    """The facts of this machine.

    Args:
        output_dir: folder of the run directories; it need not exist.
        cache_dir: folder of the prepared data.

    Returns:
        host, python, executable, versions (by package), devices (`Devices` as a dict and a processor's cores, or
        {"problem"}), free_bytes (by folder), time (seconds since the epoch), server_address (the address that ssh came
        in on, or None), addresses (by interface) and identity (equal for two names of one machine).
    """
    try:
        devices: dict[str, Any] = dataclasses.asdict(local_devices())
    except PreflightError as error:
        devices = {"problem": error.message}
    connection = os.environ.get("SSH_CONNECTION", "").split()
    if devices.get("kind") == "cpu":
        devices["cores"] = num_cores()
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "versions": versions(),
        "devices": devices,
        "free_bytes": {folder: _free_bytes(Path(folder)) for folder in (output_dir, cache_dir)},
        "time": time.time(),
        "server_address": connection[2] if len(connection) == 4 else None,
        "addresses": _addresses(),
        "identity": _identity(),
    }


@cache
def versions() -> dict[str, str]:
    """Installed versions of what a job depends on; llmpipe's own with a hash of its files."""
    found = {"llmpipe": f"{llmpipe_cli.__version__} ({_code_hash()})"}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def interface_to(address: str) -> str | None:
    """The network interface through which this machine reaches `address`, also when it is its own; None if unknown."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    for interface, addresses in _addresses().items():
        if own.partition("%")[0] in addresses:
            return interface
    return None


def _addresses() -> dict[str, list[str]]:
    """IPv4 and IPv6 addresses by interface."""
    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found.setdefault(name, []).append(socket.inet_ntoa(answer[20:24]))
    try:
        lines = Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        words = line.split()
        found.setdefault(words[5], []).append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(words[0])))
    return found


def _identity() -> str:
    """This machine: the kernel's boot and the network and mount namespaces, which tell containers apart."""
    parts = []
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        lambda: str(Path("/proc/self/ns/net").readlink()),
        lambda: str(Path("/proc/self/ns/mnt").readlink()),
    ):
        try:
            parts.append(read())
        except OSError:
            parts.append("unknown")
    return " ".join(parts)


def _free_bytes(folder: Path) -> int | None:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _code_hash() -> str:
    """Seven digits of a hash over this package's sources: two checkouts may bear the same version."""
    package = Path(llmpipe_cli.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:7]
