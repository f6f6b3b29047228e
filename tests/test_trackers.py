"""report_to: what trackers get is what metrics.jsonl has."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from jobs import Job
from rank_pool import RankPool
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmpipe_cli.errors import UsageError
from llmpipe_cli.run import RunDirectory, read_metrics
from llmpipe_cli.worker.trackers import Trackers, scalars


def recipe(*trackers: str) -> dict[str, Any]:
    fields = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "name": "tracked",
        "model": {"config": {"model_type": "llama", "vocab_size": 50, **fields}},
        "data": {"train": {"synthetic": True}, "validation": {"synthetic": True}, "sequence_len": 8},
        "train": {"max_steps": 3, "global_batch_size": 2, "micro_batch_size": 1},
        "evaluation": {"every_steps": 3, "max_samples": 2},
        "report_to": list(trackers),
    }


def test_tensorboard_has_every_number_of_a_run(tmp_path: Path) -> None:
    job = Job(tmp_path, recipe("tensorboard"))
    with RankPool(1) as pool:
        run = job.train(pool, parallel__pipeline=1)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    lines = list(read_metrics(run.metrics))
    for name in ("loss", "grad_norm", "learning_rate", "step_seconds"):
        expected = [(line["step"], line[name]) for line in lines if "event" not in line]
        assert len(expected) == 3
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in expected
        ]
    evaluations = [line for line in lines if line.get("event") == "evaluation"]
    assert [(event.step, event.value) for event in events.Scalars("evaluation/perplexity")] == [
        (line["step"], pytest.approx(line["metrics"]["perplexity"], rel=1e-6)) for line in evaluations
    ]
    assert "stages/0/busy_seconds" in events.Tags()["scalars"]


def test_a_tracker_that_fails_is_told_once_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    warnings: list[str] = []
    trackers = Trackers(["tensorboard"], RunDirectory(tmp_path), {}, warnings.append)
    for step in (1, 2):
        trackers.log({"step": step, "loss": 1.0})
    trackers.close()
    assert len(warnings) == 1
    assert warnings[0].startswith("report_to: tensorboard is left out: FileExistsError")


def test_names_of_scalars() -> None:
    line = {"step": 4, "loss": None, "stages": [{"busy_seconds": 1.5}, {"busy_seconds": 2}], "time": 0.0}
    assert scalars(line) == [("stages.0.busy_seconds", 1.5), ("stages.1.busy_seconds", 2.0)]
    assert scalars({"event": "evaluation", "step": 4, "metrics": {"f1": 0.5}}) == [("evaluation.f1", 0.5)]
    assert scalars({"event": "checkpoint", "step": 4, "seconds": 1.0}) == []


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_package_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as failure:
        Job(tmp_path, recipe("wandb")).plan(parallel__pipeline=1)
    assert (failure.value.where, failure.value.hint) == (
        "report_to",
        "pip install 'llmpipe_cli[wandb]', or leave `wandb` out",
    )


def test_wandb_keeps_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    warnings: list[str] = []
    trackers = Trackers(["wandb"], RunDirectory(tmp_path), {"name": "x"}, warnings.append)
    trackers.log({"step": 1, "loss": 1.25})
    trackers.close()
    assert not warnings
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
