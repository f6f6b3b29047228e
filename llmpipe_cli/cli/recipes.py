"""`llmpipe recipes`: find, copy, show and check recipes, and the JSON Schema of their fields."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmpipe_cli.cli import console
from llmpipe_cli.cli.options import JsonOption, SetOption
from llmpipe_cli.errors import UsageError

if TYPE_CHECKING:
    from llmpipe_cli.recipe.load import LoadedRecipe
    from llmpipe_cli.recipe.schema import Recipe

app = typer.Typer(no_args_is_help=True)

NameArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Name of a ready recipe, or a file.", show_default=False)
]


@app.command("ls")
def ls(as_json: JsonOption = False) -> None:
    """List the ready recipes."""
    from rich.table import Table

    from llmpipe_cli.recipe.builtin import builtin_recipes
    from llmpipe_cli.recipe.load import load_recipe

    rows = [
        {"name": name, "task": load_recipe(path).recipe.task, "description": _description(path), "path": str(path)}
        for name, path in builtin_recipes().items()
    ]
    if as_json:
        console.print_json(rows)
        return
    table = Table("name", "task", "description", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(row["name"], row["task"], row["description"])
    console.stdout().print(table)


@app.command("cp")
def cp(
    name: NameArgument,
    destination: Annotated[
        Path | None, typer.Argument(metavar="[DEST]", help="File or folder to copy to.", show_default="./NAME.yaml")
    ] = None,
) -> None:
    """Copy a recipe to start from; an existing file is never overwritten."""
    from llmpipe_cli.recipe.builtin import find_recipe

    source, _ = find_recipe(name)
    target = destination or Path(source.name)
    if target.is_dir():
        target = target / source.name
    text = _read(source)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        hint = f"name another file: llmpipe recipes cp {name} DEST"
        raise UsageError("the file exists and is not overwritten", where=str(target), hint=hint) from None
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(target)) from None
    console.say(f"copied to {target}")


@app.command("show")
def show(name: NameArgument) -> None:
    """Print a recipe, in colours on a terminal."""
    from rich.syntax import Syntax

    from llmpipe_cli.recipe.builtin import find_recipe

    text = _read(find_recipe(name)[0])
    if console.stdout().is_terminal:
        console.stdout().print(Syntax(text, "yaml", theme="ansi_dark", background_color="default", word_wrap=True))
    else:
        sys.stdout.write(text)


@app.command("validate")
def validate(
    name: NameArgument,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a recipe without starting or downloading anything; ends with 2 and every mistake if there is one."""
    from llmpipe_cli.recipe.load import load_recipe

    loaded = load_recipe(name, set_ or [])
    if loaded.recipe.model.from_ is None and not _is_known(loaded.recipe):
        from llmpipe_cli.cli.jobs import check_model

        with console.working("asking transformers for the model"):
            check_model(loaded)
    if as_json:
        notices = [
            {"message": notice.message, "where": notice.where, "hint": notice.hint} for notice in loaded.warnings
        ]
        console.print_json(
            {"recipe": str(loaded.path), "valid": True, "summary": _summary(loaded), "warnings": notices}
        )
        return
    for notice in loaded.warnings:
        console.say(f"warning: {notice}", "yellow")
    console.stdout().print(f"{loaded.shown}: OK", style="green", markup=False, soft_wrap=True)
    console.stdout().print(f"  {_summary(loaded)}", markup=False, soft_wrap=True)


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from llmpipe_cli.recipe.schema import Recipe

    document: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    document |= Recipe.model_json_schema(by_alias=True)
    document["title"] = "llmpipe recipe"
    document["properties"]["extends"] = {"type": "string", "description": "Recipe file that this one is laid over."}
    # What a recipe needs may come from the file it extends.
    document.pop("required", None)
    console.print_json(document)


def _is_known(recipe: Recipe) -> bool:
    """Whether the table has the model's type for the task, so that transformers need not be asked."""
    from llmpipe_cli.model.table import TABLE

    types = json.loads(TABLE.read_text(encoding="utf-8"))["tasks"]
    task = "causal-lm" if recipe.task == "chat" else recipe.task
    return (recipe.model.config or {}).get("model_type") in types.get(task, {})


def _description(path: Path) -> str:
    """The first line of a recipe's leading comment."""
    first = _read(path).partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"cannot be read: {reason}", where=str(path)) from None


def _summary(loaded: LoadedRecipe) -> str:
    """One line on what the recipe does."""
    recipe = loaded.recipe
    model = recipe.model.from_ or f"{(recipe.model.config or {}).get('model_type')} from scratch"
    train = recipe.train
    length = "no training length"
    if train.max_steps is not None:
        length = f"{train.max_steps} steps"
    elif train.num_train_epochs is not None:
        length = f"{train.num_train_epochs:g} epochs"
    parts = [recipe.task, f"{model} in {recipe.model.dtype}", f"{length}, {train.global_batch_size} samples a step"]
    parts.append(f"{recipe.data.sequence_len} tokens a sample")
    if recipe.data.train is None:
        parts.append("no training data: it can be planned, not trained")
    return " · ".join(parts)
