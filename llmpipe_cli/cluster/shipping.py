"""What a job reads, brought to nodes that do not see it: prepared data, tokenizer, weights, a checkpoint, prompts.

Both sides describe a folder by a digest of its files' names, sizes and contents (of large files: blocks spread over
them). A node that has the same folder under the same path keeps it; a node without it gets the files over its
connection, into a temporary folder that is renamed into place. A folder with other contents is never touched.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_WHOLE_BYTES = 4 << 20
_BLOCK_BYTES = 64 << 10
_NUM_BLOCKS = 32
_CHUNK_BYTES = 512 << 10


def digest(folder: Path) -> str | None:
    """Digest of a folder's files, links followed, or of a single file; None when there is neither."""
    if not folder.exists():
        return None
    total = hashlib.sha256()
    for path in _files(folder):
        size = path.stat().st_size
        total.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                total.update(file.read())
                continue
            for index in range(_NUM_BLOCKS):
                file.seek((size - _BLOCK_BYTES) * index // (_NUM_BLOCKS - 1))
                total.update(file.read(_BLOCK_BYTES))
    return total.hexdigest()


def folder_messages(folder: Path, expected: str) -> Iterator[dict[str, Any]]:
    """The messages that bring `folder`, whose digest is `expected`, to a node."""
    for path in _files(folder):
        for data in file_chunks(path):
            name = path.relative_to(folder).as_posix()
            yield {"op": "file", "folder": str(folder), "name": name, "data": data}
    yield {"op": "folder", "folder": str(folder), "digest": expected}


def file_chunks(path: Path) -> Iterator[str]:
    """A file's content in base64, piece by piece; one empty piece for an empty file."""
    with path.open("rb") as file:
        first = True
        while (data := file.read(_CHUNK_BYTES)) or first:
            first = False
            yield base64.b64encode(data).decode("ascii")


def safe_name(name: str) -> str:
    """`name` if it stays inside the folder that it is relative to.

    Raises:
        ValueError: it does not.
    """
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise ValueError(f"not a name inside a folder: {name!r}")
    return name


class Receiver:
    """The node's side: puts `folder_messages` on disk."""

    def __init__(self) -> None:
        self._begun: set[Path] = set()

    def take(self, message: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
        """Handle one message; the last one of a folder is answered with what happened.

        Raises:
            OSError: the disk is full or the folder cannot be made.
        """
        folder = Path(message["folder"])
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        if partial not in self._begun:
            _remove(partial)
            self._begun.add(partial)
        if message["op"] == "file":
            # A single file is called "." and arrives as `partial` itself.
            path = partial if message["name"] == "." else partial / safe_name(message["name"])
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(base64.b64decode(message["data"]))
            return
        self._begun.discard(partial)
        whole = digest(partial) == message["digest"]
        if whole:
            try:
                partial.rename(folder)
            except OSError:
                # Another job, or another node with the same disk, was faster.
                whole = digest(folder) == message["digest"]
        _remove(partial)
        answer({"is": "received", "folder": str(folder), "whole": whole})


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    return sorted(path for path in folder.rglob("*") if path.is_file())
