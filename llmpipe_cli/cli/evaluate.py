"""``llmpipe evaluate``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from llmpipe_cli.cli import console, jobs
from llmpipe_cli.cli.options import RecipeArgument, SetOption, launching
from llmpipe_cli.errors import CheckpointError, RankError, UsageError
from llmpipe_cli.run import RunDirectory, read_json

if TYPE_CHECKING:
    from llmpipe_cli.recipe.load import LoadedRecipe
    from llmpipe_cli.recipe.schema import Recipe

CheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="C",
        help="A checkpoint, a run, or any model directory or hub id; by default this recipe's newest checkpoint.",
    ),
]

FoldsOption = Annotated[
    str | None,
    typer.Option(
        "--folds",
        metavar="K|all",
        help="Cross-validate: train and measure K times, each time without one part of the training data; all leaves "
        "each document out once. The same command goes on after a stop.",
    ),
]


HarnessOption = Annotated[
    str | None,
    typer.Option(
        "--harness",
        metavar="TASKS",
        help="Tasks of lm-evaluation-harness instead of the recipe's data, by name: hellaswag,arc_easy. "
        "RECIPE may then be a model directory, a run or a hub id too.",
    ),
]
HarnessIncludeOption = Annotated[
    Path | None, typer.Option("--harness-include", metavar="DIR", help="Folder with harness tasks of your own.")
]
ShotsOption = Annotated[
    int | None, typer.Option("--num-fewshot", min=0, metavar="N", help="Examples before each harness question.")
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N documents of a harness task.")
]


@launching()
def evaluate(
    recipe: RecipeArgument,
    checkpoint: CheckpointOption = None,
    folds: FoldsOption = None,
    set_: SetOption = None,
    harness: HarnessOption = None,
    harness_include: HarnessIncludeOption = None,
    num_fewshot: ShotsOption = None,
    limit: LimitOption = None,
    *,
    options: jobs.LaunchOptions,
) -> None:
    """Measure a checkpoint on the recipe's validation data, under the pipeline."""
    for flag, value in (("harness-include", harness_include), ("num-fewshot", num_fewshot), ("limit", limit)):
        if value is not None and harness is None:
            raise UsageError("this is for the harness", where=f"--{flag} {value}", hint="add --harness TASKS")
    if folds is not None and harness is not None:
        raise UsageError("--folds and --harness exclude each other", hint="leave one of the two out")
    if folds is not None:
        _cross_validate(recipe, checkpoint, folds, set_ or [], options)
    if harness is not None:
        from llmpipe_cli.cli.harness import HarnessOptions, evaluate_with_harness

        chosen = HarnessOptions(harness.split(","), harness_include, num_fewshot, limit)
        evaluate_with_harness(*_harness_model(recipe, checkpoint, set_ or []), chosen, options)
        return
    from llmpipe_cli.cli.models import naming, warn_of_drawn_weights

    loaded = jobs.load(recipe, set_ or [], "evaluate")
    output_dir = Path(loaded.recipe.output_dir)
    model = _find(checkpoint, loaded, output_dir)
    found = jobs.devices_for(options)
    data = jobs.prepare(loaded, model)
    with naming(model, output_dir) if model is not None else nullcontext():
        plan = jobs.plan_job(
            loaded.recipe,
            data,
            found,
            job="evaluate",
            loaded=loaded,
            checkpoint=model,
            options={"split": "validation", "checkpoint": str(model or loaded.recipe.model.from_)},
        )
    warn_of_drawn_weights(plan)
    finished = jobs.run_plan(plan, loaded, output_dir, options)
    if finished is not None:
        if finished.exit_code == 0:
            _print_result(finished.run, options.as_json)
        raise typer.Exit(finished.exit_code)


def _cross_validate(
    recipe: Path, checkpoint: str | None, folds: str, overrides: list[str], options: jobs.LaunchOptions
) -> NoReturn:
    from llmpipe_cli.cli.folds import cross_validate

    if checkpoint is not None:
        raise UsageError("--folds trains its own models", where="--checkpoint", hint="leave one of the two out")
    result, exit_code = cross_validate(jobs.load(recipe, overrides, "train"), folds, options)
    if result is not None and options.as_json:
        console.print_json(result)
    elif result is not None:
        from llmpipe_cli.report.summary import folds_table

        console.stdout().print(folds_table(result))
    raise typer.Exit(exit_code)


def _harness_model(what: Path, checkpoint: str | None, overrides: list[str]) -> tuple[Path | str, Recipe, Path]:
    """The model that a recipe (its newest checkpoint, or the one named) or a model's own name means, a recipe to load
    it with, and the folder of runs."""
    from llmpipe_cli.cli.generate import minimal_recipe
    from llmpipe_cli.cli.models import find_model
    from llmpipe_cli.recipe.builtin import builtin_recipes

    if what.suffix in (".yaml", ".yml") or str(what) in builtin_recipes():
        loaded = jobs.load(what, overrides, None)  # the data is the harness's: the recipe needs none
        output_dir = Path(loaded.recipe.output_dir)
        model = _find(checkpoint, loaded, output_dir) or str(loaded.recipe.model.from_)
        return model, loaded.recipe, output_dir
    model = find_model(checkpoint or str(what), Path("runs"))
    return model, minimal_recipe(model, "fp32", None), Path("runs")


def _find(checkpoint: str | None, loaded: LoadedRecipe, output_dir: Path) -> Path | str | None:
    """The model to measure; None leaves the recipe's own pretrained one."""
    from llmpipe_cli.cli.models import find_model, find_resume

    if checkpoint is not None:
        return find_model(checkpoint, output_dir)
    newest = find_resume("auto", loaded.recipe.name, output_dir)
    if newest is None and loaded.recipe.model.from_ is None:
        raise CheckpointError(
            f"there is no checkpoint of '{loaded.recipe.name}' in {output_dir} yet",
            hint="train first, or name a model with --checkpoint",
        )
    return newest


def _print_result(run: RunDirectory, as_json: bool) -> None:
    result: dict[str, Any] | None = read_json(run.evaluation)
    if result is None:
        raise RankError("the ranks ended without a result", where=str(run.path), hint=f"see {run.logs}")
    if as_json:
        console.print_json(result)
        return
    from llmpipe_cli.report.summary import evaluation_table

    console.stdout().print(evaluation_table(result))
    console.say(f"run        {run.path}")
