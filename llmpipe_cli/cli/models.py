"""What a user may name where a checkpoint or a model is wanted; what is taken is checked against its manifest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmpipe_cli.cli import console
from llmpipe_cli.errors import CheckpointError, LlmpipeError, UsageError
from llmpipe_cli.run import MANIFEST, RunDirectory, list_runs

if TYPE_CHECKING:
    from llmpipe_cli.plan.plan import Plan

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


@contextmanager
def naming(what: Path | str, output_dir: Path) -> Iterator[None]:
    """Errors about a model that was named on the command line say its name, not a field of a recipe.

    A name that is no folder and no run is taken for a hub id: when that fails, it may have been meant as a run's.
    """
    try:
        yield
    except LlmpipeError as error:
        # Errors about a recipe's field end with it: `recipe.yaml:3:8 (model.from)`.
        place = (error.where or "").rpartition(" ")[2].strip("()")
        if place == "model.from" or (isinstance(what, str) and place == "tokenizer"):
            error.where = str(what)
            if isinstance(what, str):
                error.hint = f"there is no run '{what}' in {output_dir} either{_runs_with_a_model(output_dir)}"
        raise


def _runs_with_a_model(output_dir: Path) -> str:
    runs = [run for run in reversed(list_runs(output_dir)) if run.latest_checkpoint() is not None]
    names = list(dict.fromkeys(run.recipe_name for run in runs))[:3]
    return f"; newest with a checkpoint: {', '.join(names)}" if names else ""


def warn_of_drawn_weights(plan: Plan) -> None:
    """Say so when a model is used without training and its files lack weights, which are then drawn at random.

    So it is with the output layer when a text is asked of a model that was trained to classify.
    """
    if plan.weights is None:
        return
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from llmpipe_cli.model.skeleton import build_skeleton
    from llmpipe_cli.model.slicing.plan import SlicePlan
    from llmpipe_cli.model.weights import missing_names

    slice_plan = SlicePlan.from_json(plan.slice_plan)
    config = CONFIG_MAPPING[plan.model_type].from_dict(plan.model_config_fields)
    model = build_skeleton(getattr(transformers, plan.model_class), config)
    allow_pickle = bool(plan.recipe["model"].get("allow_pickle"))
    elsewhere = {*slice_plan.replicated, *slice_plan.unused, *((plan.adapters or {}).get("saved") or ())}
    drawn = [name for name in missing_names(model, plan.weights, allow_pickle=allow_pickle) if name not in elsewhere]
    if drawn:
        more = f" and {len(drawn) - 1} more" if len(drawn) > 1 else ""
        console.say(
            f"warning: the model was not trained for this: {drawn[0]}{more} of its weights are in no file of "
            f"{plan.weights} and are drawn at random",
            "yellow",
        )


def _is_run(what: str, output_dir: Path) -> bool:
    return any(what in (run.name, run.recipe_name, "latest") for run in list_runs(output_dir))


def _newest(checkpoints: Path) -> Path:
    from llmpipe_cli.engine.manifest import newest_checkpoint

    checkpoint, notice = newest_checkpoint(checkpoints)
    if notice is not None:
        console.say(f"warning: {notice}", "yellow")
    return checkpoint.resolve()
