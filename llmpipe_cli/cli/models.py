"""What a user may name where a model is wanted."""

from __future__ import annotations

from pathlib import Path

from llmpipe_cli.errors import CheckpointError, UsageError
from llmpipe_cli.run import RunDirectory, find_checkpoint


def find_model(what: str, output_dir: Path) -> Path | str:
    """A model directory, a run's latest checkpoint, or a hub id left as it is.

    Args:
        what: a folder with a config.json, a run directory, a run's name, or a hub id such as ``gpt2``.
        output_dir: folder of the run directories.

    Raises:
        CheckpointError: the run has no complete checkpoint.
        UsageError: a folder without a model in it.
    """
    path = Path(what)
    if (path / "config.json").is_file():
        return path.resolve()
    if path.is_dir() and not RunDirectory(path).is_run():
        hint = "give a folder that save_pretrained or llmpipe wrote, or a run"
        raise UsageError("there is no config.json in this folder", where=what, hint=hint)
    try:
        RunDirectory.find(what, output_dir)
    except UsageError:
        if path.is_absolute() or what.startswith(".") or what.count("/") > 1:
            hint = f"`llmpipe runs ls --output-dir {output_dir}` lists the runs"
            raise CheckpointError("there is no model and no run here", where=what, hint=hint) from None
        return what
    return find_checkpoint(what, output_dir)
