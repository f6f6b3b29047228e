"""llmpipe beside other ways to train the same model on two cores; `make bench` runs it.

    python benchmarks/compare.py --launches 3 --rounds 8 --output docs/benchmarks.md

Each launch starts two processes of one thread; in each round every system does one optimizer step. Speeds drift on a
busy machine, so systems are compared round by round: the reported ratio is the median over all rounds of all launches,
with the quartiles beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from systems import Work

from llmpipe_cli.data.prepare import prepare
from llmpipe_cli.plan.resolve import make_plan
from llmpipe_cli.recipe.schema import Recipe

LABELS = {
    "transformers": "plain transformers, one process",
    "independent": "plain transformers, two independent processes (the ceiling)",
    "deepspeed": "DeepSpeed PipelineEngine, hand-written layers",
    "deepspeed-tuned": "the same, cut balanced, fused AdamW",
    "torch": "torch.distributed.pipelining 1F1B, hand-written layers",
    "torch-tuned": "the same, cut balanced, fused AdamW",
    "llmpipe-1f1b": "**llmpipe**, 1F1B",
    "llmpipe-zb-h1": "**llmpipe**, ZB-H1",
}
REFERENCES = ("independent", "torch", "deepspeed")
Seconds = dict[str, list[float]]


def main() -> None:
    """Run all launches, print the table and write it."""
    arguments = _arguments()
    work = Work(num_layers=arguments.layers, num_micro_batches=arguments.micro_batches)
    names = arguments.systems.split(",")
    everything: dict[str, Seconds] = {kind: {name: [] for name in names} for kind in ("wall", "cpu")}
    for launch in range(arguments.launches):
        with tempfile.TemporaryDirectory() as folder:
            for kind, measured in _launch(Path(folder), work, names, arguments).items():
                for name, seconds in measured.items():
                    everything[kind][name] += seconds
        print(f"launch {launch + 1} of {arguments.launches} done", file=sys.stderr, flush=True)
    table = _table(everything, work)
    print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"work": asdict(work), **everything}) + "\n")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(_document(table, work, arguments))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=3, help="times the processes are started")
    parser.add_argument("--rounds", type=int, default=8, help="measured steps of each system and launch")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model")
    parser.add_argument("--micro-batches", type=int, default=8, help="micro-batches a step")
    parser.add_argument("--systems", default=",".join(LABELS), help="names, separated by commas")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--json", type=Path, help="file for the seconds of every step")
    return parser.parse_args()


def _launch(folder: Path, work: Work, names: list[str], arguments: argparse.Namespace) -> dict[str, Seconds]:
    for name in names:
        if name.startswith("llmpipe-"):
            _write_plan(folder, work, name)
    launch = {
        "work": asdict(work),
        "systems": names,
        "rounds": arguments.rounds,
        "warmup": arguments.warmup,
        "threads": 1,
    }
    (folder / "launch.json").write_text(json.dumps(launch))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(Path(__file__).with_name("rank.py")), str(folder)], check=True, env=environment)
    return json.loads((folder / "seconds.json").read_text())


def _write_plan(folder: Path, work: Work, name: str) -> None:
    """The plan that `llmpipe train` would make for this work, two stages and the schedule in the name."""
    recipe = Recipe.model_validate(
        {
            "name": name,
            "model": {"config": work.config_fields()},
            "data": {"train": {"synthetic": True}, "sequence_len": work.sequence_len},
            "train": {
                "max_steps": 10_000,
                "global_batch_size": work.num_micro_batches * work.micro_batch_size,
                "micro_batch_size": work.micro_batch_size,
                "learning_rate": work.learning_rate,
                "lr_scheduler_type": "constant",
                "max_grad_norm": work.max_grad_norm,
            },
            "parallel": {"pipeline": 2, "schedule": name.removeprefix("llmpipe-")},
        }
    )
    data = prepare(recipe, folder, folder / "cache")
    make_plan(recipe, data, device="cpu", num_devices=2).save(folder / f"{name}.json")


def _tokens_per_second(name: str, seconds: float, work: Work) -> float:
    """Two independent processes do a step each at the same time."""
    return work.tokens * (2 if name == "independent" else 1) / seconds


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _table(everything: dict[str, Seconds], work: Work) -> str:
    wall, cpu = everything["wall"], everything["cpu"]
    speeds = {name: [_tokens_per_second(name, s, work) for s in seconds] for name, seconds in wall.items()}
    references = [name for name in REFERENCES if name in speeds]
    header = ["system", "tokens/s", "CPU s a step", *(f"x {name}" for name in references)]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, values in speeds.items():
        cells = [LABELS.get(name, name), f"{statistics.median(values):.0f}", f"{statistics.median(cpu[name]):.3f}"]
        for reference in references:
            ratios = [own / other for own, other in zip(values, speeds[reference], strict=True)]
            low, middle, high = _quartiles(ratios)
            cells.append("1" if name == reference else f"{middle:.3f} ({low:.3f} to {high:.3f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _document(table: str, work: Work, arguments: argparse.Namespace) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    return f"""# Benchmarks

Written by `{shlex.join(["python", "benchmarks/compare.py", *sys.argv[1:]])}` (`make bench`).

A Llama with {work.num_layers} layers (hidden {work.hidden_size}, MLP {work.intermediate_size}, {work.num_heads} heads,
vocabulary {work.vocab_size}, fp32) on {platform.machine()} with {versions}:
{work.num_micro_batches} micro-batches of {work.micro_batch_size} x {work.sequence_len} tokens a step, AdamW, gradients
clipped at {work.max_grad_norm}; two processes of one thread each, gloo. All systems live in the same processes and do
their steps in turn. Ratios are medians of the ratio within a round over {arguments.launches} launches x
{arguments.rounds} rounds, quartiles in brackets. CPU seconds are those of both processes together. llmpipe's figures
hold its whole training step: reading data, metrics, timeline.

{table}

Two independent processes send nothing and never wait, so together they are what this machine can do; a 1F1B pipeline
of two equal stages can reach {work.num_micro_batches} / {work.num_micro_batches + 1} of it,
because each stage waits for one micro-batch a step.
"""


if __name__ == "__main__":
    main()
