"""``llmpipe evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llmpipe_cli.cli import console, jobs
from llmpipe_cli.cli.options import (
    DEFAULT_GRACE_SECONDS,
    DevicesOption,
    DryRunOption,
    EnvOption,
    GraceOption,
    JsonOption,
    LauncherOption,
    RecipeArgument,
    SetOption,
)
from llmpipe_cli.errors import CheckpointError, RankError
from llmpipe_cli.run import RunDirectory, find_resume, read_json

CheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="C",
        help="A checkpoint, a run, or any model directory or hub id; by default this recipe's newest checkpoint.",
    ),
]


def evaluate(
    recipe: RecipeArgument,
    checkpoint: CheckpointOption = None,
    set_: SetOption = None,
    devices: DevicesOption = None,
    launcher: LauncherOption = "local",
    env: EnvOption = None,
    grace_seconds: GraceOption = DEFAULT_GRACE_SECONDS,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a checkpoint on the recipe's validation data, under the pipeline."""
    options = jobs.LaunchOptions(devices, launcher, dry_run, as_json, jobs.read_environment(env), grace_seconds)
    loaded = jobs.load(recipe, set_ or [], "evaluate")
    output_dir = Path(loaded.recipe.output_dir)
    model = _find(checkpoint, loaded.recipe.name, output_dir)
    if model is not None:
        overrides = ["model.config=null", f"model.from={json.dumps(str(model))}", *(set_ or [])]
        loaded = jobs.load(recipe, overrides, "evaluate")
    jobs.make_launcher(options.launcher)
    found = jobs.devices_for(options)
    data = jobs.prepare(loaded)

    from llmpipe_cli.plan.resolve import make_plan

    plan = make_plan(
        loaded.recipe,
        job="evaluate",
        data=data,
        num_devices=found.count,
        device=found.kind,
        loaded=loaded,
        options={"split": "validation", "checkpoint": str(model) if model is not None else loaded.recipe.model.from_},
    )
    finished = jobs.run_plan(plan, loaded, output_dir, options)
    if finished is not None:
        if finished.exit_code == 0:
            _print_result(finished.run, as_json)
        raise typer.Exit(finished.exit_code)


def _find(checkpoint: str | None, recipe_name: str, output_dir: Path) -> Path | str | None:
    if checkpoint is None:
        return find_resume("auto", recipe_name, output_dir)
    from llmpipe_cli.cli.models import find_model

    return find_model(checkpoint, output_dir)


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
