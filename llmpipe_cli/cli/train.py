"""``llmpipe train`` and ``llmpipe finetune``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmpipe_cli.cli import console, jobs
from llmpipe_cli.cli.options import RecipeArgument, SetOption, launching
from llmpipe_cli.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from llmpipe_cli.run import RunDirectory

if TYPE_CHECKING:
    from llmpipe_cli.plan.plan import TrainingSettings
    from llmpipe_cli.recipe.load import LoadedRecipe

ResumeOption = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="auto|PATH",
        help="Go on from a checkpoint, on any layout: auto takes this recipe's newest, or starts at step 0.",
    ),
]
StopAtOption = Annotated[
    int | None,
    typer.Option(
        "--stop-at",
        metavar="STEP",
        min=1,
        help="Save and stop after this step, with exit code 75; the learning rate follows the whole training.",
    ),
]
FromOption = Annotated[
    str,
    typer.Option(
        "--from", metavar="MODEL", help="Model to start from: a directory, a hub id or a run.", show_default=False
    ),
]


@launching(without=())
def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    resume: ResumeOption = None,
    stop_at: StopAtOption = None,
    *,
    options: jobs.LaunchOptions,
) -> None:
    """Train a model as its recipe says: from scratch, or on from a checkpoint.

    Ctrl-C once saves and stops (exit code 75, go on with --resume auto); twice stops at once.
    """
    _train(jobs.load(recipe, set_ or [], "train"), resume, stop_at, options)


@launching(without=())
def finetune(
    recipe: RecipeArgument,
    from_: FromOption,
    set_: SetOption = None,
    resume: ResumeOption = None,
    stop_at: StopAtOption = None,
    *,
    options: jobs.LaunchOptions,
) -> None:
    """Train on from a pretrained model, with its own tokenizer: all its weights, or LoRA adapters (`lora: {r: 8}`)."""
    from llmpipe_cli.cli.models import find_model, naming
    from llmpipe_cli.recipe.load import load_recipe

    # A run's name is looked for where the recipe keeps its runs.
    asked = load_recipe(recipe, _starting_from(from_, set_ or []), job="train").recipe
    model = find_model(from_, Path(asked.output_dir))
    with naming(model, Path(asked.output_dir)):
        _train(jobs.load(recipe, _starting_from(str(model), set_ or []), "train"), resume, stop_at, options)


def _starting_from(model: str, overrides: list[str]) -> list[str]:
    """Overrides that put a model and its tokenizer in the place of the recipe's; --set comes last and still wins."""
    return ["model.config=null", f"model.from={json.dumps(model)}", "tokenizer=null", *overrides]


def _train(loaded: LoadedRecipe, resume: str | None, stop_at: int | None, options: jobs.LaunchOptions) -> None:
    output_dir = Path(loaded.recipe.output_dir)
    checkpoint = None
    if resume is not None:
        from llmpipe_cli.cli.models import find_resume

        checkpoint = find_resume(resume, loaded.recipe.name, output_dir)
        console.say(f"goes on from {checkpoint}" if checkpoint else "no checkpoint yet: starts at step 0")
    if checkpoint is not None:
        jobs.refuse_other_training(loaded, checkpoint)
    devices = jobs.devices_for(options)
    data = jobs.prepare(loaded, checkpoint)
    if checkpoint is not None:
        jobs.warn_of_other_data(data, checkpoint)
    plan = jobs.plan_job(loaded.recipe, data, devices, job="train", loaded=loaded, checkpoint=checkpoint)
    if stop_at is not None:
        plan = plan.stopping_at(stop_at)
    if checkpoint is not None and plan.training is not None and not options.dry_run:
        _end_if_nothing_is_left(checkpoint, plan.training, options)
    finished = jobs.run_plan(plan, loaded, output_dir, options)
    if finished is not None:
        _summarise(finished, options)
        raise typer.Exit(finished.exit_code)


def _end_if_nothing_is_left(checkpoint: Path, training: TrainingSettings, options: jobs.LaunchOptions) -> None:
    """End here when the checkpoint is where the training would end: ranks would only leave a run without a step."""
    from llmpipe_cli.engine.manifest import training_state

    step = training_state(checkpoint)["position"]["step"]
    if step < min(training.max_steps, training.stop_at or training.max_steps):
        return
    exit_code = 0 if step >= training.max_steps else EXIT_STOPPED
    console.say(f"nothing is left to train: the checkpoint is after step {step:,} of {training.max_steps:,}")
    if options.as_json:
        from llmpipe_cli.report.tables import describe_run

        run = RunDirectory(checkpoint.parent.parent)
        facts = describe_run(run)
        console.print_json(
            {
                "run": str(run.path),
                "state": "done" if exit_code == 0 else "stopped",
                "exit_code": exit_code,
                "step": step,
                "loss": facts["loss"],
                "validation": facts["validation"],
                "checkpoint": str(checkpoint),
                "plot": None,
            }
        )
    raise typer.Exit(exit_code)


def _summarise(finished: jobs.Finished, options: jobs.LaunchOptions) -> None:
    """What came out, and where it is."""
    run, progress = finished.run, finished.progress
    checkpoint = run.latest_checkpoint()
    plot = _plot(run) if progress.steps else None
    validation = progress.evaluations[-1]["metrics"] if progress.evaluations else {}
    if options.as_json:
        console.print_json(
            {
                "run": str(run.path),
                "state": run.status()["state"],
                "exit_code": finished.exit_code,
                "step": progress.step,
                "loss": progress.last.get("loss"),
                "validation": validation,
                "checkpoint": _text(checkpoint),
                "plot": _text(plot),
            }
        )
        return
    from llmpipe_cli.report.summary import training_summary

    console.stderr().print(training_summary(run, progress, checkpoint, plot, finished.exit_code), soft_wrap=True)
    if finished.exit_code == EXIT_STOPPED:
        console.say("stopped on request; go on with `--resume auto`", "yellow")
    elif finished.exit_code == EXIT_INTERRUPTED:
        console.say("stopped at once; the last checkpoint is whole, go on with `--resume auto`", "yellow")


def _plot(run: RunDirectory) -> Path | None:
    from llmpipe_cli.report.history import load_history
    from llmpipe_cli.report.plots import plot_loss

    history = load_history(run)
    return plot_loss([history], run.path / "loss.png") if history.train else None


def _text(path: Any) -> str | None:
    return None if path is None else str(path)
