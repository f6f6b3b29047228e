"""What every command prints, and where: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpipe_cli.errors import LlmpipeError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

_PIPE_WIDTH = 160
DEBUG_VARIABLE = "LLMPIPE_DEBUG"


@cache
def stderr() -> Console:
    """The console for messages and progress."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@cache
def stdout() -> Console:
    """The console for results; a pipe has no width that tables would have to keep to."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(highlight=False, width=width)


def say(message: str, style: str = "") -> None:
    """One line for the user, on stderr; never wrapped, so that paths can be copied."""
    stderr().print(message, style=style or None, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """The one JSON document of a command, on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_error(error: LlmpipeError) -> None:
    """What is wrong, where, and what to do; a recipe's mistakes one after the other."""
    problems: list[Any] = error.problems if isinstance(error, RecipeError) else [error]
    for problem in problems:
        _print_problem(problem)
    if len(problems) > 1:
        say(f"{len(problems)} mistakes", "bold red")


def print_unexpected(error: BaseException) -> None:
    """A fault of this program: one line, and where the traceback is."""
    folder = Path(tempfile.mkdtemp(prefix="llmpipe-"))
    path = folder / "traceback.txt"
    path.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="replace")
    summary = f"{type(error).__name__}: {error}".splitlines()[0]
    _print_parts("this is a fault in llmpipe", summary, None, f"the traceback is in {path}")


def error_as_json(error: LlmpipeError) -> dict[str, Any]:
    """The document that a failed ``--json`` command prints."""
    problems: list[Any] = error.problems if isinstance(error, RecipeError) else [error]
    entries = [{"message": item.message, "where": item.where, "hint": item.hint} for item in problems]
    return {"error": {"exit_code": error.exit_code, "type": type(error).__name__, **entries[0]}, "problems": entries}


def debugging() -> bool:
    """Whether the user wants tracebacks."""
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


@contextmanager
def preparation() -> Iterator[Callable[[str, int, int | None], None]]:
    """Shows the progress of work before the start: a bar on a terminal, a line a task elsewhere.

    Yields:
        A function to call with (what is done, bytes done, bytes in all or None).
    """
    console = stderr()
    if not console.is_terminal or console.no_color or console.is_dumb_terminal:
        yield _PlainPreparation().update
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(style="cyan"),
        TextColumn("{task.description}"),
        BarColumn(complete_style="cyan", finished_style="cyan"),
        DownloadColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield update


@contextmanager
def working(what: str) -> Iterator[None]:
    """Says what a few seconds of silence are spent on: a spinner on a terminal, a line elsewhere."""
    console = stderr()
    if console.is_terminal and not console.no_color and not console.is_dumb_terminal:
        with console.status(what, spinner_style="cyan"):
            yield
    else:
        say(what)
        yield


class _PlainPreparation:
    def __init__(self) -> None:
        self._what = ""
        self._written = 0.0

    def update(self, what: str, done: int, total: int | None) -> None:
        if what != self._what:
            self._what, self._written = what, time.monotonic()
            say(what)
        elif time.monotonic() - self._written >= 10:
            self._written = time.monotonic()
            say(f"{what}: {done / 1e6:,.0f}" + (f" of {total / 1e6:,.0f} MB" if total else " MB"))


def _print_problem(error: Any) -> None:
    _print_parts("error", error.message, error.where, error.hint)


def _print_parts(title: str, message: str, where: str | None, hint: str | None) -> None:
    from rich.text import Text

    console = stderr()
    console.print(Text.assemble((f"{title}: ", "bold red"), message), soft_wrap=True)
    if where:
        console.print(Text.assemble(("  at ", "dim"), where), soft_wrap=True)
    if hint:
        console.print(Text.assemble(("  hint: ", "bold cyan"), hint), soft_wrap=True)
