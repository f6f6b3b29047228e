"""Predicted beside measured on this machine: small models on several layouts, after a calibration on some of them.

    python benchmarks/planned.py FOLDER [--seconds S]

Trains each model for a few steps in FOLDER (runs that are there already are not repeated), calibrates on the runs
marked below and predicts the step time of all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WARMUP, STEPS = 3, 8
# name, layers, hidden, sequence, micro-batch, global batch, pipeline, data, schedule; the first are calibrated on
CASES: list[tuple[str, int, int, int, int, int, int, int, str]] = [
    ("a1", 4, 256, 128, 2, 8, 1, 1, "1f1b"),
    ("b1", 6, 512, 128, 2, 8, 1, 1, "1f1b"),
    ("a2", 4, 256, 128, 2, 8, 2, 1, "1f1b"),
    ("a2z", 4, 256, 128, 2, 8, 2, 1, "zb-h1"),
    ("a1r", 4, 256, 128, 2, 8, 1, 2, "1f1b"),
    ("b2", 6, 512, 128, 2, 8, 2, 1, "1f1b"),
    ("b2z", 6, 512, 128, 1, 8, 2, 1, "zb-h1"),
    ("b1m", 6, 512, 128, 4, 8, 1, 1, "1f1b"),
    ("c1", 10, 320, 192, 2, 8, 1, 1, "1f1b"),
    ("c2", 10, 320, 192, 2, 8, 2, 1, "1f1b"),
    ("c2r", 10, 320, 192, 2, 8, 1, 2, "1f1b"),
    ("d2", 3, 768, 96, 4, 16, 2, 1, "1f1b"),
]
CALIBRATED_ON = ("a1", "a2")


def recipe(case: tuple[str, int, int, int, int, int, int, int, str]) -> str:
    """The recipe of a case."""
    name, layers, hidden, sequence, micro, batch, pipeline, data, schedule = case
    return f"""
name: {name}
model:
  config: {{model_type: llama, hidden_size: {hidden}, intermediate_size: {hidden * 8 // 3}, num_hidden_layers: {layers},
           num_attention_heads: {hidden // 64}, num_key_value_heads: {hidden // 64}, vocab_size: 2048,
           max_position_embeddings: 512}}
data: {{train: {{synthetic: true}}, sequence_len: {sequence}}}
train: {{max_steps: {WARMUP + STEPS}, global_batch_size: {batch}, micro_batch_size: {micro}}}
parallel: {{pipeline: {pipeline}, data: {data}, tensor: 1, schedule: {schedule}, zero_stage: 0}}
"""


def run(case: tuple[str, int, int, int, int, int, int, int, str], folder: Path) -> Path | None:
    """The run directory of a case, made if it is not there; one thread a rank."""
    done = [path for path in sorted((folder / "runs").glob(f"{case[0]}-2*")) if any((path / "timeline").glob("*.json"))]
    if done:
        return done[-1]
    path = folder / f"{case[0]}.yaml"
    path.write_text(recipe(case))
    command = [sys.executable, "-m", "llmpipe_cli", "train", path.name, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        print(ended.stderr[-2000:], file=sys.stderr)
        return None
    return folder / json.loads(ended.stdout)["run"]


def measured(path: Path) -> float:
    """Median step time after the warm-up, in seconds."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([line["step_seconds"] for line in lines if "event" not in line][WARMUP:])


def main() -> None:
    from llmpipe_cli.plan.calibration import planned_candidate
    from llmpipe_cli.plan.plan import Plan
    from llmpipe_cli.plan.propose import read_calibration, this_machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further run after so long")
    parser.add_argument("--only-measure", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True, parents=True)
    started = time.monotonic()
    runs: dict[str, Path] = {}
    for case in CASES:
        if time.monotonic() - started < arguments.seconds or any((arguments.folder / "runs").glob(f"{case[0]}-2*")):
            path = run(case, arguments.folder)
            if path is not None:
                runs[case[0]] = path
                print(case[0], f"{measured(path):.4f} s a step", flush=True)
    if arguments.only_measure:
        return
    calibration = read_calibration([runs[name] for name in CALIBRATED_ON])
    assert calibration is not None
    errors: list[Any] = []
    for name, path in runs.items():
        candidate = planned_candidate(Plan.load(path / "plan.json"), this_machine(2), calibration)
        assert candidate is not None
        assert candidate.seconds is not None
        seconds = measured(path)
        errors.append(candidate.seconds / seconds - 1)
        print(f"{name:5s} measured {seconds:.4f} s, predicted {candidate.seconds:.4f} s ({errors[-1]:+.1%})")
    print(f"median error {statistics.median(map(abs, errors)):.1%}, largest {max(map(abs, errors)):.1%}")


if __name__ == "__main__":
    main()
