"""Flags that several commands share, with their help texts.

Everything that starts ranks takes the flags of `launch_options`: the decorator `launching` adds them to a command and
hands it what they say.
"""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from llmpipe_cli.cli.jobs import LaunchOptions, read_environment
from llmpipe_cli.cli.launchers import ClusterFlags
from llmpipe_cli.errors import UsageError

DEFAULT_GRACE_SECONDS = 120.0

_PICTURES = (".png", ".svg", ".pdf")


def output_file(path: Path | None) -> Path | None:
    """Callback of flags that name a file to write: a wrong place is told before the work, not after it.

    Raises:
        UsageError: it is a folder, or the folder that it would be in is not there.
    """
    if path is not None and path.is_dir():
        raise UsageError("this is a folder", where=str(path), hint="name a file in it")
    if path is not None and not path.parent.is_dir():
        raise UsageError("its folder does not exist", where=str(path), hint=f"mkdir -p {shlex.quote(str(path.parent))}")
    return path


def picture_file(path: Path | None) -> Path | None:
    """The same for pictures, whose format follows from the name's ending.

    Raises:
        UsageError: as `output_file`, or another ending.
    """
    if path is not None and path.suffix.lower() not in _PICTURES:
        raise UsageError("this is no picture's name", where=str(path), hint=f"end it with {' or '.join(_PICTURES)}")
    return output_file(path)


RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a ready one.", show_default=False)
]
ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A model directory, a run, a run's name or a hub id.", show_default=False),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe: train.max_steps=100."),
]
JsonOption = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON document on stdout.")]
OutputDirOption = Annotated[Path, typer.Option("--output-dir", metavar="DIR", help="Folder of the run directories.")]

# ------------------------------------------------------------------------------------------------- where ranks run

DevicesOption = Annotated[
    int | None,
    typer.Option("--devices", metavar="N", help="Devices to use; all accelerators, or up to two cores, by default."),
]
HostfileOption = Annotated[
    Path | None, typer.Option("--hostfile", metavar="FILE", help="Nodes to run on, a line each: NAME slots=N.")
]
IncludeOption = Annotated[
    str | None,
    typer.Option("--include", metavar="NODES", help="Only these nodes and devices: node-1@node-2:0,2."),
]
ExcludeOption = Annotated[
    str | None, typer.Option("--exclude", metavar="NODES", help="All nodes and devices but these: node-3@node-4:7.")
]
LauncherOption = Annotated[
    str | None,
    typer.Option(
        "--launcher", metavar="NAME", help="How ranks are started: local, ssh, slurm, ...; by default what fits."
    ),
]
LauncherOptionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--launcher-option", metavar="KEY=VALUE", help="Setting of the launcher, see docs/cluster.md; repeatable."
    ),
]
DetachOption = Annotated[
    bool, typer.Option("--detach", metavar="", help="Return as soon as the job is handed over; see `llmpipe runs`.")
]
EnvOption = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="KEY[=VALUE]", help="Variable for the ranks; without a value, the shell's own."),
]
GraceOption = Annotated[
    float,
    typer.Option("--grace-seconds", metavar="S", min=0.0, help="Time to save after a request to stop; then killed."),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", metavar="", help="Print the command, its environment and the DeepSpeed config; start nothing."
    ),
]


def launch_options(
    devices: DevicesOption = None,
    hostfile: HostfileOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    launcher: LauncherOption = None,
    launcher_option: LauncherOptionOption = None,
    detach: DetachOption = False,
    env: EnvOption = None,
    grace_seconds: GraceOption = DEFAULT_GRACE_SECONDS,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> LaunchOptions:
    """What the flags of a command that starts ranks say.

    Raises:
        UsageError: a mistake in --env.
    """
    cluster = ClusterFlags(hostfile, include, exclude, launcher_option or (), detach)
    return LaunchOptions(devices, launcher, dry_run, as_json, read_environment(env), grace_seconds, cluster)


def launching(*, without: Sequence[str] = ("detach",)) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the flags of `launch_options`; it gets what they say as its parameter `options`.

    The launcher, which may hold connections to nodes, is closed when the command ends, however it ends.

    Args:
        without: parameters of `launch_options` that make no sense for the command.
    """
    shared = [flag for name, flag in _parameters(launch_options).items() if name not in without]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [parameter for name, parameter in _parameters(command).items() if name != "options"]

        @functools.wraps(command)
        def run(**given: object) -> None:
            flags = {flag.name: given.pop(flag.name) for flag in shared}
            with launch_options(**flags) as options:  # type: ignore[arg-type]
                command(**given, options=options)

        run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        return run

    return decorate


def _parameters(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function, eval_str=True).parameters)


# ------------------------------------------------------------------------------------------------- what is generated

TemperatureOption = Annotated[
    float,
    typer.Option("--temperature", min=0.0, metavar="T", help="0 takes the likeliest token, more draws at random."),
]
TopKOption = Annotated[
    int, typer.Option("--top-k", min=0, metavar="K", help="Draw from the K likeliest tokens; 0 for all.")
]
TopPOption = Annotated[
    float,
    typer.Option("--top-p", min=0.0, max=1.0, metavar="P", help="Draw from the likeliest tokens of this total share."),
]
RepetitionPenaltyOption = Annotated[
    float,
    typer.Option(
        "--repetition-penalty", min=0.01, metavar="X", help="Above 1, tokens that are there already become less likely."
    ),
]
DrawSeedOption = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Decides the random draws.")]
DtypeOption = Annotated[str, typer.Option("--dtype", metavar="TYPE", help="Number format: fp32, bf16 or fp16.")]
StagesOption = Annotated[
    int | None, typer.Option("--stages", min=1, metavar="N", help="Pipeline stages; by default one a device.")
]
