"""``llmpipe bench``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmpipe_cli.cli import console, dry_run, jobs
from llmpipe_cli.cli.options import RecipeArgument, SetOption, launching, picture_file
from llmpipe_cli.errors import UsageError

if TYPE_CHECKING:
    from llmpipe_cli.plan.plan import Plan
    from llmpipe_cli.recipe.load import LoadedRecipe
    from llmpipe_cli.run import RunDirectory

CompareOption = Annotated[
    list[str] | None,
    typer.Option(
        "--compare",
        metavar="FIELD=A,B",
        help="Measure each value of a field; repeatable: parallel.pipeline=1,2. Every combination is run.",
    ),
]
_ONE_DEVICE = ("parallel.pipeline=1", "parallel.data=1", "parallel.tensor=1", "parallel.partition=auto")


@launching(without=("detach", "grace_seconds"))
def bench(
    recipe: RecipeArgument,
    compare: CompareOption = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Measured steps of each run.")] = 10,
    warmup: Annotated[int, typer.Option("--warmup", metavar="N", min=0, help="Steps before them.")] = 3,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", min=1, help="Runs of each, in turn with the others.")
    ] = 2,
    png: Annotated[
        Path | None,
        typer.Option(
            "--png", metavar="FILE", callback=picture_file, help="Draw speeds and step times into a PNG or SVG."
        ),
    ] = None,
    set_: SetOption = None,
    *,
    options: jobs.LaunchOptions,
) -> None:
    """Measure training throughput: layouts and schedules side by side, and the speed-up over one device."""
    from llmpipe_cli.report.bench import Contender, bench_rows, bench_tables, plot, split_table

    variants = [(_name(changes), [*(set_ or []), *changes]) for changes in combinations(compare or [])]
    # Unlike training's own length, evaluations and checkpoints, which a bench leaves out.
    loaded = [
        (name, jobs.load(recipe, [*overrides, f"train.max_steps={warmup + steps}"], "train"))
        for name, overrides in variants
    ]
    plans = _distinct([(name, one, _plan(one, options)) for name, one in loaded])
    if not any(plan.layout.num_ranks == 1 for _, _, plan in plans):
        one = jobs.load(recipe, [*(set_ or []), *_ONE_DEVICE, f"train.max_steps={warmup + steps}"], "train")
        plans.insert(0, ("one device", one, _plan(one, options)))
    if plans[0][2].device == "cpu":
        # A device is a fixed number of cores, whatever the layout, or one device would have all of them.
        most_ranks = max(plan.layout.num_ranks for _, _, plan in plans)
        options.environment.setdefault("OMP_NUM_THREADS", str(_threads(most_ranks)))
    if options.dry_run:
        _show_dry_runs(plans, options)
        return
    contenders = [
        Contender(
            name, plan.layout.model_dump(), plan.schedule, flops_per_token=_flops(plan), peak_flops=_peak(plan, options)
        )
        for name, _, plan in plans
    ]
    for number in range(rounds):
        for contender, (name, one, plan) in zip(contenders, plans, strict=True):
            console.say(f"round {number + 1} of {rounds}: {name}")
            contender.runs.append(_run(plan, one, options))
    baseline = next(index for index, (_, _, plan) in enumerate(plans) if plan.layout.num_ranks == 1)
    rows = bench_rows(contenders, baseline, warmup)
    if options.as_json:
        console.print_json({"rows": rows, "baseline": rows[baseline]["system"], "pairs": rounds})
    else:
        for table in bench_tables(rows, baseline, console.stdout().width):
            console.stdout().print(table)
            console.stdout().print()
        console.stdout().print(split_table(rows))
    if png is not None:
        console.say(f"wrote {plot(rows, png)}")


def combinations(compare: Sequence[str]) -> list[list[str]]:
    """Every combination of ``FIELD=A,B`` entries as lists of ``FIELD=VALUE``; one empty list without entries.

    Raises:
        UsageError: an entry without a field or a value.
    """
    choices = []
    for entry in compare:
        name, equals, values = entry.partition("=")
        if not name or not equals or not all(values.split(",")):
            raise UsageError("--compare needs FIELD=A,B", where=f"--compare {entry}")
        choices.append([f"{name}={value}" for value in values.split(",")])
    return [list(chosen) for chosen in itertools.product(*choices)]


def _name(changes: Sequence[str]) -> str:
    """What is told apart from the others: ``pipeline=2 schedule=zb-h1``."""
    return " ".join(change.split(".")[-1] if "." in change.split("=")[0] else change for change in changes) or "recipe"


def _plan(loaded: LoadedRecipe, options: jobs.LaunchOptions) -> Plan:
    data = jobs.prepare(loaded)
    return jobs.plan_job(loaded.recipe, data, jobs.devices_for(options, job_follows=False), job="bench", loaded=loaded)


def _distinct(plans: list[tuple[str, LoadedRecipe, Plan]]) -> list[tuple[str, LoadedRecipe, Plan]]:
    """Without those that would do the same work in the same order as one before: one stage has one schedule."""
    kept: dict[str, tuple[str, LoadedRecipe, Plan]] = {}
    for name, loaded, plan in plans:
        work = plan.model_dump(mode="json")
        del work["recipe"]["parallel"]
        if plan.layout.pipeline == 1:
            del work["schedule"]
        kept.setdefault(json.dumps(work, sort_keys=True), (name, loaded, plan))
    return list(kept.values())


def _flops(plan: Plan) -> float:
    """Floating-point operations a token: the backward pass has twice the forward pass's."""
    from llmpipe_cli.model.slicing.plan import SlicePlan

    sequence_len = plan.recipe["data"]["sequence_len"]
    return 3.0 * sum(SlicePlan.from_json(plan.slice_plan).flops(sequence_len)) / sequence_len


def _peak(plan: Plan, options: jobs.LaunchOptions) -> float | None:
    """What a device of this machine can do a second, where the table of devices has it. Processor cores differ."""
    from llmpipe_cli.plan.devices import match_device

    if plan.device == "cpu":
        return None
    devices = jobs.devices_for(options, job_follows=False)
    device = match_device(devices.name, devices.memory_bytes)
    return device.peak(plan.recipe["model"]["dtype"]) if device is not None else None


def _threads(num_ranks: int) -> int:
    from llmpipe_cli.cluster.devices import num_cores

    return max(1, num_cores() // num_ranks)


def _show_dry_runs(plans: list[tuple[str, LoadedRecipe, Plan]], options: jobs.LaunchOptions) -> None:
    """Each of the plans once; as one JSON document with --json."""
    documents = {name: jobs.dry_run(plan, Path(one.recipe.output_dir), options) for name, one, plan in plans}
    if options.as_json:
        console.print_json({"dry_run": True, "runs": documents})
        return
    for name, document in documents.items():
        console.stdout().print(f"{name}:", style="bold", markup=False)
        dry_run.show(document, as_json=False)


def _run(plan: Plan, loaded: LoadedRecipe, options: jobs.LaunchOptions) -> RunDirectory:
    finished = jobs.run_plan(plan, loaded, Path(loaded.recipe.output_dir), options)
    assert finished is not None
    if finished.exit_code:
        raise typer.Exit(finished.exit_code)
    return finished.run
