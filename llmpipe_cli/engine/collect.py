"""Files that ranks wrote on disks of their own, brought to rank 0's node over the process group.

Nodes without shared storage write their part of a checkpoint into a folder of their own; with the parts sent to rank 0
the checkpoint there is whole, and it survives the loss of any other node. With shared storage nothing is sent.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmpipe_cli.engine.manifest import PARTIAL, file_entry, sync_file

_CHUNK_BYTES = 16 << 20
_TOKEN = ".token"


def mark(folder: Path, token: str) -> None:
    """Rank 0: leave a sign in its folder by which others tell whether they see it."""
    (folder / _TOKEN).write_text(token)


def unmark(folder: Path) -> None:
    """Rank 0: remove the sign."""
    (folder / _TOKEN).unlink()


def own_folder(folder: Path, token: str) -> Path:
    """Where this rank writes: rank 0's folder if it is seen here, else one of its own that stays on this node."""
    try:
        if (folder / _TOKEN).read_text() == token:
            return folder
    except OSError:
        pass
    own = folder.with_name(f"{folder.name.removesuffix(PARTIAL)}.rank-{dist.get_rank():05d}{PARTIAL}")
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    return own


def send_away(
    own: Path,
    folder: Path,
    files: list[dict[str, dict[str, Any]]],
    away: list[bool],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Bring the files of all ranks that wrote elsewhere into rank 0's `folder`; called by all ranks.

    Args:
        own: the folder this rank wrote into; removed when it is its own.
        folder: rank 0's folder.
        files: by rank, what it wrote: relative path -> `manifest.file_entry`.
        away: by rank, whether it wrote into a folder of its own.
        group: a group of all ranks instead of the default one.

    Raises:
        OSError: rank 0 cannot write, or a file arrived damaged. The other ranks notice nothing.
    """
    rank, problem = dist.get_rank(), None
    for sender, (entries, elsewhere) in enumerate(zip(files, away, strict=True)):
        if not elsewhere:
            continue
        for name, entry in entries.items():
            if rank == sender:
                _send(own / name, entry["bytes"], group)
            elif rank == 0:
                try:
                    _receive(folder / name, entry, sender, group)
                except OSError as error:
                    problem = problem or error
        if rank == sender:
            shutil.rmtree(own, ignore_errors=True)
    if problem is not None:
        raise problem


def _send(path: Path, num_bytes: int, group: dist.ProcessGroup | None) -> None:
    """Send exactly `num_bytes`, so that the receiver never waits."""
    with path.open("rb") as file:
        for start in range(0, num_bytes, _CHUNK_BYTES):
            data = file.read(min(_CHUNK_BYTES, num_bytes - start))
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8).to(_device(group)), 0, group)


def _receive(path: Path, entry: dict[str, Any], sender: int, group: dist.ProcessGroup | None) -> None:
    """Receive all of a file, also when it cannot be written, so that the sender never waits."""
    problem: OSError | None = None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    for start in range(0, entry["bytes"], _CHUNK_BYTES):
        chunk = torch.empty(min(_CHUNK_BYTES, entry["bytes"] - start), dtype=torch.uint8, device=_device(group))
        dist.recv(chunk, sender, group)
        try:
            if problem is None:
                with path.open("ab") as file:
                    file.write(chunk.cpu().numpy().tobytes())
        except OSError as error:
            problem = error
    if problem is not None:
        raise problem
    sync_file(path)
    if file_entry(path) != entry:
        raise OSError(f"{path.name} arrived damaged from rank {sender}")


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where the process group takes tensors from."""
    on_device = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_device else torch.device("cpu")
