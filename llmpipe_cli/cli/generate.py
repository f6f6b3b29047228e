"""``llmpipe generate``."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmpipe_cli.cli import console, jobs
from llmpipe_cli.cli.options import (
    DrawSeedOption,
    DtypeOption,
    ModelArgument,
    OutputDirOption,
    RepetitionPenaltyOption,
    StagesOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    launching,
    output_file,
)
from llmpipe_cli.errors import EXIT_STOPPED, RankError, UsageError
from llmpipe_cli.run import RunDirectory, read_json

PromptOption = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to go on from; repeatable.")
]
PromptsOption = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help='One prompt a line, or JSONL with "prompt"; - reads stdin.'),
]


@launching()
def generate(
    model: ModelArgument,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to add to each prompt.")] = 64,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    beams: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Beam search of this width; by default what the model's files say."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End a text where this comes; repeatable.")
    ] = None,
    seed: DrawSeedOption = 1234,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts that are computed together.")] = 8,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", metavar="", help="Keep keys and values of the past on each stage.")
    ] = True,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", callback=output_file, help="Also write the results here, as JSONL."
        ),
    ] = None,
    dtype: DtypeOption = "fp32",
    stages: StagesOption = None,
    tensor: Annotated[
        int, typer.Option("--tensor", min=1, metavar="N", help="Tensor shards of each stage, for types with a plan.")
    ] = 1,
    output_dir: OutputDirOption = Path("runs"),
    *,
    options: jobs.LaunchOptions,
) -> None:
    """Go on from prompts with a model that is split over pipeline stages."""
    given, file, num_prompts = _find_prompts(prompt or [], prompts)

    from llmpipe_cli.cli.models import find_model, naming, warn_of_drawn_weights

    found = find_model(model, output_dir)
    with naming(found, output_dir):
        recipe = minimal_recipe(found, dtype, stages, batch_size, tensor)
    available = jobs.devices_for(options)
    plan = jobs.plan_job(
        recipe,
        None,
        available,
        job="generate",
        checkpoint=found,
        options={
            "prompts": given,
            "prompts_file": str(file.resolve()) if file is not None else None,
            "num_prompts": num_prompts,
            "tokenizer": tokenizer_source(found),
            "settings": {"max_new_tokens": max_new_tokens, "num_beams": beams, "use_cache": cache},
            "sampling": {
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "seed": seed,
                "repetition_penalty": repetition_penalty,
            },
            "stop": stop or [],
        },
    )
    warn_of_drawn_weights(plan)
    finished = jobs.run_plan(plan, None, output_dir, options)
    if finished is not None:
        if finished.exit_code == EXIT_STOPPED:
            console.say("stopped on request: what was generated until then", "yellow")
        if finished.exit_code in (0, EXIT_STOPPED):
            _finish(finished.run, output, options.as_json)
        raise typer.Exit(finished.exit_code)


def _name(model: Path | str) -> str:
    """A run's name for jobs with this model: that of the run that made it, or of the model itself."""
    if isinstance(model, Path) and model.parent.name == "checkpoints":
        return RunDirectory(model.parent.parent).recipe_name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).lstrip("._-")
    return name[:80] or "model"


def tokenizer_source(model: Path | str) -> str:
    """The model itself, or for adapters without a tokenizer the model that they belong to."""
    adapter = read_json(Path(model) / "adapter_config.json")
    if adapter and not (Path(model) / "tokenizer_config.json").is_file():
        return str(adapter.get("base_model_name_or_path") or model)
    return str(model)


def _is_encoder_decoder(model: Path | str) -> bool:
    """Whether the model reads one text and writes another; asks the hub about a hub id."""
    adapter = read_json(Path(model) / "adapter_config.json") or {}
    source = str(adapter.get("base_model_name_or_path") or model)
    config = read_json(Path(source) / "config.json")
    if config is not None:
        return bool(config.get("is_encoder_decoder", False))
    from llmpipe_cli.model.auto import load_config
    from llmpipe_cli.recipe.schema import ModelSection

    return bool(load_config(ModelSection.model_validate({"from": source}), "causal-lm").is_encoder_decoder)


def minimal_recipe(model: Path | str, dtype: str, stages: int | None, batch_size: int = 8, tensor: int = 1) -> Any:
    """The smallest recipe that says what to load and how to split it."""
    from llmpipe_cli.recipe.schema import Recipe

    if dtype not in ("fp32", "bf16", "fp16"):
        raise UsageError(f"'{dtype}' is not a number format", where="--dtype", hint="write fp32, bf16 or fp16")
    return Recipe.model_validate(
        {
            "name": _name(model),
            "task": "translation" if _is_encoder_decoder(model) else "causal-lm",
            "model": {"from": str(model), "dtype": dtype},
            "data": {"sequence_len": 16},  # stages are balanced for single tokens; every model has that many positions
            "train": {"global_batch_size": batch_size, "micro_batch_size": batch_size},
            "parallel": {"pipeline": stages or "auto", "tensor": tensor, "data": 1},
        }
    )


def _find_prompts(given: list[str], file: Path | None) -> tuple[list[str], Path | None, int]:
    """The prompts given as flags or on stdin, the file with more, and how many there are in all.

    A file is read to its end here, so that a bad line is told before anything starts, but it is not kept: the first
    rank reads it again while the others compute.

    Raises:
        UsageError: none at all, or a file that cannot be read.
    """
    from llmpipe_cli.worker.prompts import is_text, parse_prompts

    prompts, count = list(given), 0
    if file is not None and str(file) == "-":
        prompts += parse_prompts(sys.stdin, file)
        file = None
    elif file is not None:
        try:
            with file.open(encoding="utf-8") as lines:
                count = sum(1 for _ in parse_prompts(lines, file))
        except OSError as error:
            raise UsageError(f"the prompts cannot be read: {error.strerror}", where=f"--prompts {file}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"the prompts cannot be read: {error}", where=f"--prompts {file}") from error
    if broken := next((prompt for prompt in prompts if not is_text(prompt)), None):
        raise UsageError("the prompt is not Unicode text", where=repr(broken[:40]))
    if not prompts and not count:
        raise UsageError("there is nothing to go on from", hint='give --prompt "Once upon a time" or --prompts FILE')
    return prompts, file, len(prompts) + count


def _finish(run: RunDirectory, output: Path | None, as_json: bool) -> None:
    """Copy the results to where they are wanted, or print them in the prompts' order."""
    if not run.generations.is_file():
        raise RankError("the ranks ended without a result", where=str(run.path), hint=f"see {run.logs}")
    if output is not None:
        try:
            shutil.copyfile(run.generations, output)
        except OSError as error:
            raise UsageError(f"the results cannot be copied: {error.strerror}", where=f"--output {output}") from error
    if output is not None and not as_json:
        console.say(f"written to {output}")
        return
    results = [json.loads(line) for line in run.generations.read_text(encoding="utf-8").splitlines()]
    if as_json:
        console.print_json({"run": str(run.path), "generations": results})
        return
    from rich.text import Text

    for result in results:
        console.stdout().print(Text.assemble((result["prompt"], "bold cyan"), result["text"]), soft_wrap=True)
        if len(results) > 1:
            console.stdout().print(Text("─" * 20, style="dim"))
