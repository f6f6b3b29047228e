"""``llmpipe evaluate --folds`` from the command line: real runs, mean and deviation, and going on after a stop."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmpipe_cli.run import read_metrics

ROOT = Path(__file__).parents[1]


def llmpipe(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, folder=folder)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    environment["LLMPIPE_CACHE"] = str(folder / "cache")
    command = [sys.executable, "-m", "llmpipe_cli", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


@pytest.mark.slow
def test_cross_validation_of_the_mini_recipe(tmp_path: Path) -> None:
    changes = ["train.max_steps=40", "model.config.num_hidden_layers=2", "evaluation.every_steps=null"]
    changes += ["checkpoint.every_steps=10", "checkpoint.keep_best=null", "data.train.max_documents=61"]
    flags = [word for change in changes for word in ("--set", change)]
    command = ["evaluate", "classification-mini", "--folds", "2", "--json", "--devices", "2", *flags]
    first = llmpipe(*command, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert result["folds"] == 2
    assert result["num_samples"] == 61, "each document is scored once"
    losses = [fold["metrics"]["loss"] for fold in result["per_fold"]]
    assert losses[0] != losses[1]
    assert abs(result["metrics"]["loss"] - statistics.mean(losses)) < 1e-9
    assert abs(result["deviation"]["loss"] - statistics.stdev(losses)) < 1e-9

    # Killed in the second fold: only that is left to do, from the checkpoint that it had reached.
    other = tmp_path / "other"
    other.mkdir()
    killed = start(*command, folder=other)
    deadline = time.monotonic() + 200
    while not list((other / "runs").glob("classification-mini-fold-2-*/checkpoints/latest")):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    again = llmpipe(*command, folder=other)
    assert again.returncode == 0, again.stderr
    assert "1 of 2 folds are done already" in again.stderr
    assert json.loads(again.stdout)["metrics"] == pytest.approx(result["metrics"], rel=1e-5)
    runs = sorted((other / "runs").glob("classification-mini-fold-2-*"))
    events = [event for run in runs for event in read_metrics(run / "metrics.jsonl") if event.get("event") == "resume"]
    assert len(events) == 1
    assert llmpipe("evaluate", "classification-mini", "--folds", "1", folder=tmp_path).returncode == 2
