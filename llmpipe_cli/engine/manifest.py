"""Checkpoint directories on disk: whole or not there.

    checkpoints/step-00001000/   a Hugging Face model directory
                training/        optimizer state and position
                manifest.json    every file with its size and SHA-256
    checkpoints/latest           symbolic link to the newest whole checkpoint
    checkpoints/best             symbolic link to the best one, when the recipe keeps it

A checkpoint is written into a directory with the suffix ``.partial``, synced, and renamed when all ranks are done; the
links are renamed into place after that. Reading needs neither torch nor a process group.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from llmpipe_cli.errors import CheckpointError
from llmpipe_cli.run import MANIFEST, STEP_NAME

PARTIAL = ".partial"
_USE_EARLIER = "use an earlier checkpoint"


def file_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, for the manifest."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def sync_file(path: Path) -> None:
    """Make sure that a file (or a directory's entries) survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(directory: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Write manifest.json for `files` (relative path -> `file_entry`)."""
    path = directory / MANIFEST
    path.write_text(json.dumps({"format": 1, "step": step, "files": dict(sorted(files.items()))}, indent=1) + "\n")
    sync_file(path)


def point(link: Path, target: str) -> None:
    """Let the symbolic link `link` point to its sibling `target`, atomically."""
    temporary = link.with_name(f".{link.name}{PARTIAL}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
    sync_file(link.parent)


def whole_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints under `directory` that were completed, oldest first. Their content is not verified."""
    if not directory.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in directory.iterdir()
        if (match := STEP_NAME.fullmatch(path.name)) and (path / MANIFEST).is_file()
    ]
    return [path for _, path in sorted(found)]


def remove_old(directory: Path, keep: int | None) -> list[str]:
    """Delete all but the newest `keep` checkpoints, never one that `latest` or `best` points to.

    Returns:
        Names of the removed checkpoints.
    """
    for leftover in directory.glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)
    if keep is None:
        return []
    linked = {link.readlink().name for link in (directory / "latest", directory / "best") if link.is_symlink()}
    old = [path for path in whole_checkpoints(directory)[:-keep] if path.name not in linked]
    for path in old:
        doomed = path.rename(path.with_name(path.name + PARTIAL))
        shutil.rmtree(doomed, ignore_errors=True)
    return [path.name for path in old]


def verify(checkpoint: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest.

    Returns:
        The manifest.

    Raises:
        CheckpointError: the manifest or a file is missing, or a file's content changed; names the file.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} is not a whole checkpoint: it has no {MANIFEST}",
            hint="give the directory of a finished checkpoint, such as runs/NAME/checkpoints/step-00001000",
        )
    try:
        manifest = json.loads(path.read_text())
        files = manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError("the manifest cannot be read", where=str(path), hint=_USE_EARLIER) from error
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise CheckpointError("a file of the checkpoint is missing", where=str(file), hint=_USE_EARLIER)
        if file.stat().st_size != expected["bytes"] or file_entry(file) != expected:
            raise CheckpointError(
                "the file is not what was saved: its SHA-256 differs from the manifest",
                where=str(file),
                hint=f"{_USE_EARLIER}, or copy this one again from its source",
            )
    return manifest


def newest_checkpoint(directory: Path) -> tuple[Path, str | None]:
    """The checkpoint to go on from under a run's `checkpoints` directory, verified.

    Returns:
        The checkpoint, and a sentence to tell the user when it is not the one `latest` points to.

    Raises:
        CheckpointError: there is no whole checkpoint.
    """
    latest, notice = directory / "latest", None
    candidates = whole_checkpoints(directory)[::-1]
    if latest.is_symlink() and (latest / MANIFEST).is_file():
        target = latest.resolve()
        candidates = [target] + [path for path in candidates if path.resolve() != target]
    elif candidates:
        notice = f"{latest} is missing or broken; going on from the newest whole checkpoint, {candidates[0].name}"
    first_error: CheckpointError | None = None
    for path in candidates:
        try:
            verify(path)
        except CheckpointError as error:
            first_error = first_error or error
            notice = f"{error.where or path}: {error.message}; going on from an earlier checkpoint"
            continue
        return path, notice
    if first_error is not None:
        raise first_error
    raise CheckpointError(
        f"there is no checkpoint in {directory}", hint="start without --resume, or give the path of a checkpoint"
    )


def training_state(checkpoint: Path) -> dict[str, Any]:
    """Position and settings saved with a checkpoint.

    Raises:
        CheckpointError: the checkpoint holds a model only, or the file is damaged.
    """
    path = checkpoint / "training" / "state.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint} has no training state, so training cannot go on from it",
            hint="use `llmpipe finetune --from` to start a new training from these weights",
        ) from error
    except ValueError as error:
        raise CheckpointError("the training state cannot be read", where=str(path)) from error
