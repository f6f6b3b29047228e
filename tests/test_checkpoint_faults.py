"""Checkpoints and numbers that went bad: what is refused, what is kept."""

from __future__ import annotations

import json
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from jobs import Job, steps
from rank_pool import RankPool

from llmpipe_cli.engine.checkpoint import HostCopies
from llmpipe_cli.engine.manifest import newest_checkpoint, training_state, verify
from llmpipe_cli.errors import CheckpointError
from llmpipe_cli.run import RunDirectory, read_json, read_metrics

STDLIB = sysconfig.get_paths()["stdlib"]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as members:
        yield members


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return Job(
        tmp_path_factory.mktemp("faults"),
        {
            "name": "faults",
            "task": "causal-lm",
            "model": {"config": {**config, "num_attention_heads": 4}},
            "tokenizer": {"train": {"vocab_size": 300}},
            "data": {"train": {"files": f"{STDLIB}/json/*.py"}, "sequence_len": 32},
            "train": {"max_steps": 4, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-3},
            "parallel": {"pipeline": 2},
            "checkpoint": {"every_steps": 2},
        },
    )


@pytest.fixture
def run(job: Job, pool: RankPool) -> RunDirectory:
    return job.train(pool)


def test_bad_numbers_end_with_7_and_keep_the_last_checkpoint(job: Job, pool: RankPool) -> None:
    plan = job.plan(
        train__learning_rate=1e30, train__max_grad_norm=0.0, train__max_steps=8, checkpoint={"every_steps": 1}
    )
    run = job.start(plan)
    assert pool.run(run, 2) == [7, 7]
    error = read_json(run.rank_error(0))
    assert error["type"] == "NumericsError"
    assert f"at step {len(steps(run))}" in error["message"]
    assert [line["step"] for line in read_metrics(run.metrics) if line.get("event") == "fault"] == [len(steps(run))]
    saved = [line["step"] for line in read_metrics(run.metrics) if line.get("event") == "checkpoint"]
    assert saved == list(range(1, len(steps(run))))
    if saved:
        verify(run.checkpoint(saved[-1]))


def test_a_flipped_bit_is_found_and_named(run: RunDirectory) -> None:
    damaged = run.checkpoint(4) / "training" / "optimizer-00001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 0x10
    damaged.write_bytes(bytes(data))
    with pytest.raises(CheckpointError) as caught:
        verify(run.checkpoint(4))
    assert caught.value.where == str(damaged)
    assert caught.value.exit_code == 6
    checkpoint, notice = newest_checkpoint(run.checkpoints)
    assert checkpoint.name == "step-00000002"
    assert notice is not None
    assert "optimizer-00001.safetensors" in notice


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "training/state.json", "manifest.json"]
)
def test_a_missing_file_is_found(name: str, run: RunDirectory) -> None:
    (run.checkpoint(4) / name).unlink()
    with pytest.raises(CheckpointError):
        verify(run.checkpoint(4))


def test_a_broken_link_falls_back_to_the_newest_whole_checkpoint(run: RunDirectory) -> None:
    (run.checkpoints / "latest").unlink()
    (run.checkpoints / "latest").symlink_to("step-00009999")
    checkpoint, notice = newest_checkpoint(run.checkpoints)
    assert checkpoint.name == "step-00000004"
    assert notice is not None
    assert "latest" in notice


def test_a_half_written_checkpoint_is_never_taken(run: RunDirectory) -> None:
    run.checkpoint(4).rename(run.checkpoints / "step-00000004.partial")
    checkpoint, _ = newest_checkpoint(run.checkpoints)
    assert checkpoint.name == "step-00000002"


def test_weights_without_training_state_cannot_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError) as caught:
        training_state(tmp_path)
    assert "finetune" in (caught.value.hint or "")


def test_a_link_that_cannot_be_moved_ends_with_6_on_all_ranks(job: Job, pool: RankPool) -> None:
    source = {"train": {"files": f"{STDLIB}/json/*.py"}, "validation": {"fraction": 0.5}, "sequence_len": 32}
    best = Job(job.folder, {**job.values, "data": source, "evaluation": {"every_steps": 2}})
    run = best.start(best.plan(checkpoint={"every_steps": 2, "keep_best": "loss"}))
    (run.checkpoints / ".best.partial").mkdir()
    assert pool.run(run, 2) == [6, 6]
    assert "rank 0 could not write the checkpoint" in read_json(run.rank_error(1))["message"]
    verify(run.checkpoint(2))


def test_a_directory_that_cannot_be_written_ends_with_6_on_all_ranks(job: Job, pool: RankPool) -> None:
    run = job.start(job.plan())
    run.checkpoints.rmdir()
    run.checkpoints.write_text("a file where the folder should be")
    assert pool.run(run, 2) == [6, 6]
    error = read_json(run.rank_error(1))
    assert "rank 0 could not write the checkpoint" in error["message"]


def test_training_goes_on_while_a_checkpoint_is_written(job: Job, pool: RankPool) -> None:
    run = job.start(job.plan(train__max_steps=12, checkpoint={"every_steps": 4}))
    pool.run_well(run, 2)
    saved = [line for line in read_metrics(run.metrics) if line.get("event") == "checkpoint"]
    assert [line["step"] for line in saved] == [4, 8, 12]
    assert all(0.0 < line["stall_seconds"] < line["seconds"] for line in saved)
    states = [training_state(run.checkpoint(step)) for step in (4, 8, 12)]
    assert [state["position"]["step"] for state in states] == [4, 8, 12], "what was copied, not what came later"
    for step in (4, 8, 12):
        verify(run.checkpoint(step))
    resumed = job.train(pool, resume=run.checkpoint(8), train__max_steps=12)
    assert [line["loss"] for line in steps(resumed)] == [line["loss"] for line in steps(run)][8:]


def test_copies_are_kept_in_the_same_memory() -> None:
    copies = HostCopies()
    values = torch.arange(12.0).view(3, 4)
    first = copies.take({"transposed": values.t(), "removed": values[0], "reshaped": values[0]})
    assert first["transposed"].is_contiguous()
    place = first["transposed"].data_ptr()
    values += 1
    assert torch.equal(first["transposed"], torch.arange(12.0).view(3, 4).t())  # no view of what training changes
    second = copies.take({"transposed": values.t(), "reshaped": values[0, :2].bfloat16()})
    assert set(second) == {"transposed", "reshaped"}
    assert second["transposed"].data_ptr() == place
    assert torch.equal(second["transposed"], values.t())
    assert second["reshaped"].tolist() == [1.0, 2.0]
    assert second["reshaped"].dtype == torch.bfloat16


@pytest.mark.parametrize("delay", [0.0, 0.013, 0.031, 0.057])
def test_kill_9_while_saving_leaves_whole_checkpoints(job: Job, pool: RankPool, delay: float) -> None:
    """A checkpoint after every step, so that one is always being written when the ranks are killed."""
    run = job.start(job.plan(train__max_steps=10_000, checkpoint={"every_steps": 1, "keep": 3}))
    with ThreadPoolExecutor(1) as thread:
        codes = thread.submit(pool.run, run, 2)
        while not (run.checkpoints / "latest").is_symlink():
            time.sleep(0.01)
        time.sleep(0.3 + delay)
        for member, _ in pool._members[:2]:
            member.kill()
        assert codes.result() == [-1, -1]
    checkpoint, notice = newest_checkpoint(run.checkpoints)
    assert notice is None, "latest is whole"
    step = training_state(checkpoint)["position"]["step"]
    resumed = job.train(pool, resume=checkpoint, train__max_steps=step + 1)
    assert [line["step"] for line in steps(resumed)] == [step + 1]
