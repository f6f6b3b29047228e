"""Going on from a checkpoint, on the same layout and on others."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Job, final_weights, losses, steps
from rank_pool import RankPool
from transformers import AutoModelForCausalLM

from llmpipe_cli.engine.manifest import verify
from llmpipe_cli.engine.state import scalar_state
from llmpipe_cli.errors import UsageError
from llmpipe_cli.run import RunDirectory, read_metrics

STDLIB = sysconfig.get_paths()["stdlib"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "1": {"pipeline": 1},
    "2": {"pipeline": 2},
    "3": {"pipeline": 3},
    "2x2": {"pipeline": 2, "data": 2, "zero_stage": 0},
    "2x2-zero1": {"pipeline": 2, "data": 2, "zero_stage": 1},
}


def test_scalar_state_lies_where_the_optimizer_reads_it() -> None:
    parameter = torch.nn.Parameter(torch.empty(2, device="meta"))  # stands for an accelerator
    fused, plain = (scalar_state({"fused": fused}, parameter, {"step": 3.0})["step"] for fused in (True, None))
    assert fused.device.type == "meta"
    assert (plain.device.type, float(plain)) == ("cpu", 3.0)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as members:
        yield members


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A tied model with dropout, saved after 3 of 6 steps."""
    return Job(
        tmp_path_factory.mktemp("resume"),
        {
            "name": "resume",
            "task": "causal-lm",
            "model": {
                "config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
                "dropout": 0.1,
            },
            "tokenizer": {"train": {"vocab_size": 300}},
            "data": {"train": {"files": f"{STDLIB}/json/*.py"}, "sequence_len": 32},
            "train": {
                "max_steps": 6,
                "global_batch_size": 8,
                "micro_batch_size": 1,
                "learning_rate": 1e-3,
                "warmup_steps": 2,
                "weight_decay": 0.1,
                "max_grad_norm": 0.5,
            },
            "checkpoint": {"every_steps": 3},
        },
    )


@pytest.fixture(scope="module")
def undisturbed(job: Job, pool: RankPool) -> dict[str, RunDirectory]:
    """Runs of all six steps, by layout."""
    return {name: job.train(pool, parallel=layout) for name, layout in LAYOUTS.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_layout_bit_for_bit(layout: str, job: Job, undisturbed: dict[str, RunDirectory], pool: RankPool) -> None:
    whole = undisturbed[layout]
    resumed = job.train(pool, resume=whole.checkpoint(3), parallel=LAYOUTS[layout])
    assert [line["step"] for line in steps(resumed)] == [4, 5, 6]
    assert losses(resumed) == losses(whole)[3:]
    assert [line["learning_rate"] for line in steps(resumed)] == [line["learning_rate"] for line in steps(whole)][3:]
    for name, weight in final_weights(whole).items():
        assert torch.equal(final_weights(resumed)[name], weight), name


@pytest.mark.parametrize(
    ("before", "after"), [("2", "1"), ("1", "3"), ("2x2", "2"), ("2x2-zero1", "2"), ("3", "2x2-zero1")]
)
def test_other_layout(before: str, after: str, job: Job, undisturbed: dict[str, RunDirectory], pool: RankPool) -> None:
    resumed = job.train(pool, resume=undisturbed[before].checkpoint(3), parallel=LAYOUTS[after])
    assert losses(resumed) == pytest.approx(losses(undisturbed[after])[3:], rel=1e-5)
    for name, weight in final_weights(undisturbed[after]).items():
        torch.testing.assert_close(final_weights(resumed)[name], weight, rtol=0, atol=1e-5)
    event = next(line for line in read_metrics(resumed.metrics) if line.get("event") == "resume")
    assert event["step"] == 3
    assert event["saved_layout"]["pipeline"] == LAYOUTS[before]["pipeline"]


@pytest.mark.parametrize(("dtype", "after"), [("bf16", "1"), ("bf16", "2x2-zero1"), ("fp16", "1")])
def test_masters_survive_another_layout(dtype: str, after: str, job: Job, pool: RankPool) -> None:
    """Low-precision weights alone would lose what the fp32 masters know."""
    layouts = {name: {**layout, "zero_stage": 1} for name, layout in LAYOUTS.items()}
    whole = job.train(pool, parallel=layouts["2"], model__dtype=dtype)
    resumed = job.train(pool, resume=whole.checkpoint(3), parallel=layouts[after], model__dtype=dtype)
    assert losses(resumed) == pytest.approx(losses(whole)[3:], rel=1e-5)


@pytest.mark.parametrize("layout", ["1", "2", "2x2-zero1"])
def test_checkpoint_is_a_hugging_face_model(layout: str, undisturbed: dict[str, RunDirectory]) -> None:
    checkpoint = undisturbed[layout].checkpoints / "latest"
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.lm_head.weight is model.transformer.wte.weight
    expected = final_weights(undisturbed["1"])["transformer.wte.weight"]
    torch.testing.assert_close(model.transformer.wte.weight.detach(), expected, rtol=0, atol=1e-5)
    assert verify(checkpoint.resolve())["step"] == 6
    state = json.loads((checkpoint / "training" / "state.json").read_text())
    assert state["samples"] == 48
    assert not list(checkpoint.rglob("*.pt")) + list(checkpoint.rglob("*.bin")) + list(checkpoint.rglob("*.pkl"))


def test_replicas_write_each_tensor_once(undisturbed: dict[str, RunDirectory]) -> None:
    """Over all ranks' files every element of every state is there exactly once."""
    from safetensors import safe_open

    for run in undisturbed.values():
        seen: dict[str, list[tuple[int, int]]] = {}
        for path in sorted((run.checkpoint(3) / "training").glob("optimizer-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    key, _, start = name.rpartition("|")
                    seen.setdefault(key, []).append((int(start), file.get_slice(name).get_shape()[0]))
        weights = final_weights(run)
        assert {key.partition("|")[0] for key in seen} == set(weights)
        for key, pieces in seen.items():
            position = 0
            for start, count in sorted(pieces):
                assert start == position
                position += count
            assert position == weights[key.partition("|")[0]].numel()


def test_resumed_run_may_train_longer(job: Job, undisturbed: dict[str, RunDirectory], pool: RankPool) -> None:
    resumed = job.train(pool, resume=undisturbed["2"].checkpoint(6), parallel=LAYOUTS["2"], train__max_steps=8)
    assert [line["step"] for line in steps(resumed)] == [7, 8]


def test_stop_at_a_step(job: Job, undisturbed: dict[str, RunDirectory], pool: RankPool) -> None:
    run = job.start(job.plan(parallel=LAYOUTS["2"]).stopping_at(2))
    assert pool.run(run, 2) == [75, 75]
    assert losses(run) == losses(undisturbed["2"])[:2]
    resumed = job.train(pool, resume=run.checkpoint(2), parallel=LAYOUTS["1"])
    assert losses(resumed) == pytest.approx(losses(undisturbed["1"])[2:], rel=1e-5)


@pytest.mark.parametrize(("name", "value"), [("global_batch_size", 16), ("seed", 5)])
def test_what_decides_the_samples_must_stay(
    name: str, value: int, job: Job, undisturbed: dict[str, RunDirectory]
) -> None:
    with pytest.raises(UsageError) as caught:
        job.plan(resume=undisturbed["1"].checkpoint(3), **{f"train__{name}": value})
    assert caught.value.where == f"train.{name}"


def test_auto_micro_batch_size_is_kept(job: Job, undisturbed: dict[str, RunDirectory]) -> None:
    plan = job.plan(resume=undisturbed["1"].checkpoint(3), train__micro_batch_size="auto", parallel=LAYOUTS["1"])
    assert plan.micro_batch_size == 1


def test_stop_request_saves_and_goes_on(
    tmp_path: Path, job: Job, undisturbed: dict[str, RunDirectory], pool: RankPool
) -> None:
    """A stop file that is there from the start: one step, a checkpoint, exit code 75; the rest follows exactly."""
    plan = job.plan(parallel=LAYOUTS["2"])
    run = job.start(plan)
    run.request_stop()
    assert pool.run(run, 2) == [75, 75]
    assert [line["step"] for line in steps(run)] == [1]
    resumed = job.train(pool, resume=run.checkpoint(1), parallel=LAYOUTS["2"])
    assert losses(run) + losses(resumed) == losses(undisturbed["2"])
