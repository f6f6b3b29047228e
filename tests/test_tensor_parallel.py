"""Tensor shards over real DeepSpeed ranks against one plain Hugging Face process, and against other layouts."""

from __future__ import annotations

import itertools
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from jobs import Job, final_weights, full_model, losses, steps, train_plain
from rank_pool import RankPool
from safetensors.torch import load_file
from tensor_shards import run_shards

from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.tensor.plans import FOLLOWED, OWN_PLANS
from llmpipe_cli.run import RunDirectory, read_json

STDLIB = sysconfig.get_paths()["stdlib"]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", **SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "mixtral": {
        "model_type": "mixtral", **SMALL, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2
    },
    "bert": {"model_type": "bert", **SMALL, "max_position_embeddings": 64},
    "t5": {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}  # fmt: skip
TASKS = {"bert": "masked-lm", "t5": "translation"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "2x2": {"pipeline": 2, "tensor": 2, "schedule": "zb-h1", "zero_stage": 0},
    "2x2-zero1": {"pipeline": 2, "tensor": 2, "schedule": "1f1b", "zero_stage": 1},
    "1x2x2": {"pipeline": 1, "tensor": 2, "data": 2, "zero_stage": 1},
}
STEPS, SAVED = 5, 3


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as members:
        yield members


def _job(folder: Path, model: str, *, dropout: float = 0.0, **config: Any) -> Job:
    task = TASKS.get(model, "causal-lm")
    train: dict[str, Any] = {"files": f"{STDLIB}/json/*.py"}
    if task == "translation":
        lines = [line for line in Path(STDLIB, "textwrap.py").read_text().splitlines() if len(line.strip()) > 20]
        rows = [{"source": first.strip(), "target": second.strip()} for first, second in itertools.pairwise(lines)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        train = {"files": str(folder / "pairs.jsonl")}
    values: dict[str, Any] = {
        "name": model,
        "task": task,
        "model": {"config": {**MODELS[model], **config}, "dropout": dropout},
        "tokenizer": {"train": {"vocab_size": 301}},  # no multiple of the shards
        "data": {"train": train, "sequence_len": 32},
        "train": {
            "max_steps": STEPS,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "max_grad_norm": 0.1,
        },
        "checkpoint": {"every_steps": SAVED},
    }
    if task == "causal-lm":
        values["data"]["validation"] = {"files": f"{STDLIB}/html/__init__.py"}
    elif task == "translation":
        (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
        values["data"]["validation"] = {"files": str(folder / "validation.jsonl")}
        values["evaluation"] = {"max_new_tokens": 8}
    return Job(folder, values)


class Reference:
    """One type: its job, what one process makes of it, and its runs by layout."""

    def __init__(self, folder: Path, model: str, pool: RankPool) -> None:
        self.model, self.pool = model, pool
        self.job = _job(folder, model)
        self.plan = self.job.plan()
        self.losses, self.norms, self.weights = train_plain(self.plan)
        self._runs: dict[str, RunDirectory] = {}

    def run(self, layout: str) -> RunDirectory:
        if layout not in self._runs:
            self._runs[layout] = self.job.train(self.pool, parallel={"pipeline": 1} | LAYOUTS.get(layout, {}))
        return self._runs[layout]


@pytest.fixture(scope="module", params=MODELS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pool: RankPool) -> Reference:
    return Reference(tmp_path_factory.mktemp(request.param), request.param, pool)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(reference: Reference, layout: str) -> None:
    run = reference.run(layout)
    assert losses(run) == pytest.approx(reference.losses, rel=1e-5)
    assert [line["grad_norm"] for line in steps(run)] == pytest.approx(reference.norms, rel=1e-5)
    assert min(reference.norms) > reference.job.values["train"]["max_grad_norm"], "clipping was not active"


@pytest.mark.parametrize("layout", ["2x2", "1x2x2"])
def test_checkpoint_is_what_one_process_saves(reference: Reference, layout: str, tmp_path: Path) -> None:
    """Names, shapes and values of `save_pretrained` after the same steps in one process."""
    model = full_model(reference.plan)
    model.load_state_dict(reference.weights, strict=False)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    expected, found = load_file(tmp_path / "model.safetensors"), final_weights(reference.run(layout))
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    loaded, info = getattr(transformers, reference.plan.model_class).from_pretrained(
        reference.run(layout).checkpoints / "latest", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is type(model)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("2x2", {"pipeline": 1}),
        ("2x2-zero1", {"pipeline": 4, "schedule": "1f1b"}),
        ("1", LAYOUTS["2x2-zero1"]),
        ("1x2x2", LAYOUTS["2x2"]),
    ],
    ids=["2x2-1x1", "2x2zero1-4x1", "1x1-2x2zero1", "1x2x2-2x2"],
)
def test_resume_on_another_layout(reference: Reference, before: str, after: dict[str, Any]) -> None:
    checkpoint = reference.run(before).checkpoint(SAVED)
    resumed = reference.job.train(reference.pool, resume=checkpoint, parallel=after)
    assert [line["step"] for line in steps(resumed)] == list(range(SAVED + 1, STEPS + 1))
    assert losses(resumed) == pytest.approx(reference.losses[SAVED:], rel=1e-5)


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return _job(tmp_path_factory.mktemp("dropout"), "gpt2", dropout=0.1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_dropout_does_not_depend_on_shards(dropping: Job, pool: RankPool, attention: str, checkpointing: str) -> None:
    """Masks inside divided attention and feed-forward layers are those of the undivided layers."""
    whole = dropping.train(pool, parallel={"pipeline": 1}, model__attn_implementation=attention)
    parallel = {**LAYOUTS["2x2"], "schedule": "1f1b", "activation_checkpointing": checkpointing}
    divided = dropping.train(pool, parallel=parallel, model__attn_implementation=attention)
    assert losses(divided) == pytest.approx(losses(whole), rel=1e-5)


def test_fewer_key_heads_than_shards(tmp_path: Path, pool: RankPool) -> None:
    """Four shards share two key heads; norms on single heads get the gradients of all."""
    job = _job(tmp_path, "qwen2", model_type="qwen3", head_dim=8)
    expected, norms, _ = train_plain(job.plan())
    run = job.train(pool, parallel={"pipeline": 1, "tensor": 4})
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert [line["grad_norm"] for line in steps(run)] == pytest.approx(norms, rel=1e-5)
    resumed = job.train(pool, resume=run.checkpoint(SAVED), parallel={"pipeline": 1})
    assert losses(resumed) == pytest.approx(expected[SAVED:], rel=1e-5)


def test_bf16(tmp_path: Path, pool: RankPool) -> None:
    """The fp32 masters of a bf16 run survive a change of shards; sums of bf16 parts are rounded otherwise."""
    job = _job(tmp_path, "qwen2")
    whole = job.train(pool, parallel={"pipeline": 1}, model__dtype="bf16")
    divided = job.train(pool, parallel={"pipeline": 2, "tensor": 2}, model__dtype="bf16")
    assert losses(divided) == pytest.approx(losses(whole), rel=2e-3)
    resumed = job.train(pool, resume=divided.checkpoint(SAVED), parallel={"pipeline": 1}, model__dtype="bf16")
    assert losses(resumed) == pytest.approx(losses(divided)[SAVED:], rel=2e-3)


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_evaluation_and_label_smoothing(model: str, tmp_path: Path, pool: RankPool) -> None:
    """Metrics are counted once, losses of our own see all logits, and generated texts are the same."""
    job = _job(tmp_path, model)
    runs = [
        job.train(pool, parallel=parallel, train__label_smoothing=0.1) for parallel in ({"pipeline": 1}, LAYOUTS["2x2"])
    ]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)
    checkpoint = (runs[1].checkpoints / "latest").resolve()
    found = []
    for parallel in ({"pipeline": 1}, {"pipeline": 2, "tensor": 2}):
        plan = job.plan(resume=checkpoint, job="evaluate", parallel=parallel)
        run = job.start(plan)
        pool.run_well(run, plan.layout.num_ranks)
        found.append(read_json(run.evaluation))
    assert found[1]["metrics"] == pytest.approx(found[0]["metrics"], rel=1e-5)
    assert found[1]["num_target_tokens"] == found[0]["num_target_tokens"]


@pytest.mark.parametrize(
    ("config", "tensor", "message", "hint"),
    [
        ({}, 3, "num_attention_heads 4", "use tensor: 2 or 4"),
        (
            {"model_type": "gptj", "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
            2,
            "no plan|a plan",
            "tensor: 1",
        ),
    ],
)
def test_refused_before_launch(config: dict[str, Any], tensor: int, message: str, hint: str, tmp_path: Path) -> None:
    job = _job(tmp_path, "llama")
    with pytest.raises(UsageError, match=message) as caught:
        job.plan(
            parallel={"pipeline": 1, "tensor": tensor},
            model={"config": config or MODELS["llama"]},
        )
    assert caught.value.where == "parallel.tensor"
    assert hint in (caught.value.hint or "")


CAUSAL, MASKED, PAIRS = "causal-lm", "masked-lm", "translation"
OLD_FALCON = {"new_decoder_architecture": False, "num_kv_heads": 4}
SHARDED: list[dict[str, Any]] = [
    *({"type": name, "task": CAUSAL} for name in ("opt", "bloom", "gpt_neox", "llama")),
    *({"type": name, "task": CAUSAL} for name in ("mixtral", "deepseek_v3", "phi3")),
    *({"type": name, "task": MASKED} for name in ("bert", "roberta", "xlm-roberta", "camembert")),
    *({"type": name, "task": PAIRS} for name in ("t5", "mt5", "bart", "marian")),
    {"type": "falcon", "task": CAUSAL, "changes": {"new_decoder_architecture": True, "num_kv_heads": 2}},
    {"type": "falcon", "task": CAUSAL, "changes": {**OLD_FALCON, "multi_query": False, "alibi": True}},
    {"type": "falcon", "task": CAUSAL, "changes": {**OLD_FALCON, "multi_query": True}},
    {"type": "falcon", "task": CAUSAL, "changes": {**OLD_FALCON, "multi_query": False, "alibi": True},
     "attention": "eager", "dropout": 0.1},
    {"type": "bart", "task": PAIRS, "dropout": 0.1},
    {"type": "bloom", "task": CAUSAL, "dropout": 0.1},
    {"type": "t5", "task": PAIRS, "dropout": 0.1},
]  # fmt: skip


def test_plans_give_the_loss_and_gradients_of_the_whole_model(tmp_path: Path) -> None:
    """Every type with a plan of ours, and some of transformers' plans, with padding, at two shards."""
    for case, found in zip(SHARDED, run_shards(SHARDED, 2, tmp_path), strict=True):
        assert "error" not in found, (case, found)
        assert found["divided"] >= 10, case
        assert found["loss"] <= 1e-6, (case, found)
        assert found["gradient"] <= 1e-5, (case, found)
        assert found["logits"] <= 1e-4, (case, found)


def test_documented_types_are_those_with_a_plan() -> None:
    text = Path(__file__).parents[1].joinpath("docs", "tensor.md").read_text()
    own, followed = (text.split(f"<!-- {mark} -->")[1].split("\n\n")[0] for mark in ("own", "followed"))
    assert set(re.findall(r"`([^`]+)`", own)) == set(OWN_PLANS)
    assert set(re.findall(r"`([^`]+)`", followed)) == FOLLOWED
