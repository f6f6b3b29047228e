"""A folder of things that are slow to make, each under a name that says everything it depends on.

An entry is filled in a temporary folder beside it, synced to disk and renamed into place, so an entry that exists is
whole. A lock file keeps two processes from making the same entry at once; where the file system has no locks both work,
and the second finds the first's entry in place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmpipe_cli.errors import PreflightError


def default_cache_dir() -> Path:
    """`LLMPIPE_CACHE`, or ``~/.cache/llmpipe``."""
    return Path(os.environ.get("LLMPIPE_CACHE") or "~/.cache/llmpipe").expanduser()


def fingerprint(identity: dict[str, Any]) -> str:
    """Name for what depends on `identity` (JSON values) alone."""
    text = json.dumps(identity, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cached_folder(entry: Path, fill: Callable[[Path], None]) -> Path:
    """The folder `entry`, made by `fill(temporary folder)` unless it exists.

    Raises:
        PreflightError: when the disk is full or the cache cannot be written.
    """
    if entry.is_dir():
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _locked(entry.with_name(entry.name + ".lock")) as locked:
            if entry.is_dir():  # made while waiting for the lock
                return entry
            if locked:
                _remove_leftovers(entry)
            _make(entry, fill)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise PreflightError(
                f"the cache cannot be written: {error.strerror}",
                where=str(entry.parent),
                hint="free space there, or set LLMPIPE_CACHE to a folder on another disk",
            ) from error
        raise
    return entry


def _make(entry: Path, fill: Callable[[Path], None]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f"{entry.name}.tmp-", dir=entry.parent))
    try:
        fill(temporary)
        temporary.chmod(0o755)  # mkdtemp gives access to the owner alone; a cache may be shared
        _sync(temporary)
        try:
            temporary.rename(entry)
        except OSError:
            if not entry.is_dir():  # otherwise another process was faster, without locks
                raise
        _sync_folder(entry.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds the lock file; gives False where the file system has no locks. The file stays: removing it would race."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True  # closing the file unlocks it


def _remove_leftovers(entry: Path) -> None:
    """Removes what killed processes left; holding the lock means that none of them is at work."""
    for path in entry.parent.glob(f"{entry.name}.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
