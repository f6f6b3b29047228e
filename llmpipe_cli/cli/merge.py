"""``llmpipe merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmpipe_cli.cli import console
from llmpipe_cli.cli.options import JsonOption, OutputDirOption

CheckpointArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT", help="A checkpoint of a LoRA training, its run, or a folder of peft.", show_default=False
    ),
]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)]


def merge(
    checkpoint: CheckpointArgument,
    out: OutArgument,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", metavar="", help="Read the base model from pytorch_model.bin too.")
    ] = False,
    output_dir: OutputDirOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Merge LoRA adapters into their model: writes a plain Hugging Face model."""
    from llmpipe_cli.cli.models import find_model
    from llmpipe_cli.model.merge import merge_adapter

    found = Path(find_model(checkpoint, output_dir))
    with console.working("merging"):
        merge_adapter(found, out, allow_pickle=allow_pickle)
    if as_json:
        console.print_json({"checkpoint": str(found), "model": str(out.resolve())})
    else:
        console.say(f"model      {out}")
