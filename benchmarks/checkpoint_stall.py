"""For how long training stands still for a checkpoint that is written in the background.

    python benchmarks/checkpoint_stall.py

Trains two stages of one thread each, at the size of recipes/demo.yaml and at a larger one, and saves every few steps.
Printed are the stall that training reports for the first save, and in medians over all later ones: the stall, as a
share of a step in whose time nothing was written, the time that two processes take to do nothing but copy as many
bytes as rank 0 does into memory that they have used before, and how much longer steps are while a checkpoint is being
written on the same two cores.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmpipe_cli.data.prepare import prepare
from llmpipe_cli.plan.resolve import make_plan
from llmpipe_cli.recipe.schema import Recipe
from llmpipe_cli.run import RunDirectory, read_metrics

_RANKS = 2
_PIECE = 1 << 20  # numbers in a tensor that is copied for comparison


@dataclass(frozen=True)
class Case:
    """A Llama and how often it is saved."""

    name: str
    hidden: int
    inner: int
    layers: int
    vocab: int
    batch: int
    sequence: int
    saves: int
    every: int

    def recipe(self) -> Recipe:
        """Its training."""
        config = {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 32,
            "vocab_size": self.vocab,
            "tie_word_embeddings": False,
        }
        return Recipe.model_validate(
            {
                "name": "stall",
                "model": {"config": config},
                "data": {"train": {"synthetic": True}, "sequence_len": self.sequence},
                "train": {"max_steps": self.saves * self.every + 2, "global_batch_size": self.batch},
                "parallel": {"pipeline": _RANKS},
                "checkpoint": {"every_steps": self.every, "keep": 1},
            }
        )


CASES = (
    Case("demo", 192, 512, 4, 1024, batch=16, sequence=128, saves=8, every=10),
    Case("93 M parameters", 768, 2048, 8, 24000, batch=4, sequence=32, saves=6, every=4),
)


def main() -> None:
    """Measure all cases and print the table."""
    print("| model | written | step s | first stall ms | stall ms | of a step | copy ms | steps while it is written |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            run = _train(case, Path(folder))
            written = sum(path.stat().st_size for path in (run.checkpoints / "latest").resolve().rglob("*.safetensors"))
            step, beside, first, stall = _times(list(read_metrics(run.metrics)))
            copied = _copy_seconds(_first_ranks_bytes((run.checkpoints / "latest").resolve()))
            print(
                f"| {case.name} | {written / 1e6:.0f} MB | {step:.3f} | {1e3 * first:.1f} | {1e3 * stall:.1f} "
                f"| {stall / step:.1%} | {1e3 * copied:.1f} | x {beside / step:.2f} |",
                flush=True,
            )


def _train(case: Case, folder: Path) -> RunDirectory:
    recipe = case.recipe()
    data = prepare(recipe, folder, folder / "cache")
    run = RunDirectory.create(folder / "runs", "stall")
    make_plan(recipe, data, device="cpu", num_devices=_RANKS).save(run.plan)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={_RANKS}"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "-m", "llmpipe_cli.worker", str(run.path)],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return run


def _times(lines: list[dict[str, Any]]) -> tuple[float, float, float, float]:
    """Medians of a step's seconds when nothing is written and when something is; the first stall; the others' median.

    The line of a save comes after the first step that ends with the checkpoint on disk: steps since the save were
    taken beside it.
    """
    plain: list[float] = []
    beside: list[float] = []
    since: list[tuple[int, float]] = []
    stalls = []
    for line in lines:
        if "event" not in line:
            since.append((line["step"], line["step_seconds"]))
        elif line["event"] == "checkpoint":
            stalls.append(line["stall_seconds"])
            plain += [seconds for step, seconds in since if 2 < step <= line["step"]]
            beside += [seconds for step, seconds in since if step > line["step"]]
            since = []
    return statistics.median(plain), statistics.median(beside), stalls[0], statistics.median(stalls[1:])


def _first_ranks_bytes(checkpoint: Path) -> int:
    """What rank 0 copies, whose stall is reported: its optimizer state, and the first of two files of weights."""
    files = (*checkpoint.glob("model-00001-of-*"), *checkpoint.glob("training/optimizer-00000.*"))
    return sum(path.stat().st_size for path in files)


def _copy_seconds(num_bytes: int) -> float:
    """Time to copy so much in each of as many processes as there are ranks, at the same time."""
    with ProcessPoolExecutor(_RANKS) as pool:
        return statistics.median(pool.map(_copy, [num_bytes] * _RANKS))


def _copy(num_bytes: int) -> float:
    torch.set_num_threads(1)
    tensors = [torch.ones(_PIECE) for _ in range(max(1, num_bytes // (4 * _PIECE)))]
    copies = [tensor.clone() for tensor in tensors]
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
