"""``llmpipe data``: prepare a recipe's data ahead of time, and look at samples as the model sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmpipe_cli.cli import console, jobs
from llmpipe_cli.cli.options import JsonOption, RecipeArgument, SetOption
from llmpipe_cli.errors import UsageError

if TYPE_CHECKING:
    from llmpipe_cli.data.prepared import PreparedData

app = typer.Typer(no_args_is_help=True)

SplitOption = Annotated[str, typer.Option("--split", metavar="train|validation", help="Which data to look at.")]
SamplesOption = Annotated[int, typer.Option("--samples", metavar="N", min=1, help="Samples to show.")]
FirstOption = Annotated[int, typer.Option("--first", metavar="I", min=0, help="Number of the first one.")]


@app.command()
def prepare(recipe: RecipeArgument, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Read, clean and tokenise a recipe's data into the cache, and say what is in it."""
    data = _prepared(recipe, set_)
    if as_json:
        console.print_json(data.model_dump(mode="json"))
        return
    from llmpipe_cli.report.samples import data_summary

    console.stdout().print(data_summary(data))


@app.command()
def show(
    recipe: RecipeArgument,
    split: SplitOption = "train",
    samples: SamplesOption = 3,
    first: FirstOption = 0,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show samples as the model sees them: tokens, what is learned of them, what is hidden or padding."""
    data = _prepared(recipe, set_)
    chosen = {"train": data.train, "validation": data.validation}.get(split)
    if chosen is None:
        raise UsageError(f"the recipe has no {split} data", where="--split", hint="train or validation")
    count = int(chosen.stream["shuffle_buffer"]) if chosen.stream is not None else chosen.num_samples
    if first >= count:
        raise UsageError(f"there are {count} samples, numbered from 0", where="--first")
    from llmpipe_cli.report.samples import sample_as_json, sample_view
    from llmpipe_cli.tasks.view import view_samples

    views = view_samples(data, chosen, range(first, min(first + samples, count)))
    if as_json:
        console.print_json([sample_as_json(view) for view in views])
        return
    for view in views:
        console.stdout().print(sample_view(view), soft_wrap=True)


def _prepared(recipe: Any, overrides: list[str] | None) -> PreparedData:
    loaded = jobs.load(recipe, overrides or [], None)
    data = jobs.prepare(loaded)
    if data is None:
        raise UsageError("the recipe has no data", where="data", hint='data: {train: {files: "corpus/*.txt"}}')
    return data
