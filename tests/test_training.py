"""Training over real DeepSpeed ranks against one plain Hugging Face process, over layouts and architectures."""

from __future__ import annotations

import itertools
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Job, final_weights, losses, steps, train_plain
from rank_pool import RankPool

from llmpipe_cli.run import read_metrics

STDLIB = sysconfig.get_paths()["stdlib"]
VOCAB = 300
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 2},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "qwen2": {"model_type": "qwen2", **SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "bert": {"model_type": "bert", **SMALL, "max_position_embeddings": 64},
    "t5": {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "1": {"pipeline": 1},
    "2-1f1b": {"pipeline": 2, "schedule": "1f1b"},
    "2-zb-h1": {"pipeline": 2, "schedule": "zb-h1"},
    "3-zb-h1": {"pipeline": 3, "schedule": "zb-h1"},
    "2x2": {"pipeline": 2, "data": 2, "zero_stage": 0, "schedule": "1f1b"},
    "2x2-zero1": {"pipeline": 2, "data": 2, "zero_stage": 1, "schedule": "1f1b"},
    "2x2-zero1-zb-h1": {"pipeline": 2, "data": 2, "zero_stage": 1, "schedule": "zb-h1"},
    "2-checkpointing": {"pipeline": 2, "activation_checkpointing": "full"},
    "2-checkpointing-zb-h1": {"pipeline": 2, "activation_checkpointing": "selective", "schedule": "zb-h1"},
    "3-gpipe": {"pipeline": 3, "schedule": "gpipe"},
    "4-zb-h2": {"pipeline": 4, "schedule": "zb-h2"},
    "2-interleaved": {"pipeline": 2, "schedule": "interleaved"},
    "2x2-zero1-zb-v": {"pipeline": 2, "data": 2, "zero_stage": 1, "schedule": "zb-v"},
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as members:
        yield members


def _recipe(model: str, folder: Path, **train: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "name": model,
        "task": "causal-lm",
        "model": {"config": MODELS[model], "dropout": 0.0},
        "tokenizer": {"train": {"vocab_size": VOCAB}},
        "data": {
            "train": {"files": f"{STDLIB}/json/*.py"},
            "validation": {"files": f"{STDLIB}/html/__init__.py"},
            "sequence_len": 32,
        },
        "train": {
            "max_steps": 5,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "max_grad_norm": 0.1,
            **train,
        },
    }
    if model == "bert":
        recipe["task"] = "classification"
        recipe["data"]["train"] = {"files": str(_labelled_lines(folder))}
        del recipe["data"]["validation"]
    if model == "t5":
        recipe["task"] = "translation"
        recipe["data"]["train"] = {"files": str(_line_pairs(folder))}
        del recipe["data"]["validation"]
    return recipe


def _source_lines() -> list[str]:
    text = Path(STDLIB, "textwrap.py").read_text()
    return [line.strip() for line in text.splitlines() if len(line.strip()) > 20]


def _labelled_lines(folder: Path) -> Path:
    """Lines of Python source, labelled as comment or code."""
    path = folder / "lines.jsonl"
    rows = [{"text": line, "label": "comment" if line.startswith("#") else "code"} for line in _source_lines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _line_pairs(folder: Path) -> Path:
    """Each line of Python source with the one after it, of different lengths."""
    path = folder / "pairs.jsonl"
    lines = _source_lines()
    rows = [{"source": a, "target": b} for a, b in itertools.pairwise(lines)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", params=MODELS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    job = Job(folder, _recipe(request.param, folder))
    return job, train_plain(job.plan())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(reference: tuple[Job, Any], layout: str, pool: RankPool) -> None:
    job, (plain_losses, plain_norms, plain_weights) = reference
    run = job.train(pool, parallel=LAYOUTS[layout])
    assert losses(run) == pytest.approx(plain_losses, rel=1e-5)
    assert [line["grad_norm"] for line in steps(run)] == pytest.approx(plain_norms, rel=1e-5)
    assert min(plain_norms) > job.values["train"]["max_grad_norm"], "clipping was not active"
    weights = final_weights(run)
    for name, expected in plain_weights.items():
        if name in weights:  # a tied name is saved once
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-5)
    assert len(plain_losses) == 5
    assert plain_losses[-1] < plain_losses[0]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1", "zb-h2"])
def test_fewer_micro_batches_than_stages(tmp_path: Path, schedule: str, pool: RankPool) -> None:
    job = Job(tmp_path, _recipe("llama", tmp_path, global_batch_size=2, max_steps=2, warmup_steps=0))
    plain_losses, plain_norms, _ = train_plain(job.plan())
    run = job.train(pool, parallel={"pipeline": 4, "schedule": schedule})
    assert losses(run) == pytest.approx(plain_losses, rel=1e-5)
    assert [line["grad_norm"] for line in steps(run)] == pytest.approx(plain_norms, rel=1e-5)


def test_targets_of_the_global_batch_weigh_alike(tmp_path: Path, pool: RankPool) -> None:
    """Micro-batches with different numbers of target tokens: the loss is the token mean, not the mean of means."""
    job = Job(tmp_path, _recipe("t5", tmp_path, max_steps=1))
    run = job.train(pool, parallel={"pipeline": 2, "data": 2})
    plain_losses, _, _ = train_plain(job.plan())
    assert losses(run) == pytest.approx(plain_losses, rel=1e-6)
    (line,) = steps(run)
    assert 0 < line["num_target_tokens"] < 8 * 32


@pytest.mark.parametrize("layout", ["2-1f1b", "3-zb-h1", "2x2-zero1-zb-h1", "2-checkpointing", "2-checkpointing-zb-h1"])
def test_dropout_does_not_depend_on_the_layout(tmp_path: Path, layout: str, pool: RankPool) -> None:
    recipe = _recipe("gpt2", tmp_path)
    recipe["model"]["dropout"] = 0.1
    job = Job(tmp_path, recipe)
    one = job.train(pool, parallel={"pipeline": 1})
    other = job.train(pool, parallel=LAYOUTS[layout])
    assert losses(other) == pytest.approx(losses(one), rel=1e-5)
    for name, weight in final_weights(one).items():
        torch.testing.assert_close(final_weights(other)[name], weight, rtol=0, atol=1e-5)
    without = job.train(pool, parallel={"pipeline": 1}, model__dropout=0.0)
    assert abs(losses(one)[-1] - losses(without)[-1]) > 1e-4, "dropout was not active"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision(tmp_path: Path, dtype: str, pool: RankPool) -> None:
    """Near the fp32 losses, and the same over layouts: gradients are summed in fp32 (bf16) or scaled (fp16)."""
    job = Job(tmp_path, _recipe("llama", tmp_path))
    plain_losses, _, _ = train_plain(job.plan())
    runs = [
        job.train(pool, parallel=parallel, model__dtype=dtype)
        for parallel in (
            {"pipeline": 1},
            {"pipeline": 2, "schedule": "1f1b"},
            {"pipeline": 2, "schedule": "zb-h1"},
            {"pipeline": 2, "data": 2, "schedule": "zb-h1"},
        )
    ]
    for run in runs:
        assert losses(run) == pytest.approx(plain_losses, rel=1e-3)
        assert losses(run) == pytest.approx(losses(runs[0]), rel=1e-5)
        assert {weight.dtype for weight in final_weights(run).values()} == {
            torch.bfloat16 if dtype == "bf16" else torch.float16
        }


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "lion"])
def test_optimizers_over_layouts(tmp_path: Path, optimizer: str, pool: RankPool) -> None:
    job = Job(tmp_path, _recipe("llama", tmp_path, optimizer=optimizer, momentum=0.9))
    one = job.train(pool, parallel={"pipeline": 1})
    layouts = ["2-zb-h1"] if optimizer == "adafactor" else ["2-1f1b", "2x2-zero1-zb-h1"]
    for layout in layouts:
        other = job.train(pool, parallel=LAYOUTS[layout])
        for name, weight in final_weights(one).items():
            torch.testing.assert_close(final_weights(other)[name], weight, rtol=0, atol=1e-5)


def test_metrics_lines(tmp_path: Path, pool: RankPool) -> None:
    job = Job(tmp_path, _recipe("llama", tmp_path))
    run = job.train(pool, parallel={"pipeline": 2}, evaluation={"every_steps": 2}, checkpoint={"every_steps": 2})
    lines = read_metrics(run.metrics)
    events = ["start", "evaluation", *["evaluation", "checkpoint"] * 3, "end"]
    # A checkpoint is reported when it is on disk, some steps after it was begun.
    assert sorted(line["event"] for line in lines if "event" in line) == sorted(events)
    assert [line["step"] for line in lines if line.get("event") == "checkpoint"] == [2, 4, 5]
    first = steps(run)[0]
    assert first["step"] == 1
    assert first["num_target_tokens"] == 8 * 31
    assert first["learning_rate"] == 0.0  # the first step of a warm-up
    assert steps(run)[-1]["learning_rate"] == pytest.approx(1e-3 * 1 / 3)
    assert len(first["stages"]) == len(first["memory_bytes"]) == 2
    assert all(stage["busy_seconds"] > 0 for stage in first["stages"])
    assert first["tokens_per_second"] == pytest.approx(8 * 32 / first["step_seconds"])


def test_early_stopping_and_best_checkpoint(tmp_path: Path, pool: RankPool) -> None:
    """A learning rate that wrecks the model: the first evaluation stays the best, and training ends early."""
    job = Job(tmp_path, _recipe("llama", tmp_path, max_steps=40, learning_rate=1.0, warmup_steps=3, max_grad_norm=0.0))
    run = job.train(
        pool,
        parallel={"pipeline": 2},
        evaluation={"every_steps": 1},
        checkpoint={"keep_best": "loss", "keep": 1},
        train__early_stopping={"metric": "loss", "patience": 3},
    )
    evaluations = [line for line in read_metrics(run.metrics) if line.get("event") == "evaluation"]
    values = [line["metrics"]["loss"] for line in evaluations]
    best = values.index(min(values[1:]), 1)
    assert len(steps(run)) < 40
    assert len(values) - 1 - values.index(min(values)) == 3, "three evaluations without improvement"
    if min(values[1:]) < values[0]:
        assert (run.checkpoints / "best").resolve().name == f"step-{best:08d}"
    assert (run.checkpoints / "latest").resolve().name == f"step-{len(steps(run)):08d}"
    assert len(list(run.checkpoints.glob("step-*"))) <= 2
