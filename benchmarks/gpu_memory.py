"""Predicted peak memory beside `torch.cuda.max_memory_allocated`, for three recipes on one GPU.

    python benchmarks/gpu_memory.py FOLDER

Trains each for a few steps with `llmpipe train` and reads the peak that its metrics report. The prediction is the
planner's for the run's own plan, without the driver's context and the allocator's reserve, which are no tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LLAMA = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 50257, "n_positions": 1024}
RECIPES: dict[str, tuple[dict[str, Any], str, int, int, str]] = {
    "llama-bf16": (LLAMA, "bf16", 2048, 2, "none"),
    "llama-bf16-full": (LLAMA, "bf16", 4096, 4, "full"),
    "gpt2-fp32": (GPT2, "fp32", 1024, 4, "none"),
}
"""Model, dtype, tokens a sample, samples a micro-batch, checkpointing."""


def recipe(name: str) -> dict[str, Any]:
    """The recipe of that name: two micro-batches a step."""
    config, dtype, length, micro_batch, checkpointing = RECIPES[name]
    return {
        "name": name,
        "model": {"config": config, "dtype": dtype},
        "data": {"train": {"synthetic": True}, "sequence_len": length},
        "train": {"max_steps": 4, "global_batch_size": 2 * micro_batch, "micro_batch_size": micro_batch},
        "parallel": {
            "pipeline": 1, "data": 1, "tensor": 1, "schedule": "1f1b", "activation_checkpointing": checkpointing
        },
    }  # fmt: skip


def train(folder: Path, name: str) -> Path:
    """Train a recipe; returns its run directory."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps(recipe(name)))  # JSON is YAML
    command = [sys.executable, "-m", "llmpipe_cli", "train", file.name, "--devices", "1", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return folder / json.loads(done.stdout)["run"]


def main() -> None:
    """Measure, predict, print."""
    from llmpipe_cli.cluster.devices import local_devices
    from llmpipe_cli.plan.calibration import planned_candidate
    from llmpipe_cli.plan.plan import Plan
    from llmpipe_cli.plan.propose import machines_for

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if local_devices().kind == "cpu":
        raise SystemExit("this machine has no GPU; for processors there is benchmarks/tracked_memory.py")
    folder.mkdir(parents=True, exist_ok=True)
    for name in RECIPES:
        run = train(folder, name)
        plan = Plan.load(run / "plan.json")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        measured = max(line["memory_bytes"][0] for line in lines if "event" not in line)
        cluster = machines_for(plan)
        candidate = None if cluster is None else planned_candidate(plan, cluster)
        assert candidate is not None
        predicted = candidate.memory[0].allocated
        off = predicted / measured - 1
        print(f"{name:16s} measured {measured / 2**30:.2f} GiB, predicted {predicted / 2**30:.2f} GiB ({off:+.1%})")


if __name__ == "__main__":
    main()
