"""Predicted beside measured on this machine: small models on one or two ranks of one thread each.

    python benchmarks/planned.py FOLDER [--seconds 200] [--on CASE ...]

Trains each case for a few steps, round after round so that a slow minute of the machine meets all cases, calibrates on
some of them (CALIBRATED_ON, or those of --on) and predicts the step time of all of them. Measured is the median of a
case's steps. The cases whose names begin with "pick-" are all the layouts that two ranks can have for two recipes:
printed is how much slower the layout that the planner picks is than the best measured. What is measured is kept in
FOLDER/measured.json, and the next call goes on with the cases that have the fewest runs. Runs beside which other work
took more than a twentieth of the processors' time are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranks import Ranks

WARMUP, STEPS = 2, 4
DISTURBED = 0.05


@dataclass(frozen=True)
class Case:
    """A small Llama on a layout: batch sizes in samples, lengths in tokens."""

    layers: int
    hidden: int
    sequence: int
    micro_batch: int
    batch: int
    pipeline: int
    data: int
    schedule: str = "1f1b"
    zero_stage: int = 0

    def recipe(self, name: str) -> dict[str, Any]:
        """The case as a recipe."""
        heads = self.hidden // 64
        return {
            "name": name,
            "model": {
                "config": {
                    "model_type": "llama", "hidden_size": self.hidden, "intermediate_size": self.hidden * 8 // 3,
                    "num_hidden_layers": self.layers, "num_attention_heads": heads, "num_key_value_heads": heads,
                    "vocab_size": 2048, "max_position_embeddings": 512,
                }
            },
            "data": {"train": {"synthetic": True}, "sequence_len": self.sequence},
            "train": {
                "max_steps": WARMUP + STEPS, "global_batch_size": self.batch, "micro_batch_size": self.micro_batch
            },
            "parallel": {
                "pipeline": self.pipeline, "data": self.data, "tensor": 1, "schedule": self.schedule,
                "zero_stage": self.zero_stage,
            },
        }  # fmt: skip


CASES = {
    "a1": Case(4, 256, 128, 2, 8, 1, 1),
    "b1": Case(6, 512, 128, 2, 8, 1, 1),
    "a2": Case(4, 256, 128, 2, 8, 2, 1),
    "a1r": Case(4, 256, 128, 2, 8, 1, 2),
    "a2z": Case(4, 256, 128, 2, 8, 2, 1, "zb-h1"),
    "b2": Case(6, 512, 128, 2, 8, 2, 1),
    "b2z": Case(6, 512, 128, 1, 8, 2, 1, "zb-h1"),
    "b1m": Case(6, 512, 128, 4, 8, 1, 1),
    "c1": Case(10, 320, 192, 2, 8, 1, 1),
    "c2": Case(10, 320, 192, 2, 8, 2, 1),
    "c2r": Case(10, 320, 192, 2, 8, 1, 2),
    "d2": Case(3, 768, 96, 4, 8, 2, 1),
    "w1": Case(4, 640, 128, 2, 8, 1, 1),
    "w1r": Case(4, 640, 128, 2, 8, 1, 2),
}
CALIBRATED_ON = ("a1", "b1", "a2", "a1r", "w1r")
_LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {"pipeline": 1, "data": 1},
    "replicas": {"pipeline": 1, "data": 2},
    "zero": {"pipeline": 1, "data": 2, "zero_stage": 1},
    **{
        name: {"pipeline": 2, "data": 1, "schedule": name} for name in ("1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v")
    },
}
PICKED = {"deep": Case(8, 192, 128, 2, 8, 1, 1), "wide": Case(4, 384, 128, 2, 8, 1, 1)}
for _recipe, _case in PICKED.items():
    for _name, _layout in _LAYOUTS.items():
        CASES[f"pick-{_recipe}-{_name}"] = Case(**{**vars(_case), **_layout})


class Processors:
    """Processor seconds of this machine and of this process with its children."""

    def __init__(self) -> None:
        self.begun, self.all, self.own = time.monotonic(), _busy_seconds(), _own_seconds()

    def others(self) -> float:
        """Share of the processors' time that other work took since the beginning."""
        foreign = _busy_seconds() - self.all - (_own_seconds() - self.own)
        return max(0.0, foreign) / (time.monotonic() - self.begun) / (os.cpu_count() or 1)


def _busy_seconds() -> float:
    fields = [float(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Processor seconds of this process and of its living children."""
    pids = [os.getpid()]
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        pids += [int(pid) for pid in (task / "children").read_text().split()]
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(float(own[11]) + float(own[12]) for own in fields) / os.sysconf("SC_CLK_TCK")


def measure(folder: Path, seconds: float) -> dict[str, list[dict[str, Any]]]:
    """Runs of each case, as far as the time reaches: round after round, those with the fewest runs first."""
    kept = folder / "measured.json"
    found: dict[str, list[dict[str, Any]]] = json.loads(kept.read_text()) if kept.is_file() else {}
    if seconds <= 0:
        return found
    started = time.monotonic()
    with Ranks(2) as ranks:
        warm = {**CASES["a2"].recipe("warm")}
        ranks.run(folder, {**warm, "train": {**warm["train"], "max_steps": 2}})
        while time.monotonic() - started < seconds:
            name = min(CASES, key=lambda name: len(found.get(name, [])))
            processors = Processors()
            run, _ = ranks.run(folder, CASES[name].recipe(name))
            one = {"run": str(run), "seconds": step_seconds(run), "others": processors.others()}
            steps = " ".join(f"{own:.3f}" for own in step_seconds(run))
            print(f"{name:22s} {steps}; others took {one['others']:.0%}", flush=True)
            found.setdefault(name, []).append(one)
            kept.write_text(json.dumps(found, indent=1))
    return found


def step_seconds(run: Path) -> list[float]:
    """Seconds of the steps after the warm-up."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step_seconds"] for line in lines if "event" not in line][WARMUP:]


def main() -> None:
    """Measure what is left, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="start no further case after so long; 0: predict only"
    )
    parser.add_argument("--only-measure", action="store_true")
    parser.add_argument("--on", nargs="+", default=list(CALIBRATED_ON), choices=list(CASES), metavar="CASE")
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True, parents=True)
    measured = measure(arguments.folder, arguments.seconds)
    if arguments.only_measure:
        return

    from llmpipe_cli.plan.calibration import planned_candidate
    from llmpipe_cli.plan.plan import Plan
    from llmpipe_cli.plan.propose import read_calibration, this_machine

    measured = {
        name: [one for one in runs if one["others"] <= DISTURBED] or runs[:1] for name, runs in measured.items()
    }
    calibration = read_calibration([Path(one["run"]) for name in arguments.on for one in measured[name]])
    assert calibration is not None
    print(calibration.rates(), "links:", ", ".join(f"{rate:.1f}" for rate in sorted(calibration.reductions)), "Gbit/s")
    took, predicted = {}, {}
    for name, runs in measured.items():
        candidate = planned_candidate(Plan.load(Path(runs[0]["run"]) / "plan.json"), this_machine(2), calibration)
        assert candidate is not None
        assert candidate.seconds is not None
        predicted[name] = candidate.seconds
        medians = [statistics.median(one["seconds"]) for one in runs]
        took[name] = statistics.median(seconds for one in runs for seconds in one["seconds"])
        own = " (calibrated on)" if name in arguments.on else ""
        print(
            f"{name:22s} measured {took[name]:.4f} s ({min(medians):.3f} to {max(medians):.3f} in {len(runs)} runs),"
            f" predicted {candidate.seconds:.4f} s ({candidate.seconds / took[name] - 1:+.1%}){own}"
        )
    errors = [abs(predicted[name] / took[name] - 1) for name in took if name not in arguments.on]
    print(f"{len(errors)} cases not calibrated on: {sum(error <= 0.1 for error in errors)} within 10 %;", end=" ")
    print(f"median error {statistics.median(errors):.1%}, largest {max(errors):.1%}")
    for recipe in PICKED:
        names = [name for name in measured if name.startswith(f"pick-{recipe}-")]
        if len(names) == len(_LAYOUTS):
            best, picked = min(names, key=took.__getitem__), min(names, key=predicted.__getitem__)
            off = took[picked] / took[best] - 1
            print(f"{recipe}: picks {picked}, {off:+.1%} of the best measured, {best}")


if __name__ == "__main__":
    main()
