"""``llmpipe runs``: what ran, how it went, plots."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmpipe_cli.cli import console
from llmpipe_cli.cli.options import JsonOption, OutputDirOption, output_file, picture_file
from llmpipe_cli.errors import UsageError
from llmpipe_cli.run import RunDirectory, list_runs, read_json, read_metrics

if TYPE_CHECKING:
    from llmpipe_cli.report.progress import Progress

app = typer.Typer(no_args_is_help=True)

RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run directory, its name, a recipe's name (its newest run) or latest."),
]


@app.command("ls")
def ls(output_dir: OutputDirOption = Path("runs"), as_json: JsonOption = False) -> None:
    """List the runs, newest last."""
    from llmpipe_cli.report.tables import describe_run, runs_table

    rows = [describe_run(run) for run in list_runs(output_dir)]
    if as_json:
        console.print_json({"runs": rows})
    elif rows:
        console.stdout().print(runs_table(rows))
    else:
        console.say(f"there are no runs in {output_dir}")


@app.command("show")
def show(
    run: RunArgument = "latest",
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", callback=output_file, help="Draw the view into an SVG file.")
    ] = None,
    width: Annotated[int, typer.Option("--width", metavar="N", min=60, help="Columns of the SVG.")] = 100,
    output_dir: OutputDirOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Show how one run stands or ended, as the live view draws it."""
    from llmpipe_cli.report.live import export_svg, render
    from llmpipe_cli.report.tables import describe_run, run_details

    found = RunDirectory.find(run, output_dir)
    progress = _progress(found)
    state = found.status()["state"]
    progress.ended = state if state != "running" else ""
    if svg is not None:
        export_svg(progress, svg, width)
        console.say(f"wrote {svg}")
    if as_json:
        console.print_json(describe_run(found))
    elif svg is None:
        out = console.stdout()
        if progress.steps:
            out.print(render(progress, out.width, max(out.height, 24)))
            out.print()
        out.print(run_details(found), soft_wrap=True)


@app.command("logs")
def logs(
    run: RunArgument = "latest",
    rank: Annotated[int | None, typer.Option("--rank", metavar="N", help="Only this rank.")] = None,
    lines: Annotated[int | None, typer.Option("--lines", "-n", metavar="N", min=0, help="Only the last N.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", metavar="", help="Go on until the run ends.")] = False,
    output_dir: OutputDirOption = Path("runs"),
) -> None:
    """Print what the ranks wrote; with several, each line names its rank."""
    found = RunDirectory.find(run, output_dir)
    files = found.log_files() if rank is None else [found.rank_log(rank)]
    files = [file for file in files if file.exists()]
    if not files:
        hint = "a job that has not started its ranks has no logs"
        raise UsageError("there is no log" + (f" of rank {rank}" if rank is not None else ""), where=run, hint=hint)
    followers = [_LogFile(file, f"{file.stem}: " if len(files) > 1 else "") for file in files]
    for follower in followers:
        follower.print_new(lines, rest=not follow)
    running = follow
    while running:
        time.sleep(0.3)
        # Asked before reading: what the ranks wrote before they ended is read after it.
        running = found.status()["state"] == "running"
        for follower in followers:
            follower.print_new(None, rest=not running)


@app.command("cancel")
def cancel(run: RunArgument, output_dir: OutputDirOption = Path("runs")) -> None:
    """Ask a running job to save and stop, as Ctrl-C in its own terminal does."""
    found = RunDirectory.find(run, output_dir)
    state = found.status()["state"]
    if state != "running":
        raise UsageError(f"the run is not running: it is {state}", where=str(found.path))
    found.request_stop()
    job = read_json(found.control / "slurm-job.json")
    if job is not None and not found.metrics.exists():
        from llmpipe_cli.cluster.launchers.slurm import cancel_if_waiting

        cancel_if_waiting(job["job_id"])
    console.say(f"asked {found.name} to save and stop")


@app.command("report")
def report(
    run: RunArgument = "latest",
    compare: Annotated[
        list[str] | None, typer.Option("--compare", metavar="RUN2", help="Lay another run over it; repeatable.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="PNG", callback=picture_file, help="Where; by default loss.png in the run."
        ),
    ] = None,
    output_dir: OutputDirOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Draw the loss curves of a run, or of several laid over each other, into a PNG."""
    from llmpipe_cli.report.history import compare_histories, load_history
    from llmpipe_cli.report.plots import plot_loss

    found = [RunDirectory.find(name, output_dir) for name in [run, *(compare or [])]]
    histories = [load_history(one) for one in found]
    for history, one in zip(histories, found, strict=True):
        if not history.train:
            raise UsageError("the run has no training steps to draw", where=str(one.path))
    path = plot_loss(histories, output or found[0].path / "loss.png")
    comparisons = [compare_histories(histories[0], other) for other in histories[1:]]
    if as_json:
        console.print_json(
            {"plot": str(path), "runs": [str(one.path) for one in found], "comparisons": comparisons},
        )
        return
    for comparison in comparisons:
        console.stdout().print(
            f"{comparison['other']}: {comparison['num_steps']} common steps, losses differ by at most "
            f"{comparison['max_difference']:.2e} ({comparison['max_relative_difference']:.1e} relative)",
            soft_wrap=True,
        )
    console.stdout().print(str(path), soft_wrap=True, markup=False)


@app.command("timeline")
def timeline(
    run: RunArgument = "latest",
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="A recorded step; the last by default.")
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="FILE", callback=picture_file, help="Draw it into a PNG (or .svg) file."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", callback=output_file, help="Write a trace for ui.perfetto.dev."),
    ] = None,
    output_dir: OutputDirOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Show what every stage did during one step: computing, waiting, sending."""
    from llmpipe_cli.report import timeline as drawing

    shown = drawing.load_timeline(RunDirectory.find(run, output_dir), step)
    if png is not None:
        console.say(f"wrote {drawing.plot(shown, png)}")
    if trace is not None:
        console.say(f"wrote {drawing.write_trace(shown, trace)}")
    facts = drawing.summary(shown)
    if as_json:
        console.print_json(facts)
        return
    out = console.stdout()
    out.print(drawing.render(shown, out.width), soft_wrap=True)
    out.print(drawing.describe(facts), soft_wrap=not out.is_terminal)


def _progress(run: RunDirectory) -> Progress:
    from llmpipe_cli.report.tables import progress_of

    progress = progress_of(run)
    for line in read_metrics(run.metrics):
        progress.add(line)
    return progress


class _LogFile:
    """A log that may still grow."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._path, self._prefix, self._offset = path, prefix, 0

    def print_new(self, last: int | None, *, rest: bool) -> None:
        """Print the complete lines since the last call, at most the `last` ones; the `rest` is one without its end."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        if not rest:
            data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        found: list[Any] = data.decode("utf-8", errors="replace").splitlines()
        for line in found if last is None else found[len(found) - last :] if last < len(found) else found:
            sys.stdout.write(f"{self._prefix}{line}\n")
        sys.stdout.flush()
