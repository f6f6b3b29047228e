"""The run directory of a node without shared storage, copied to the controller while the job runs.

The node's agent looks at the files again and again and sends what is new: logs and metrics as they grow, small files
whole. Each node sends what its own ranks write; the first node also sends what rank 0 writes for the run, and every
finished checkpoint, whose files are checked against their manifest before it appears on the controller.
"""

from __future__ import annotations

import base64
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmpipe_cli.cluster.shipping import file_chunks, safe_name
from llmpipe_cli.engine.manifest import PARTIAL, point, verify, whole_checkpoints
from llmpipe_cli.errors import CheckpointError
from llmpipe_cli.run import MANIFEST, RunDirectory

_GROWING = (".log", ".jsonl")
_PIECE_BYTES = 256 << 10
# Written by the controller itself.
_CONTROLLER_FILES = {"plan.json", "recipe.yaml", "recipe.lock.yaml", "launch.sh"}
_LINKS = ("latest", "best")

Send = Callable[[dict[str, Any]], None]


class Outbox:
    """The node's side.

    Args:
        run: the node's run directory.
        ranks: ranks on this node.
        launcher_log: file name of the log of this node's torchrun.
        send: gives one message to the controller; safe to call from any thread.
    """

    def __init__(self, run: RunDirectory, ranks: Sequence[int], launcher_log: str, send: Send) -> None:
        self._run, self._ranks, self._send = run, ranks, send
        self._launcher_log = run.logs / launcher_log
        self._seen: dict[Path, tuple[int, int]] = {}
        self._offsets: dict[Path, int] = {}
        self._checkpoints: set[str] = set()
        self._listing: dict[str, Any] = {}
        self._sender: threading.Thread | None = None

    def flush(self) -> None:
        """Send what is new; checkpoints are sent by a thread of their own."""
        for path in self._files():
            self._send_news(path)
        if 0 in self._ranks and (self._sender is None or not self._sender.is_alive()) and self._has_checkpoint_news():
            self._sender = threading.Thread(target=self._send_checkpoints, daemon=True)
            self._sender.start()

    def is_done(self) -> bool:
        """Whether everything was sent; `flush` first."""
        sending = self._sender is not None and self._sender.is_alive()
        return not sending and not (0 in self._ranks and self._has_checkpoint_news())

    def _files(self) -> Iterator[Path]:
        for rank in self._ranks:
            yield from (self._run.rank_log(rank), self._run.rank_error(rank), self._run.rank_record(rank))
        yield self._launcher_log
        if 0 in self._ranks:
            yield from (path for path in self._run.path.iterdir() if path.name not in _CONTROLLER_FILES)
            yield from self._run.timeline.iterdir()

    def _send_news(self, path: Path) -> None:
        if path.name.startswith("."):
            return
        try:
            status = path.stat()
            stamp = (status.st_size, status.st_mtime_ns)
            if not path.is_file() or self._seen.get(path) == stamp:
                return
            name = path.relative_to(self._run.path).as_posix()
            if path.suffix in _GROWING:
                self._send_growth(path, name)
            else:
                content = base64.b64encode(path.read_bytes()).decode("ascii")
                self._send({"is": "file", "name": name, "data": content})
            self._seen[path] = stamp
        except FileNotFoundError:
            return

    def _send_growth(self, path: Path, name: str) -> None:
        with path.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            while data := file.read(_PIECE_BYTES):
                self._send({"is": "growth", "name": name, "data": base64.b64encode(data).decode("ascii")})
            self._offsets[path] = file.tell()

    def _has_checkpoint_news(self) -> bool:
        return self._list_checkpoints() != self._listing

    def _list_checkpoints(self) -> dict[str, Any]:
        folder = self._run.checkpoints
        links = {name: (folder / name).readlink().name for name in _LINKS if (folder / name).is_symlink()}
        return {"names": [path.name for path in whole_checkpoints(folder)], "links": links}

    def _send_checkpoints(self) -> None:
        listing = self._list_checkpoints()
        for name in listing["names"]:
            if name in self._checkpoints:
                continue
            folder = self._run.checkpoints / name
            try:
                # The manifest comes last: with it the checkpoint is whole.
                files = sorted(folder.rglob("*"), key=lambda path: path.name == MANIFEST)
                for path in files:
                    if path.is_file():
                        relative = path.relative_to(folder).as_posix()
                        for data in file_chunks(path):
                            self._send({"is": "checkpoint-file", "checkpoint": name, "name": relative, "data": data})
            except FileNotFoundError:  # removed meanwhile, as `checkpoint.keep` says
                continue
            self._checkpoints.add(name)
        self._send({"is": "checkpoints", **listing})
        self._listing = listing


class Inbox:
    """The controller's side: puts a node's messages into the controller's run directory."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def take(self, message: dict[str, Any]) -> None:
        """Handle one message of an `Outbox`; other messages are left aside.

        Raises:
            CheckpointError: the checkpoint cannot be written here.
        """
        kind = message["is"]
        if kind == "growth":
            with (self._run.path / safe_name(message["name"])).open("ab") as file:
                file.write(base64.b64decode(message["data"]))
        elif kind == "file":
            path = self._run.path / safe_name(message["name"])
            aside = path.with_name(f".{path.name}.partial")
            aside.write_bytes(base64.b64decode(message["data"]))
            aside.replace(path)
        elif kind == "checkpoint-file":
            self._write_checkpoint_file(message)
        elif kind == "checkpoints":
            self._arrange(message["names"], message["links"])

    def _write_checkpoint_file(self, message: dict[str, Any]) -> None:
        folder = self._run.checkpoints / (safe_name(message["checkpoint"]) + PARTIAL)
        path = folder / safe_name(message["name"])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(base64.b64decode(message["data"]))
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint cannot be copied here: {error.strerror}",
                where=str(path),
                hint="it is whole on the first node; free space here",
            ) from error

    def _arrange(self, names: Sequence[str], links: dict[str, str]) -> None:
        """Put finished checkpoints in place, move the links, and remove what the first node has removed."""
        folder = self._run.checkpoints
        for partial in folder.glob(f"*{PARTIAL}"):
            final = folder / partial.name.removesuffix(PARTIAL)
            if final.name in names and (partial / MANIFEST).is_file():
                verify(partial)
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
            else:
                shutil.rmtree(partial, ignore_errors=True)
        for name, target in links.items():
            if name in _LINKS and (folder / safe_name(target)).is_dir():
                point(folder / name, target)
        for path in whole_checkpoints(folder):
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)
