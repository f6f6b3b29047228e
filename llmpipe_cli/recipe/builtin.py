"""Finds the ready recipes, in a checkout of the repository as well as in an installed wheel.

A checkout has them in `recipes/` beside the package, a wheel in `llmpipe_cli/builtin/recipes/` (see pyproject.toml).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from llmpipe_cli.errors import UsageError
from llmpipe_cli.recipe.names import nearest

_PACKAGE = Path(__file__).resolve().parents[1]


def builtin_folder(name: str) -> Path:
    """The folder `recipes` or `hostfiles` that came with this installation.

    Raises:
        UsageError: the installation is incomplete.
    """
    for folder in (_PACKAGE / "builtin" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise UsageError(f"this installation has no {name}", hint="install llmpipe_cli again")


@cache
def builtin_recipes() -> dict[str, Path]:
    """Ready recipes by name, in alphabetical order."""
    return {file.stem: file for file in sorted(builtin_folder("recipes").glob("*.yaml"), key=lambda file: file.stem)}


def find_recipe(name: str | Path) -> tuple[Path, str]:
    """The file that a recipe argument means: a path that exists, or the name of a ready recipe.

    Returns:
        the file and its name in messages.

    Raises:
        UsageError: neither; the nearest names are told.
    """
    shown = str(name)
    if not shown or "\0" in shown:
        raise UsageError("no recipe was named", hint="llmpipe recipes ls lists the ready ones")
    path = Path(shown)
    try:
        if path.is_file() or path.is_dir() or path.is_fifo():
            return path, shown
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=shown[:200]) from None
    ready = builtin_recipes()
    if shown in ready:
        return ready[shown], shown
    siblings = [str(file) for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = nearest(shown, [*siblings, *ready])
    hint = f"did you mean {near}? " if near else ""
    raise UsageError("no such recipe", where=shown, hint=f"{hint}llmpipe recipes ls lists the ready ones")
