"""``llmpipe compress``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmpipe_cli.cli import console, jobs
from llmpipe_cli.cli.options import DevicesOption, JsonOption, OutputDirOption, SetOption, launch_options
from llmpipe_cli.errors import RankError, UsageError
from llmpipe_cli.run import read_json, write_json

if TYPE_CHECKING:
    from llmpipe_cli.recipe.load import LoadedRecipe

REPORT_FILE = "compression.json"

CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, a run, or a model directory.", show_default=False)
]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)]


def compress(
    checkpoint: CheckpointArgument,
    out: OutArgument,
    quantize: Annotated[
        str | None, typer.Option("--quantize", metavar="int8|int4", help="Keep weights as integers.")
    ] = None,
    prune_mlp: Annotated[
        float | None,
        typer.Option("--prune-mlp", metavar="SHARE", help="Remove this share of the feed-forward neurons: 0.25."),
    ] = None,
    prune_heads: Annotated[
        float | None,
        typer.Option("--prune-heads", metavar="SHARE", help="Remove this share of the attention heads: 0.25."),
    ] = None,
    prune_weights: Annotated[
        float | None,
        typer.Option("--prune-weights", metavar="SHARE", help="Set this share of each layer's weights to zero: 0.5."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="RECIPE", help="Measure on its validation data, before and after."),
    ] = None,
    set_: SetOption = None,
    devices: DevicesOption = None,
    output_dir: OutputDirOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Make a model smaller: integer weights, fewer neurons, heads or weights; says size, speed and metric."""
    from llmpipe_cli.cli.models import find_model

    if quantize not in (None, "int8", "int4"):
        raise UsageError("--quantize is int8 or int4", where=f"--quantize {quantize}")
    shares = {"mlp": prune_mlp, "heads": prune_heads, "weights": prune_weights}
    wanted = {name: share for name, share in shares.items() if share is not None}
    for name, share in wanted.items():
        if not 0 < share < 1:
            raise UsageError(f"--prune-{name} is a share between 0 and 1", where=f"--prune-{name} {share:g}")
    if quantize is None and not wanted:
        raise UsageError("there is nothing to do", hint="--quantize int8, --prune-mlp 0.25, or both")
    if set_ and recipe is None:
        raise UsageError("--set changes a recipe, and there is none", where=f"--set {set_[0]}", hint="add --recipe")
    loaded = None if recipe is None else jobs.load(recipe, set_ or [], "evaluate")
    found = Path(find_model(checkpoint, output_dir))
    if not found.is_dir():
        raise UsageError("there is no model directory of this name", where=checkpoint, hint="download it first")
    with launch_options(devices, as_json=as_json) as options:
        report = _compress(found, out, quantize, wanted, loaded, options)
    write_json(out / REPORT_FILE, report)
    if as_json:
        console.print_json(report)
        return
    from llmpipe_cli.report.compression import compression_table

    console.stdout().print(compression_table(report))
    console.say(f"model      {out}")


def _compress(
    source: Path,
    out: Path,
    quantize: str | None,
    shares: dict[str, float],
    loaded: LoadedRecipe | None,
    options: jobs.LaunchOptions,
) -> dict[str, Any]:
    """Write `out`; the report of what was done and of what came of it."""
    from llmpipe_cli.model import compress as model_compress
    from llmpipe_cli.model import pruning

    model_compress.check_out(out)
    if quantize is not None:
        model_compress.check_quantizable()
    report: dict[str, Any] = {"checkpoint": str(source), "model": str(out.resolve())}
    with tempfile.TemporaryDirectory(prefix="llmpipe-compress-") as folder:
        plain, rounded = source, Path(folder) / "rounded"
        before = after = model_compress.load_plain(source)
        metrics_before = None if loaded is None else _evaluate(loaded, source, options)
        with console.working("compressing"):
            if shares:
                pruned = model_compress.load_plain(source)
                for name, figure, prune in (
                    ("mlp", "neurons", pruning.prune_mlp),
                    ("heads", "heads", pruning.prune_heads),
                    ("weights", "zeros", pruning.prune_weights),
                ):
                    if name in shares:
                        report[figure] = dict(zip(("before", "after"), prune(pruned, shares[name]), strict=True))
                plain = out if quantize is None else Path(folder) / "pruned"
                model_compress.save_plain(pruned, source, plain)
                after = model_compress.load_plain(plain)
            if quantize is not None:
                done = model_compress.quantize_directory(plain, out, int(quantize.removeprefix("int")))
                report["quantized"] = {"weights": quantize, **vars(done)}
                after = model_compress.load_quantized(out)
            speeds = model_compress.forward_speeds([before, after])
            if quantize is not None and loaded is not None:
                # The pipeline reads floating-point weights: those that the quantized model computes with.
                model_compress.save_rounded(after, plain, rounded)
                plain = rounded
        sizes = [model_compress.weights_bytes(directory) for directory in (source, out)]
        report["bytes"] = {"before": sizes[0], "after": sizes[1], "ratio": sizes[1] / sizes[0]}
        report["tokens_per_second"] = {"before": speeds[0], "after": speeds[1]}
        if loaded is not None and metrics_before is not None:
            metrics_after = _evaluate(loaded, plain, options)
            report["metrics"] = {
                name: {"before": value, "after": metrics_after[name]} for name, value in metrics_before.items()
            }
    return report


def _evaluate(loaded: LoadedRecipe, model: Path, options: jobs.LaunchOptions) -> dict[str, Any]:
    """The metrics of `llmpipe evaluate`.

    Raises:
        RankError: the evaluation failed.
    """
    data = jobs.prepare(loaded, model)
    plan = jobs.plan_job(
        loaded.recipe,
        data,
        jobs.devices_for(options),
        job="evaluate",
        loaded=loaded,
        checkpoint=model,
        options={"split": "validation", "checkpoint": str(model)},
    )
    finished = jobs.run_plan(plan, loaded, Path(loaded.recipe.output_dir), options)
    assert finished is not None
    if finished.exit_code:
        raise typer.Exit(finished.exit_code)
    result: dict[str, Any] | None = read_json(finished.run.evaluation)
    if result is None:
        raise RankError("the ranks ended without a result", where=str(finished.run.path))
    return {name: value for name, value in result["metrics"].items() if isinstance(value, (int, float))}
