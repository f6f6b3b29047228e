"""Predicted beside measured on this machine: small models on one or two ranks of one thread each.

    python benchmarks/planned.py FOLDER [--seconds 200] [--on CASE ... | --each]

Trains each case for a few steps, round after round so that a slow minute of the machine meets all cases, calibrates on
some of them (CALIBRATED_ON, those of --on, or each alone) and predicts the step time of all. Measured is the median of
a case's steps. The cases whose names begin with "pick-" are all the layouts that two ranks can have for two recipes:
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranks import Ranks

if TYPE_CHECKING:
    from llmpipe_cli.plan.calibration import Calibration

Measured = dict[str, list[dict[str, Any]]]
"""By case, its runs: folder, seconds of each step, share of the processors' time that other work took."""
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


def measure(folder: Path, seconds: float) -> Measured:
    """Runs of each case, as far as the time reaches: round after round, those with the fewest runs first."""
    kept = folder / "measured.json"
    found: Measured = json.loads(kept.read_text()) if kept.is_file() else {}
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


def predict(measured: Measured, names: Sequence[str]) -> tuple[dict[str, float], Calibration]:
    """Predicted seconds a step of all cases, calibrated on the runs of the named ones."""
    from llmpipe_cli.plan.calibration import planned_candidate
    from llmpipe_cli.plan.plan import Plan
    from llmpipe_cli.plan.propose import read_calibration, this_machine

    calibration = read_calibration([Path(one["run"]) for name in names for one in measured[name]])
    assert calibration is not None
    predicted = {}
    for name, runs in measured.items():
        candidate = planned_candidate(Plan.load(Path(runs[0]["run"]) / "plan.json"), this_machine(2), calibration)
        assert candidate is not None
        assert candidate.seconds is not None
        predicted[name] = candidate.seconds
    return predicted, calibration


def summary(predicted: dict[str, float], took: dict[str, float], names: Sequence[str]) -> str:
    """How far predictions are off, and how much slower than the best measured layout the picked one is."""
    errors = [abs(predicted[name] / took[name] - 1) for name in took if name not in names]
    text = f"{sum(error <= 0.1 for error in errors)} of {len(errors)} cases not calibrated on within 10 %, "
    text += f"median error {statistics.median(errors):.1%}, largest {max(errors):.1%}"
    for recipe in PICKED:
        layouts = [name for name in took if name.startswith(f"pick-{recipe}-")]
        if len(layouts) == len(_LAYOUTS):
            best, picked = min(layouts, key=took.__getitem__), min(layouts, key=predicted.__getitem__)
            text += f"; {recipe}: picks {picked}, {took[picked] / took[best] - 1:+.1%} of the best measured, {best}"
    return text


def main() -> None:
    """Measure what is left, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="start no further case after so long; 0: predict only"
    )
    parser.add_argument("--only-measure", action="store_true")
    parser.add_argument("--on", nargs="+", default=list(CALIBRATED_ON), choices=list(CASES), metavar="CASE")
    parser.add_argument("--each", action="store_true", help="calibrate on each case alone")
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True, parents=True)
    found = measure(arguments.folder, arguments.seconds)
    if arguments.only_measure:
        return
    measured = {name: [one for one in runs if one["others"] <= DISTURBED] or runs[:1] for name, runs in found.items()}
    took = {name: statistics.median(took for one in runs for took in one["seconds"]) for name, runs in measured.items()}
    if arguments.each:
        for name in measured:
            print(f"{name:22s} {summary(predict(measured, [name])[0], took, [name])}", flush=True)
        return
    predicted, calibration = predict(measured, arguments.on)
    print(calibration.rates(), "links:", ", ".join(f"{rate:.1f}" for rate in sorted(calibration.reductions)), "Gbit/s")
    for name, runs in measured.items():
        medians = [statistics.median(one["seconds"]) for one in runs]
        own = " (calibrated on)" if name in arguments.on else ""
        print(
            f"{name:22s} measured {took[name]:.4f} s ({min(medians):.3f} to {max(medians):.3f} in {len(runs)} runs),"
            f" predicted {predicted[name]:.4f} s ({predicted[name] / took[name] - 1:+.1%}){own}"
        )
    print(summary(predicted, took, arguments.on))


if __name__ == "__main__":
    main()
