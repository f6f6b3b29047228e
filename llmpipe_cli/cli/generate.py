"""``llmpipe generate``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmpipe_cli.cli import console, jobs
from llmpipe_cli.cli.options import (
    DEFAULT_GRACE_SECONDS,
    DevicesOption,
    DryRunOption,
    EnvOption,
    GraceOption,
    JsonOption,
    LauncherOption,
    OutputDirOption,
)
from llmpipe_cli.errors import RankError, UsageError
from llmpipe_cli.run import RunDirectory, read_json

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A model directory, a run, a run's name or a hub id.", show_default=False),
]
PromptOption = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to go on from; repeatable.")
]
PromptsOption = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help='One prompt a line, or JSONL with "prompt"; - reads stdin.'),
]


def generate(
    model: ModelArgument,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to add to each prompt.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token, more draws at random.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, metavar="K", help="Draw from the K likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="P", help="Draw from the likeliest tokens of this total share.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Decides the random draws.")] = 1234,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="Number format: fp32, bf16 or fp16.")] = "fp32",
    stages: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Pipeline stages; by default one a device.")
    ] = None,
    output_dir: OutputDirOption = Path("runs"),
    devices: DevicesOption = None,
    launcher: LauncherOption = None,
    env: EnvOption = None,
    grace_seconds: GraceOption = DEFAULT_GRACE_SECONDS,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Go on from prompts with a model that is split over pipeline stages."""
    options = jobs.LaunchOptions(devices, launcher, dry_run, as_json, jobs.read_environment(env), grace_seconds)
    texts = _read_prompts(prompt or [], prompts)
    _ = options.starter  # a mistake in its flags is told before anything else is done

    from llmpipe_cli.cli.models import find_model

    found = find_model(model, output_dir)
    recipe = _recipe(found, dtype, stages)
    available = jobs.devices_for(options)
    plan = jobs.plan_job(
        recipe,
        None,
        available,
        job="generate",
        checkpoint=found,
        options={
            "prompts": texts,
            "max_new_tokens": max_new_tokens,
            "tokenizer": _tokenizer_source(found),
            "sampling": {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed},
        },
    )
    finished = jobs.run_plan(plan, None, output_dir, options)
    if finished is not None:
        if finished.exit_code == 0:
            _print_result(finished.run, texts, as_json)
        raise typer.Exit(finished.exit_code)


def _name(model: Path | str) -> str:
    """A run's name for jobs with this model: that of the run that made it, or of the model itself."""
    if isinstance(model, Path) and model.parent.name == "checkpoints":
        return RunDirectory(model.parent.parent).recipe_name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).lstrip("._-")
    return name[:80] or "model"


def _tokenizer_source(model: Path | str) -> str:
    """The model itself, or for adapters without a tokenizer the model that they belong to."""
    adapter = read_json(Path(model) / "adapter_config.json")
    if adapter and not (Path(model) / "tokenizer_config.json").is_file():
        return str(adapter.get("base_model_name_or_path") or model)
    return str(model)


def _recipe(model: Path | str, dtype: str, stages: int | None) -> Any:
    """The smallest recipe that says what to load and how to split it."""
    from llmpipe_cli.recipe.schema import Recipe

    if dtype not in ("fp32", "bf16", "fp16"):
        raise UsageError(f"'{dtype}' is not a number format", where="--dtype", hint="write fp32, bf16 or fp16")
    return Recipe.model_validate(
        {
            "name": _name(model),
            "model": {"from": str(model), "dtype": dtype},
            "parallel": {"pipeline": stages or "auto", "tensor": 1, "data": 1},
        }
    )


def _read_prompts(given: list[str], file: Path | None) -> list[str]:
    """All prompts, in order.

    Raises:
        UsageError: none at all, or a file that cannot be read.
    """
    prompts = list(given)
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the prompts cannot be read: {error}", where=f"--prompts {file}") from error
        prompts += _parse_prompts(text, file)
    if not prompts:
        raise UsageError("there is nothing to go on from", hint='give --prompt "Once upon a time" or --prompts FILE')
    return prompts


def _parse_prompts(text: str, file: Path) -> list[str]:
    lines = [line for line in text.split("\n") if line.strip()]
    if file.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError):
            message = 'not a JSON object with "prompt"'
            raise UsageError(message, where=f"{file}:{number}", hint='{"prompt": "..."}') from None
    return prompts


def _print_result(run: RunDirectory, prompts: list[str], as_json: bool) -> None:
    """The texts in the prompts' order, on stdout."""
    try:
        lines = run.generations.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RankError("the ranks ended without a result", where=str(run.path), hint=f"see {run.logs}") from error
    results = sorted((json.loads(line) for line in lines), key=lambda result: result["index"])
    if as_json:
        console.print_json({"run": str(run.path), "generations": results})
        return
    from rich.text import Text

    for result in results:
        prompt = result.get("prompt", prompts[result["index"]])
        console.stdout().print(Text.assemble((prompt, "bold cyan"), result["text"]), soft_wrap=True)
        if len(results) > 1:
            console.stdout().print(Text("─" * 20, style="dim"))
