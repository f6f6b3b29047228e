"""Flags that several commands share, with their help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a ready one.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe: train.learning_rate=3e-4."),
]
DevicesOption = Annotated[
    int | None,
    typer.Option("--devices", metavar="N", help="Devices to use; all accelerators, or up to two cores, by default."),
]
LauncherOption = Annotated[
    str | None,
    typer.Option(
        "--launcher", metavar="NAME", help="How ranks are started: local, ssh, slurm, ...; by default what fits."
    ),
]
LauncherOptionOption = Annotated[
    list[str] | None,
    typer.Option("--launcher-option", metavar="KEY=VALUE", help="Setting of the launcher, see the README; repeatable."),
]
HostfileOption = Annotated[
    Path | None, typer.Option("--hostfile", metavar="FILE", help="Nodes to run on, a line each: NAME slots=N.")
]
DetachOption = Annotated[
    bool, typer.Option("--detach", help="Return as soon as the job is handed over; see `llmpipe runs`.")
]
IncludeOption = Annotated[
    str | None,
    typer.Option("--include", metavar="NODES", help="Only these nodes and devices: node-1@node-2:0,2."),
]
ExcludeOption = Annotated[
    str | None, typer.Option("--exclude", metavar="NODES", help="All nodes and devices but these: node-3@node-4:7.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the command, its environment and the DeepSpeed config; start nothing.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
EnvOption = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="KEY[=VALUE]", help="Variable for the ranks; without a value, the shell's own."),
]
GraceOption = Annotated[
    float,
    typer.Option("--grace-seconds", metavar="S", min=0.0, help="Time to save after a request to stop; then killed."),
]
OutputDirOption = Annotated[Path, typer.Option("--output-dir", metavar="DIR", help="Folder of the run directories.")]
DEFAULT_GRACE_SECONDS = 120.0
