"""``llmpipe plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmpipe_cli.cli import console, jobs
from llmpipe_cli.cli.options import DevicesOption, HostfileOption, JsonOption, RecipeArgument, SetOption, picture_file
from llmpipe_cli.errors import UsageError

if TYPE_CHECKING:
    from llmpipe_cli.plan.search import Candidate, Found, Job
    from llmpipe_cli.plan.stand_in import StandIn
    from llmpipe_cli.recipe.schema import Recipe

ClusterOption = Annotated[
    Path | None,
    typer.Option("--cluster", metavar="FILE", help="Description of a cluster that is not at hand, in YAML."),
]
NodesOption = Annotated[
    str | None,
    typer.Option("--nodes", metavar="1,2,4", help="What if there were so many nodes: the best layout of each."),
]
CalibrateOption = Annotated[
    list[Path] | None,
    typer.Option("--calibrate", metavar="RUN", help="A bench run, or doctor's links as JSON; repeatable."),
]
PngOption = Annotated[
    Path | None,
    typer.Option(
        "--png",
        metavar="FILE",
        callback=picture_file,
        help="Draw the schedule, or with --nodes the scaling curve, as PNG or SVG.",
    ),
]


def plan(
    recipe: RecipeArgument,
    hostfile: HostfileOption = None,
    cluster: ClusterOption = None,
    nodes: NodesOption = None,
    calibrate: CalibrateOption = None,
    png: PngOption = None,
    set_: SetOption = None,
    devices: DevicesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the best layout for a recipe and say what it takes: memory a stage, step time, days. Starts nothing."""
    from llmpipe_cli.plan.finer import find
    from llmpipe_cli.plan.propose import as_json as answer_of
    from llmpipe_cli.plan.propose import find_cluster, kernels_of, make_job, read_calibration, refusal
    from llmpipe_cli.plan.recipe_model import recipe_model
    from llmpipe_cli.plan.stand_in import stand_in

    counts = _numbers(nodes)
    loaded = jobs.load(recipe, set_ or [], "plan")
    with jobs.places(loaded), console.working("planning"):
        machines = find_cluster(hostfile, cluster, devices)
        calibration = read_calibration(calibrate or [])
        model = stand_in(recipe_model(loaded.recipe), kernels_of(machines))
        job = make_job(loaded.recipe, machines, model.profile, calibration)
        found = find(loaded.recipe, job, model)
        points = _what_if(loaded.recipe, job, model, counts) if counts else []
        fits = bool(found.best) or any(point["layout"] is not None for point in points)
        error = None if fits else refusal(job, found)
    answer = answer_of(job, found, loaded.recipe)
    if points:
        answer["nodes"] = points
    if error is not None and not found.unfit:
        raise error
    if as_json:
        console.print_json(answer)
    else:
        _show(job, found, answer, loaded.recipe)
    if png is not None:
        _draw(job, found, points, png)
    if error is not None:
        console.print_error(error)
        raise typer.Exit(error.exit_code)


def _numbers(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise UsageError("--nodes needs numbers of nodes", where=f"--nodes {text}", hint="--nodes 1,2,4,8")
    return numbers


def _what_if(recipe: Recipe, job: Job, model: StandIn, counts: list[int]) -> list[dict[str, Any]]:
    """The best layout on other numbers of nodes."""
    from dataclasses import replace

    from llmpipe_cli.plan.finer import find

    points = []
    for count in counts:
        larger = replace(job, cluster=job.cluster.first_nodes(count))
        best = next(iter(find(recipe, larger, model, keep=4).best), None)
        tokens = job.global_batch_size * job.sequence_len
        points.append(
            {
                "nodes": count,
                "devices": larger.cluster.num_devices,
                "layout": None
                if best is None
                else f"{best.choice.pipeline} x {best.choice.tensor} x {best.choice.data}",
                "step_seconds": None if best is None else best.seconds,
                "tokens_per_second": None if best is None or best.seconds is None else tokens / best.seconds,
            }
        )
    return points


def _show(job: Job, found: Found, answer: dict[str, Any], recipe: Recipe) -> None:
    from llmpipe_cli.report import formats
    from llmpipe_cli.report.plan import layouts_table, scaling_table

    out = console.stdout()
    where = answer["cluster"]
    devices = " + ".join(f"{count} x {name}" for name, count in where["counts"].items())
    out.print(
        f"{recipe.name}: {formats.count(answer['num_parameters'])} parameters on {devices} "
        f"({where['nodes']} node{'s' if where['nodes'] > 1 else ''}); "
        f"{found.num_fitting} of {found.num_considered} layouts fit",
        highlight=False,
    )
    out.print(layouts_table(answer["layouts"], answer["chosen"], out.width))
    if found.best:
        _show_best(job, found.best[0], answer)
    if answer.get("nodes"):
        out.print()
        out.print(scaling_table(answer["nodes"]))


def _show_best(job: Job, best: Candidate, answer: dict[str, Any]) -> None:
    """The chosen layout: memory a stage, the picture of its schedule, how long the whole training takes."""
    from llmpipe_cli.plan.search import num_chunks
    from llmpipe_cli.report import formats
    from llmpipe_cli.report.plan import memory_bars, schedule_timeline
    from llmpipe_cli.report.timeline import render

    out = console.stdout()
    out.print()
    out.print(memory_bars(answer["layouts"][0], best.capacity, min(60, out.width - 38)))
    if best.split_layers:
        layers = sorted(best.split_layers, key=lambda name: [part.zfill(9) for part in name.split(".")])
        out.print(f"stages begin inside {', '.join(layers)}", highlight=False)
    chunks = num_chunks(best.choice.schedule, job.pins.chunks)
    if 1 < best.choice.pipeline <= 16:
        out.print()
        picture = schedule_timeline(best.choice.schedule, best.costs, best.choice.num_micro_batches, chunks)
        out.print(render(picture, min(100, out.width)))
    training = answer["training"]
    out.print()
    text = f"{formats.count(training['tokens_per_day'])} tokens a day"
    if training["days"] is not None:
        text += (
            f"; {training['max_steps']:,} steps take {formats.duration(training['days'] * 86400)}, "
            f"{training['device_hours']:,.1f} device-hours"
        )
    out.print(text, highlight=False)
    idle = job.cluster.num_devices - best.choice.num_devices
    if idle:
        out.print(f"{idle:,} of {job.cluster.num_devices:,} devices stay idle", style="yellow", highlight=False)


def _draw(job: Job, found: Found, points: list[dict[str, Any]], path: Path) -> None:
    from llmpipe_cli.plan.search import num_chunks
    from llmpipe_cli.report.plan import plot_scaling, schedule_timeline
    from llmpipe_cli.report.timeline import plot

    if points:
        plot_scaling(points, path)
    elif found.best:
        best = found.best[0]
        chunks = num_chunks(best.choice.schedule, job.pins.chunks)
        plot(schedule_timeline(best.choice.schedule, best.costs, best.choice.num_micro_batches, chunks), path)
    else:
        return
    console.say(f"drawn: {path}")
