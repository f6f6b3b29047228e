"""Evaluation over pipeline stages against transformers on the same checkpoint."""

from __future__ import annotations

import math
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Job
from rank_pool import RankPool
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmpipe_cli.run import RunDirectory, read_json, read_metrics

STDLIB = sysconfig.get_paths()["stdlib"]
SEQUENCE_LEN = 32
VALIDATION = Path(STDLIB, "html", "__init__.py")


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as members:
        yield members


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    return Job(
        tmp_path_factory.mktemp("evaluation"),
        {
            "name": "evaluation",
            "task": "causal-lm",
            "model": {"config": {**config, "num_attention_heads": 4}},
            "tokenizer": {"train": {"vocab_size": 300}},
            "data": {
                "train": {"files": f"{STDLIB}/json/*.py"},
                "validation": {"files": str(VALIDATION)},
                "sequence_len": SEQUENCE_LEN,
            },
            "train": {"max_steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 5e-3},
        },
    )


@pytest.fixture(scope="module")
def training(job: Job, pool: RankPool) -> RunDirectory:
    """Evaluates between its steps, which chunks do in another order than they train."""
    return job.train(pool, parallel={"pipeline": 2, "schedule": "zb-v"}, evaluation={"every_steps": 6})


@pytest.fixture(scope="module")
def checkpoint(training: RunDirectory) -> Path:
    return (training.checkpoints / "latest").resolve()


def _load(checkpoint: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)


def _evaluate(job: Job, checkpoint: Path, pool: RankPool, **parallel: Any) -> dict[str, Any]:
    plan = job.plan(resume=checkpoint, job="evaluate", parallel=parallel)
    run = job.start(plan)
    pool.run_well(run, plan.layout.num_ranks)
    return read_json(run.evaluation)


@pytest.fixture(scope="module")
def reported(job: Job, checkpoint: Path, pool: RankPool) -> dict[str, Any]:
    return _evaluate(job, checkpoint, pool, pipeline=2)


def test_loss_is_that_of_from_pretrained(checkpoint: Path, reported: dict[str, Any]) -> None:
    """Consecutive blocks, no special tokens, every token of a block but its first a target."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint).eval(),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    ids = tokenizer(VALIDATION.read_text(), add_special_tokens=False)["input_ids"]
    blocks = torch.tensor(ids[: len(ids) // SEQUENCE_LEN * SEQUENCE_LEN]).view(-1, SEQUENCE_LEN)
    with torch.no_grad():
        loss = model(input_ids=blocks, labels=blocks).loss.item()
    assert reported["metrics"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert reported["metrics"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert reported["num_samples"] == len(blocks)
    assert reported["num_target_tokens"] == len(blocks) * (SEQUENCE_LEN - 1)


def test_bits_per_byte_and_word_perplexity_agree(reported: dict[str, Any]) -> None:
    """Both follow from the same sum of log-likelihoods, over bytes and over words of the original text."""
    text, metrics = VALIDATION.read_text(), reported["metrics"]
    total = metrics["bits_per_byte"] * math.log(2) * len(text.encode())
    assert math.log(metrics["byte_perplexity"]) * len(text.encode()) == pytest.approx(total, rel=1e-9)
    assert math.log(metrics["word_perplexity"]) * len(re.split(r"\s+", text)) == pytest.approx(total, rel=1e-9)


def test_training_evaluates_alike(training: RunDirectory, reported: dict[str, Any]) -> None:
    evaluated = [line for line in read_metrics(training.metrics) if line.get("event") == "evaluation"]
    assert [line["step"] for line in evaluated] == [0, 6, 12]
    assert evaluated[-1]["metrics"]["loss"] == pytest.approx(reported["metrics"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "parallel",
    [
        {"pipeline": 1},
        {"pipeline": 3},
        {"pipeline": 2, "data": 2, "schedule": "zb-v"},
        {"pipeline": 2, "schedule": "interleaved"},
    ],
)
def test_metrics_do_not_depend_on_the_layout(
    parallel: dict[str, Any], job: Job, checkpoint: Path, reported: dict[str, Any], pool: RankPool
) -> None:
    other = _evaluate(job, checkpoint, pool, **parallel)
    assert other["metrics"] == pytest.approx(reported["metrics"], rel=1e-5)
    assert other["num_target_tokens"] == reported["num_target_tokens"]
