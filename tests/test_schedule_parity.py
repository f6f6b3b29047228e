"""Every schedule against one Hugging Face process, on real ranks: losses, gradient norms, weights, activation memory.

The instruction order that ranks recorded is played through with published times, so that what was run, and not only
what was planned, has the published bubbles. Activation memory is counted in live tensors (`live_activations`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Job, final_weights, full_model, losses, steps, train_plain
from live_activations import count_live_activations, most_alive
from rank_pool import RankPool
from test_schedules import memory_formula

from llmpipe_cli.engine.schedules import SCHEDULES
from llmpipe_cli.plan.resolve import make_plan
from llmpipe_cli.plan.simulate import StageCosts, simulate
from llmpipe_cli.report.timeline import load_timeline
from llmpipe_cli.run import RunDirectory

# 6 layers, embedding and head: 8 segments, so that four stages can hold two parts each.
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
NAMES = list(SCHEDULES)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4, prepare=count_live_activations) as members:
        yield members


def _job(folder: Path, num_micro_batches: int, **train: Any) -> Job:
    """A model whose embedding and head are tied; clipping is active."""
    config = {"model_type": "llama", **SMALL, "vocab_size": 96, "tie_word_embeddings": True}
    return Job(
        folder,
        {
            "name": f"m{num_micro_batches}",
            "task": "causal-lm",
            "model": {"config": config, "dropout": 0.0},
            "data": {"train": {"synthetic": True}, "sequence_len": 16},
            "train": {
                "max_steps": 2,
                "global_batch_size": num_micro_batches,
                "micro_batch_size": 1,
                "learning_rate": 1e-3,
                "warmup_steps": 0,
                "max_grad_norm": 0.1,
                **train,
            },
        },
    )


class References:
    """Jobs by their number of micro-batches, each trained once by a plain Hugging Face loop.

    Args:
        folder: where they go.
        train: changes of their recipes.
    """

    def __init__(self, folder: Path, **train: Any) -> None:
        self._folder, self._train, self._known = folder, train, {}

    def get(self, num_micro_batches: int) -> tuple[Job, Any]:
        if num_micro_batches not in self._known:
            job = _job(self._folder, num_micro_batches, **self._train)
            self._known[num_micro_batches] = (job, train_plain(job.plan()))
        return self._known[num_micro_batches]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(tmp_path_factory.mktemp("references"))


def _check(run: RunDirectory, plain: Any, limit: float) -> None:
    plain_losses, plain_norms, plain_weights = plain
    assert losses(run) == pytest.approx(plain_losses, rel=1e-5)
    assert [line["grad_norm"] for line in steps(run)] == pytest.approx(plain_norms, rel=1e-5)
    assert min(plain_norms) > limit, "clipping was not active"
    weights = final_weights(run)
    for name, expected in plain_weights.items():
        if name in weights:  # a tied name is saved once
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-5)


def _check_memory(run: RunDirectory, name: str, num_micro_batches: int, chunks: int) -> None:
    """Activations that were really alive: no more than the order itself demands, and what the papers' formulas say."""
    timeline = load_timeline(run)
    placement = timeline.placement
    num_stages = placement.num_stages
    orders = [[bar.instruction for bar in rank.instructions()] for rank in timeline.ranks]
    played = simulate(orders, [StageCosts(1, 1, 1)] * placement.num_parts, 0.0, placement)
    kept = [rank.peak_activations for rank in timeline.ranks]
    assert kept == played.peak_activations
    alive = [most_alive(run, rank) for rank in range(num_stages)]
    assert alive.count(None) <= 2, "parts without a layer are the first and the last"
    assert all(tensors in (None, most) for tensors, most in zip(alive, kept, strict=True))
    formula = [memory_formula(name, stage, num_stages, num_micro_batches, chunks) for stage in range(num_stages)]
    assert all(mine <= most for mine, most in zip(kept, formula, strict=True))
    if num_micro_batches >= 2 * num_stages:
        assert kept == formula


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(2, 2), (2, 8), (3, 7), (4, 4), (4, 16)])
def test_schedule(name: str, num_stages: int, num_micro_batches: int, references: References, pool: RankPool) -> None:
    """Tied weights, clipping; m from p to 4 p. The order recorded is the schedule's, and so is the memory."""
    job, plain = references.get(num_micro_batches)
    run = job.train(pool, parallel={"pipeline": num_stages, "schedule": name})
    _check(run, plain, job.values["train"]["max_grad_norm"])
    for rank in load_timeline(run).ranks:
        expected = SCHEDULES[name](rank.stage, num_stages, num_micro_batches)
        assert [bar.instruction for bar in rank.instructions()] == expected
    _check_memory(run, name, num_micro_batches, SCHEDULES[name].chunks or 2)


@pytest.mark.parametrize(
    ("name", "num_stages", "parallel", "dtype"),
    [
        ("1f1b", 2, {}, "fp32"),
        ("zb-v", 2, {}, "fp32"),
        ("zb-h2", 3, {}, "fp32"),
        ("zb-h1", 2, {"zero_stage": 1, "data": 2}, "fp32"),
        ("zb-h1", 2, {}, "bf16"),
    ],
)
def test_stages_that_begin_inside_a_layer(
    name: str, num_stages: int, parallel: dict[str, Any], dtype: str, tmp_path: Path, pool: RankPool
) -> None:
    """Five layers that are most of the work: the half of them ends inside one, which is cut before its MLP."""
    job = _job(tmp_path, 8)
    job.values["model"]["config"].update(num_hidden_layers=5, intermediate_size=64)
    job.values["model"]["dtype"] = dtype
    job.values["train"]["lr_scheduler_type"] = "constant"
    parallel = {"pipeline": num_stages, "schedule": name, "split_layers": "auto", **parallel}
    plan = job.plan(parallel=parallel)
    assert plan.slice_plan["split"]
    named = [segment["name"] for segment in plan.slice_plan["segments"]]
    assert any(named[bound].endswith(".mlp") for bound in plan.partition[1:-1])
    run = job.train(pool, parallel=parallel)
    if dtype == "bf16":  # as exact as bf16 on whole layers: another layout gives the same losses
        whole = job.train(pool, parallel=parallel | {"split_layers": False})
        assert losses(run) == losses(whole)
        return
    _check(run, train_plain(job.plan()), job.values["train"]["max_grad_norm"])
    if name == "1f1b":  # what it saved goes on in whole layers
        uncut = {**parallel, "split_layers": False}
        resumed = job.train(pool, resume=run.latest_checkpoint(), parallel=uncut, train__max_steps=4)
        straight = job.train(pool, parallel=parallel, train__max_steps=4)
        assert losses(resumed) == pytest.approx(losses(straight)[2:], rel=1e-5)


def test_recorded_orders_have_the_published_bubbles(tmp_path: Path) -> None:
    """Eight real ranks, 24 micro-batches: what they recorded, with the Zero Bubble paper's times for that size (Qi et
    al. 2023), has its bubble rates. Three parts a stage are that paper's interleaved 1F1B."""
    f, b, w, transfer = 18.522, 18.086, 9.337, 0.601
    published = {"1f1b": 0.2431, "interleaved": 0.1055, "zb-h1": 0.1585, "zb-h2": 0.1083}
    job = _job(tmp_path, 24, max_steps=1)
    job.values["model"]["config"].update(hidden_size=16, intermediate_size=16, num_attention_heads=2)
    idle = {}
    with RankPool(8) as eight:
        for name in (*published, "zb-v"):
            chunks = {"interleaved": 3, "zb-v": 2}.get(name, 1)
            virtual = {"virtual_stages": chunks} if chunks > 1 else {}
            job.values["model"]["config"]["num_hidden_layers"] = 8 * chunks - 2  # a segment a part
            plan = make_plan(
                job.recipe(parallel={"pipeline": 8, "schedule": name, **virtual}), job.data, device="cpu", num_devices=8
            )
            run = job.start(plan)
            eight.run_well(run, 8)
            timeline = load_timeline(run)
            orders = [[bar.instruction for bar in rank.instructions()] for rank in timeline.ranks]
            costs = [StageCosts(f / chunks, b / chunks, w / chunks)] * (8 * chunks)
            idle[name] = simulate(orders, costs, transfer, timeline.placement).bubble_fraction
            assert len(steps(run)) == 1
    for name, expected in published.items():
        assert idle[name] == pytest.approx(expected, abs=0.02 if name == "interleaved" else 0.005), name
    assert idle["zb-v"] < idle["zb-h1"] / 2


VARIANTS: dict[str, dict[str, Any]] = {
    "zero1": {"pipeline": 3, "zero_stage": 1},
    "checkpointing": {"pipeline": 3, "activation_checkpointing": "full"},
    "together": {"pipeline": 2, "data": 2, "zero_stage": 1, "activation_checkpointing": "full"},
}


@pytest.mark.parametrize(
    ("variant", "name"),
    [(variant, name) for variant in VARIANTS for name in NAMES if variant == "together" or SCHEDULES[name].chunks != 1],
)
def test_variants(name: str, variant: str, references: References, pool: RankPool) -> None:
    """Every schedule with replicas, ZeRO-1, checkpointing, clipping and ties at once; each alone where stages have
    several parts."""
    job, plain = references.get(8)
    run = job.train(pool, parallel={"schedule": name, **VARIANTS[variant]})
    _check(run, plain, job.values["train"]["max_grad_norm"])


@pytest.fixture(scope="module")
def one_bf16_stage(references: References, pool: RankPool) -> RunDirectory:
    return references.get(8)[0].train(pool, parallel={"pipeline": 1}, model__dtype="bf16")


@pytest.mark.parametrize("schedule", NAMES)
def test_bf16_with_fp32_accumulation(
    schedule: str, one_bf16_stage: RunDirectory, references: References, pool: RankPool
) -> None:
    """The same as one bf16 stage: sums are made in fp32, so their order does not show."""
    job, plain = references.get(8)
    run = job.train(pool, parallel={"pipeline": 3, "schedule": schedule}, model__dtype="bf16")
    assert losses(run) == pytest.approx(losses(one_bf16_stage), rel=1e-5)
    assert losses(run) == pytest.approx(plain[0], rel=5e-3)
    weights = final_weights(run)
    for name, expected in final_weights(one_bf16_stage).items():
        assert weights[name].dtype == torch.bfloat16
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> References:
    """One step of plain SGD, so that what changes in a weight is its gradient, scaled up to stand out of rounding."""
    train = {"optimizer": "sgd", "learning_rate": 1e4, "lr_scheduler_type": "constant", "max_steps": 1}
    return References(tmp_path_factory.mktemp("gradients"), **train)


@pytest.mark.parametrize("seed", range(8))
def test_random_layouts(seed: int, gradients: References, pool: RankPool) -> None:
    """Each schedule with random numbers of stages, micro-batches and chunks, with or without replicas, ZeRO-1 and
    checkpointing: every single gradient is the plain run's."""
    generator = random.Random(seed)
    name, num_stages = NAMES[seed % len(NAMES)], generator.randint(2, 4)
    num_micro_batches = generator.randint(num_stages, 4 * num_stages)
    parallel: dict[str, Any] = {
        "pipeline": num_stages,
        "schedule": name,
        "activation_checkpointing": generator.choice(["none", "selective", "full"]),
        "zero_stage": generator.randint(0, 1),
        "data": 2 if num_stages == 2 and num_micro_batches % 2 == 0 else 1,
    }
    if name == "interleaved" and num_stages == 2:
        parallel["virtual_stages"] = generator.randint(2, 4)
    job, (plain_losses, plain_norms, plain_weights) = gradients.get(num_micro_batches)
    run = job.train(pool, parallel=parallel)
    assert losses(run) == pytest.approx(plain_losses, rel=1e-5)
    assert [line["grad_norm"] for line in steps(run)] == pytest.approx(plain_norms, rel=1e-5)
    begun, weights = full_model(job.plan()).state_dict(), final_weights(run)
    for parameter, expected in plain_weights.items():
        if parameter in weights:  # a tied name is saved once
            change = (expected - begun[parameter]).abs().max().item()
            assert change > 1e-2, parameter
            torch.testing.assert_close(weights[parameter], expected, rtol=0, atol=1e-5 * change)


def test_checkpoints_over_placements(tmp_path: Path, pool: RankPool) -> None:
    """One training that changes its placement after each step: the plain run's losses."""
    layouts: list[dict[str, Any]] = [
        {"pipeline": 2, "schedule": "zb-v"},
        {"pipeline": 3, "schedule": "interleaved"},
        {"pipeline": 2, "data": 2, "zero_stage": 1, "schedule": "zb-v"},
        {"pipeline": 1},
        {"pipeline": 2, "schedule": "zb-v"},
    ]
    job = _job(tmp_path, 8, max_steps=len(layouts))
    plain_losses, *_ = train_plain(job.plan())
    saved = None
    for done, parallel in enumerate(layouts):
        run = job.train(pool, resume=saved, parallel=parallel, checkpoint={"every_steps": 1, "keep": len(layouts)})
        assert losses(run) == pytest.approx(plain_losses[done:], rel=1e-5)
        saved = run.checkpoint(done + 1)


@pytest.mark.parametrize("name", ["1f1b", "zb-v"])
def test_bf16_between_fp32_stages(name: str, references: References, pool: RankPool) -> None:
    """Rounded on the way, and only there: near the plain run's losses, weights still fp32."""
    job, (plain_losses, *_) = references.get(8)
    run = job.train(pool, parallel={"pipeline": 3, "schedule": name, "wire_dtype": "bf16"})
    assert losses(run) == pytest.approx(plain_losses, rel=1e-3)
    assert losses(run) != pytest.approx(plain_losses, rel=1e-6), "nothing was rounded"
    assert {weight.dtype for weight in final_weights(run).values()} == {torch.float32}
