"""``llmpipe evaluate --folds`` from the command line: real runs, mean and deviation, and going on after a stop."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def llmpipe(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    environment["LLMPIPE_CACHE"] = str(folder / "cache")
    command = [sys.executable, "-m", "llmpipe_cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_cross_validation_of_the_mini_recipe(tmp_path: Path) -> None:
    changes = ["train.max_steps=4", "model.config.num_hidden_layers=2", "evaluation.every_steps=null"]
    changes += ["checkpoint.every_steps=null", "checkpoint.keep_best=null", "data.train.max_documents=61"]
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

    # Stopped after the first fold: only the second is left to do, from the checkpoint that it had reached.
    (state,) = (tmp_path / "runs").glob("classification-mini-folds-2-*.json")
    kept = json.loads(state.read_text())
    state.write_text(json.dumps({**kept, "folds": kept["folds"][:1]}))
    again = llmpipe(*command, folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "1 of 2 folds are done already" in again.stderr
    assert json.loads(again.stdout)["metrics"] == result["metrics"]
    assert llmpipe("evaluate", "classification-mini", "--folds", "1", folder=tmp_path).returncode == 2
