"""Ties the life of processes to each other, with what Linux offers and nothing else.

Run as a module, it ties the command after ``--`` to the process that starts it, and becomes that command:

    python -m llmpipe_cli.cluster.processes -- COMMAND ARG...

When the starter dies, however it dies, the kernel kills the command. Unlike a `preexec_fn` this is safe in a starter
that has threads. The starter has to stay alive in the thread that starts the command.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PARENT_VARIABLE = "LLMPIPE_GUARD_PARENT"


def guarded(argv: list[str]) -> list[str]:
    """The command line that runs `argv` tied to this process; set `guard_environment` too."""
    return [sys.executable, "-m", "llmpipe_cli.cluster.processes", "--", *argv]


def guard_environment() -> dict[str, str]:
    """Lets a guarded command see that its starter died before the tie was made."""
    return {_PARENT_VARIABLE: str(os.getpid())}


def die_with_parent(sig: signal.Signals) -> None:
    """Ask the kernel to send `sig` to this process when the thread that started it ends (Linux only)."""
    _prctl(_PR_SET_PDEATHSIG, int(sig))


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own parent dies (Linux only)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def redirect(path: Path, *descriptors: int) -> None:
    """Let file descriptors of this process lead to the end of a file, which is made if need be."""
    opened = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    for descriptor in descriptors:
        os.dup2(opened, descriptor)
    os.close(opened)


def is_running(pid: int) -> bool:
    """Whether a process exists and is more than a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat[stat.rfind(")") + 2] not in "ZX"


def kill_descendants(timeout_seconds: float = 5.0) -> None:
    """SIGKILL every descendant of this process and collect them; ends when none is left or the time is up."""
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end:
        children = _descendants(os.getpid())
        if not children:
            return
        for pid in children:
            _kill(pid)
        _reap()
        time.sleep(0.02)


def kill_marked(variable: str, value: str) -> int:
    """SIGKILL all processes that carry ``variable=value`` in their environment, but this one; returns how many."""
    mark = f"{variable}={value}".encode()
    count = 0
    for pid in _all_pids():
        if pid == os.getpid():
            continue
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if mark in environment.split(b"\0"):
            count += 1
            _kill(pid)
    return count


def kill_commands(mark: str, timeout_seconds: float = 10.0) -> None:
    """SIGKILL all processes with `mark` in their command line or environment, but this one, until none is left."""
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end:
        found = [pid for pid in _all_pids() if pid != os.getpid() and _carries(pid, mark.encode())]
        if not found:
            return
        for pid in found:
            _kill(pid)
        time.sleep(0.05)


def _carries(pid: int, mark: bytes) -> bool:
    try:
        process = Path(f"/proc/{pid}")
        return mark in process.joinpath("cmdline").read_bytes() or mark in process.joinpath("environ").read_bytes()
    except OSError:
        return False


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _reap() -> None:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return


def _all_pids() -> Iterator[int]:
    proc = Path("/proc")
    if not proc.is_dir():
        return
    for entry in proc.iterdir():
        if entry.name.isdigit():
            yield int(entry.name)


def _descendants(root: int) -> list[int]:
    """All living processes below `root`; zombies are left out."""
    children: dict[int, list[int]] = {}
    for pid in _all_pids():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        state, parent = stat[stat.rfind(")") + 2 :].split()[:2]
        if state not in "ZX":
            children.setdefault(int(parent), []).append(pid)
    found: list[int] = []
    waiting = [root]
    while waiting:
        for pid in children.get(waiting.pop(), []):
            found.append(pid)
            waiting.append(pid)
    return found


def main() -> None:
    """Tie to the starter, then become the command after ``--``."""
    argv = sys.argv[1:]
    if argv[:1] == ["--"]:
        argv = argv[1:]
    die_with_parent(signal.SIGKILL)
    # Meant for the ranks; torchrun would die of it where a whole job is signalled.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    parent = os.environ.pop(_PARENT_VARIABLE, None)
    if parent is not None and os.getppid() != int(parent):
        sys.exit(1)
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    main()
