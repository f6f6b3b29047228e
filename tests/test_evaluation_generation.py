"""Evaluation and generation over pipeline stages against transformers on the same checkpoint."""

from __future__ import annotations

import json
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

from llmpipe_cli.plan.resolve import make_plan
from llmpipe_cli.recipe.schema import Recipe
from llmpipe_cli.run import RunDirectory, read_json

STDLIB = sysconfig.get_paths()["stdlib"]
SEQUENCE_LEN = 32
VALIDATION = Path(STDLIB, "html", "__init__.py")
PROMPTS = ["def main(", "import os", "class Reader:\n    def __init__(self, path):\n        self", "#"]


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
def checkpoint(job: Job, pool: RankPool) -> Path:
    return (job.train(pool, parallel={"pipeline": 2}).checkpoints / "latest").resolve()


def _load(checkpoint: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)


def _evaluate(job: Job, checkpoint: Path, pool: RankPool, **parallel: int) -> dict[str, Any]:
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


@pytest.mark.parametrize("parallel", [{"pipeline": 1}, {"pipeline": 3}, {"pipeline": 2, "data": 2}])
def test_metrics_do_not_depend_on_the_layout(
    parallel: dict[str, int], job: Job, checkpoint: Path, reported: dict[str, Any], pool: RankPool
) -> None:
    other = _evaluate(job, checkpoint, pool, **parallel)
    assert other["metrics"] == pytest.approx(reported["metrics"], rel=1e-5)
    assert other["num_target_tokens"] == reported["num_target_tokens"]


def _generate(job: Job, model: Path, pool: RankPool, stages: int, **sampling: Any) -> list[dict[str, Any]]:
    recipe = Recipe.model_validate(
        {
            "name": "generation",
            "model": {"from": str(model)},
            "train": {"global_batch_size": 2, "micro_batch_size": 2},
            "parallel": {"pipeline": stages},
        }
    )
    options = {"prompts": PROMPTS, "tokenizer": str(model), "max_new_tokens": 12, "sampling": sampling}
    plan = make_plan(recipe, None, job="generate", device="cpu", num_devices=4, options=options)
    run: RunDirectory = job.start(plan)
    pool.run_well(run, stages)
    return [json.loads(line) for line in run.generations.read_text().splitlines()]


@pytest.mark.parametrize("stages", [1, 3])
def test_greedy_text_is_that_of_transformers(stages: int, job: Job, checkpoint: Path, pool: RankPool) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint).eval(),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    rows = _generate(job, checkpoint, pool, stages)
    assert [row["prompt"] for row in rows] == PROMPTS
    for row in rows:
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert row["text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_sampling_depends_on_the_seed_and_not_on_the_layout(job: Job, checkpoint: Path, pool: RankPool) -> None:
    drawn = _generate(job, checkpoint, pool, 1, temperature=1.0, top_k=50, top_p=0.95, seed=1)
    assert _generate(job, checkpoint, pool, 2, temperature=1.0, top_k=50, top_p=0.95, seed=1) == drawn
    assert _generate(job, checkpoint, pool, 2, temperature=1.0, top_k=50, top_p=0.95, seed=2) != drawn
