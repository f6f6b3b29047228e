"""The `llmpipe` command: every subcommand, and how errors end.

Modules of commands import nothing heavy at their top; what they need to work is imported when they are called, so that
``--help`` answers at once.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from typing import Annotated, NoReturn

import typer

from llmpipe_cli.cli import (
    bench,
    chat,
    compress,
    console,
    data,
    doctor,
    evaluate,
    generate,
    merge,
    plan,
    recipes,
    runs,
    signals,
    sweep,
    train,
)
from llmpipe_cli.errors import EXIT_INTERRUPTED, EXIT_STOPPED, LlmpipeError, UsageError

# Importing torch and transformers makes a million objects that stay: looking through them every 700 for garbage takes
# 0.5 s of the 7 s of a large `llmpipe plan`.
_GARBAGE_THRESHOLD = 100_000

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

app = typer.Typer(
    name="llmpipe",
    help="Train language models with pipeline parallelism, from one recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("train", help=train.train.__doc__)(train.train)
app.command("pretrain", help="The same as [bold]train[/bold].", hidden=True)(train.train)
app.command("finetune")(train.finetune)
app.command("bench")(bench.bench)
app.command("plan")(plan.plan)
app.command("evaluate")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("merge")(merge.merge)
app.command("compress")(compress.compress)
app.command("doctor")(doctor.doctor)
app.add_typer(data.app, name="data", help="Prepare data, and look at what a model sees of it.")
app.command("sweep")(sweep.sweep)
app.add_typer(recipes.app, name="recipes", help="Find, copy and check recipes.")
app.add_typer(runs.app, name="runs", help="What ran, how it went, plots.")


def _print_version(wanted: bool) -> None:
    if wanted:
        from llmpipe_cli import __version__

        print(f"llmpipe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: runs the command and ends with its exit code."""
    signals.raise_on_signals()
    gc.set_threshold(_GARBAGE_THRESHOLD)
    try:
        app()
    except LlmpipeError as error:
        if console.debugging():
            raise
        _end_with(error)
    except signals.StopRequested:
        console.say("stopped before any rank was started", "yellow")
        sys.exit(EXIT_STOPPED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of stdout (`| head`) has gone; keep the interpreter from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if console.debugging():
            raise
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            _end_with(_unwritable(error))
        console.print_unexpected(error)
        sys.exit(1)


def _end_with(error: LlmpipeError) -> NoReturn:
    """Tell the user what is wrong, and leave with its exit code."""
    if "--json" in sys.argv:
        console.print_json(console.error_as_json(error))
    console.print_error(error)
    sys.exit(error.exit_code)


def _unwritable(error: OSError) -> UsageError:
    """A disk that is full or takes no files can be met wherever something is written."""
    where = None if error.filename is None else str(error.filename)
    hint = "free space, or name a place that can be written"
    return UsageError(f"a file cannot be written: {error.strerror}", where=where, hint=hint)


if __name__ == "__main__":
    main()
