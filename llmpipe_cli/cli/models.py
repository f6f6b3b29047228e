"""What a user may name where a checkpoint or a model is wanted; what is taken is checked against its manifest."""

from __future__ import annotations

from pathlib import Path

from llmpipe_cli.cli import console
from llmpipe_cli.errors import CheckpointError, UsageError
from llmpipe_cli.run import MANIFEST, RunDirectory, list_runs

_HINT = "give a checkpoint folder such as runs/NAME/checkpoints/step-00001000, a run directory or a run's name"


def find_resume(resume: str, recipe_name: str, output_dir: Path) -> Path | None:
    """The checkpoint to go on from.

    Args:
        resume: ``auto`` takes the newest checkpoint of the newest training run of this recipe that has one; anything
            else is a checkpoint folder, a run directory or a run's name.
        recipe_name: name of the recipe that is trained.
        output_dir: folder of the run directories.

    Returns:
        The checkpoint folder; None when `auto` finds none, which means a start at step 0.

    Raises:
        CheckpointError: nothing complete is where `resume` points, or a file is damaged.
    """
    if resume != "auto":
        return find_checkpoint(resume, output_dir)
    for run in reversed(list_runs(output_dir)):
        is_training = run.read_plan().get("job", "train") == "train"
        if run.recipe_name == recipe_name and is_training and run.latest_checkpoint() is not None:
            return _newest(run.checkpoints)
    return None


def find_checkpoint(what: str, output_dir: Path) -> Path:
    """The checkpoint that `what` means: its folder, a folder of checkpoints, a run directory or a run's name.

    Raises:
        CheckpointError: nothing complete is there, or a file is damaged.
    """
    from llmpipe_cli.engine.manifest import verify

    path = Path(what)
    if (path / MANIFEST).is_file():
        verify(path)
        return path.resolve()
    if path.is_dir() and path.name == "checkpoints":
        return _newest(path)
    if path.is_dir() and not RunDirectory(path).is_run():
        raise CheckpointError("there is no whole checkpoint (no manifest.json)", where=what, hint=_HINT)
    try:
        run = RunDirectory.find(what, output_dir)
    except UsageError:
        raise CheckpointError("there is no checkpoint and no run of this name", where=what, hint=_HINT) from None
    if run.latest_checkpoint() is None and what in (run.recipe_name, "latest"):
        # A recipe's newest run may have failed before it saved anything.
        named = [other for other in list_runs(output_dir) if what in (other.recipe_name, "latest")]
        run = next((other for other in reversed(named) if other.latest_checkpoint() is not None), run)
    return _newest(run.checkpoints)


def find_model(what: str, output_dir: Path) -> Path | str:
    """A model directory, a run's newest checkpoint, or a hub id left as it is.

    Args:
        what: a folder with a config.json or with peft's adapter_config.json, a run directory, a run's name, or a hub
            id such as ``gpt2``.
        output_dir: folder of the run directories.

    Raises:
        CheckpointError: the run has no complete checkpoint, or a file is damaged.
        UsageError: a folder without a model in it.
    """
    path = Path(what)
    if (path / MANIFEST).is_file():
        return find_checkpoint(what, output_dir)
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return path.resolve()
    if path.is_dir() and path.name != "checkpoints" and not RunDirectory(path).is_run():
        hint = "give a folder that save_pretrained or llmpipe wrote, or a run"
        raise UsageError("there is no config.json in this folder", where=what, hint=hint)
    is_local = path.exists() or path.is_absolute() or what.startswith(".") or path.parent == output_dir
    if not is_local and what.count("/") <= 1 and not _is_run(what, output_dir):
        return what
    return find_checkpoint(what, output_dir)


def _is_run(what: str, output_dir: Path) -> bool:
    return any(what in (run.name, run.recipe_name, "latest") for run in list_runs(output_dir))


def _newest(checkpoints: Path) -> Path:
    from llmpipe_cli.engine.manifest import newest_checkpoint

    checkpoint, notice = newest_checkpoint(checkpoints)
    if notice is not None:
        console.say(f"warning: {notice}", "yellow")
    return checkpoint.resolve()
