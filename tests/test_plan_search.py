"""The planner's search: pruned and exhaustive agree, bounds hold, short simulations stand for long ones."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from llmpipe_cli.engine.schedules import SCHEDULES, Instruction
from llmpipe_cli.errors import UsageError
from llmpipe_cli.plan.cluster import Cluster, Node, described
from llmpipe_cli.plan.devices import DEVICES, GIB
from llmpipe_cli.plan.partition import balance_unequal
from llmpipe_cli.plan.profile import ModelProfile
from llmpipe_cli.plan.propose import as_json, nearest, refusal
from llmpipe_cli.plan.search import EQUAL_WITHIN, Candidate, Job, Pins, choices, search, why_not, why_slower
from llmpipe_cli.plan.simulate import StageCosts, simulate_schedule
from llmpipe_cli.plan.steptime import held_activations, least_seconds, num_chunks, pipeline_time
from llmpipe_cli.plan.transformer import transformer_profile
from llmpipe_cli.recipe.schema import Recipe


def _profile(num_layers: int, hidden: int = 2048) -> ModelProfile:
    return transformer_profile(
        num_layers=num_layers,
        hidden=hidden,
        heads=16,
        vocab_size=50304,
        sequence_len=1024,
        fused_attention=True,
        dtype="bf16",
    )


def _cluster(nodes: int, per_node: int = 4, device: str = "a100-40gb", **more: object) -> Cluster:
    return described({"nodes": nodes, "devices_per_node": per_node, "device": device, **more}, "test")


@pytest.mark.parametrize(
    ("job", "prunes"),
    [
        (Job(_profile(10), _cluster(2), 64, 1024), True),
        (Job(_profile(16, 4096), _cluster(4, inter_node_gbps=10), 48, 1024), True),
        (Job(_profile(6), _cluster(1, 2, "rtx-4090"), 8, 1024, pins=Pins(pipeline=2)), False),
        (Job(_profile(14, 5120), _cluster(2, 8, "v100-32gb"), 32, 1024), True),
    ],
)
def test_pruning_loses_nothing(job: Job, prunes: bool) -> None:
    if job.cluster.nodes[0].device.name.startswith("v100"):
        job = replace(job, profile=replace(job.profile, dtype="fp16"))
    pruned, whole = search(job, keep=3), search(job, keep=3, exhaustive=True)
    assert [one.choice for one in pruned.best] == [one.choice for one in whole.best]
    assert [one.seconds for one in pruned.best] == [one.seconds for one in whole.best]
    assert whole.num_played == whole.num_fitting
    assert not prunes or pruned.num_played < whole.num_played / 2
    best = whole.best[0]
    assert best.seconds is not None
    everything = search(job, keep=10**6, exhaustive=True).best
    fastest = min(one.seconds for one in everything if one.seconds is not None)
    assert best.seconds <= fastest * (1 + EQUAL_WITHIN)
    equal = [one for one in everything if one.seconds is not None and one.seconds <= fastest * (1 + EQUAL_WITHIN)]
    assert best.choice.complexity() == min(one.choice.complexity() for one in equal)


def test_lower_bounds_hold_and_short_steps_stand_for_long_ones() -> None:
    draw = random.Random(5)
    for schedule, stages, many in itertools.product(SCHEDULES, (1, 2, 4, 7), (8, 40)):
        if stages == 1 and schedule != "1f1b":
            continue
        parts = stages * num_chunks(schedule)
        even = [StageCosts(1.0, 1.2, 0.8)] * parts
        uneven = [StageCosts(draw.uniform(0.8, 1.2), draw.uniform(1, 1.4), draw.uniform(0.6, 1)) for _ in range(parts)]
        regular = schedule != "zb-v"  # whose order is found by playing
        for costs, close in ((even, 0.01 if regular else 0.03), (uneven, 0.03)):
            transfers = [0.05] * (parts - 1)
            whole = simulate_schedule(SCHEDULES[schedule], costs, many, 0.05 if parts > 1 else 0.0).step
            assert least_seconds(schedule, costs, many, transfers) <= whole * (1 + 1e-9)
            timed = pipeline_time(schedule, costs, many, transfers)
            assert timed.seconds == pytest.approx(whole, rel=close), (schedule, stages, many)
            assert least_seconds(schedule, costs, many, transfers) <= timed.seconds * (1 + 1e-9)


def _fullest(order: Sequence[Instruction], kept: list[float], pending: list[float], gradients: float) -> float:
    """The most that a stage holds while it runs its instructions."""
    alive, waiting, most, accumulated = [0] * len(kept), [0] * len(kept), 0.0, 0.0
    for kind, _, chunk in order:
        alive[chunk] += (kind == "F") - (kind in "BI")
        waiting[chunk] += (kind == "I") - (kind == "W")
        accumulated = gradients if kind in "BW" else accumulated
        sizes = zip((*alive, *waiting), (*kept, *pending), strict=True)
        most = max(most, accumulated + sum(number * size for number, size in sizes))
    return most


def _most_alive(order: Sequence[Instruction], chunks: int) -> int:
    """The largest number of micro-batches whose activations a stage keeps, those of all chunks together."""
    alive = [0] * chunks
    counts = []
    for kind, _, chunk in order:
        alive[chunk] += (kind == "F") - (kind in "BI")
        counts.append(sum(alive))
    return max(counts)


def test_held_activations_are_those_of_the_orders() -> None:
    """Whatever the sizes: exact for stages in one part; for several, where they are rules, nearly so."""
    draw = random.Random(3)
    for schedule, stages, many in itertools.product(SCHEDULES, (1, 2, 3, 4, 6), (1, 2, 3, 4, 5, 7, 8, 12, 20)):
        chunks = num_chunks(schedule)
        if stages == 1 and schedule != "1f1b":
            continue
        for stage in range(stages):
            order = SCHEDULES[schedule](stage, stages, many, chunks)
            moments = held_activations(schedule, stages, many, chunks, stage)
            assert _most_alive(order, chunks) <= max(sum(now.alive) for now in moments), (schedule, stages, many, stage)
            for _ in range(4):
                kept = [draw.uniform(0.7, 1.4) for _ in range(chunks)]
                pending, gradients = [size * draw.uniform(0.6, 1.1) for size in kept], draw.uniform(0, 2)
                most = max(
                    sum(n * size for n, size in zip((*now.alive, *now.waiting), (*kept, *pending), strict=True))
                    + now.accumulating * gradients
                    for now in moments
                )
                exact = _fullest(order, kept, pending, gradients)
                if schedule == "zb-v" and many <= stages:  # the pipeline is not even full once
                    assert 0.88 * exact <= most <= 1.2 * exact, (stages, many, stage)
                else:
                    assert most == pytest.approx(exact, rel=1e-9 if chunks == 1 else 0.12), (schedule, stages)


def test_cutting_for_unequal_devices() -> None:
    fast, slow = [1.0] * 12, [3.0] * 12
    assert balance_unequal([fast, slow]) == [0, 9, 12]
    assert balance_unequal([fast, fast], lambda stage, start, stop: stage == 1 or stop - start <= 4) == [0, 4, 12]
    assert balance_unequal([fast, fast], lambda stage, start, stop: stop - start <= 4) is None


def test_unequal_nodes() -> None:
    """A node of slow, small devices gets fewer layers, and the pipeline is faster than even stages would be."""
    nodes = (Node(DEVICES["a100-80gb"], 4), Node(DEVICES["a10"], 4))
    cluster = Cluster(nodes, 2400, 200)
    job = Job(_profile(24), cluster, 64, 1024, pins=Pins(pipeline=2, tensor=1, data=4, schedule="1f1b"))
    best = search(job).best[0]
    assert best.bounds[1] > 2 * (26 - best.bounds[1])
    assert best.capacity == [nodes[0].device.memory_bytes, nodes[1].device.memory_bytes]
    even = search(replace(job, pins=replace(job.pins, partition=(13, 13)))).best[0]
    assert best.seconds is not None
    assert even.seconds is not None
    assert best.seconds < 0.6 * even.seconds


def test_pins_are_kept_and_reported_even_if_nothing_fits() -> None:
    job = Job(_profile(48, 8192), _cluster(1, 8), 64, 1024)
    pins = Pins(pipeline=8, tensor=1, data=1, micro_batch_size=8, schedule="1f1b", checkpointing="none", zero_stage=1)
    found = search(replace(job, pins=pins))
    assert not found.best
    assert [one.choice.pipeline for one in found.unfit] == [8]
    assert "GiB" in why_not(found.unfit[0])
    error = refusal(replace(job, pins=pins), found)
    assert error.exit_code == 3
    assert "nodes this would fit" in (error.hint or "")
    (answer,) = nearest(job)
    count = int(answer.split()[1])
    larger = search(replace(job, cluster=job.cluster.first_nodes(count)), keep=1)
    assert larger.best[0].fits
    assert not search(replace(job, cluster=job.cluster.first_nodes(count // 2)), keep=1).best


def test_impossible_layouts_are_refused() -> None:
    undivided = replace(_profile(4), divisible=())
    for profile, pins, words in [
        (_profile(4), Pins(pipeline=16), "16 stages"),
        (_profile(4), Pins(tensor=3), "3 tensor shards cannot share"),
        (undivided, Pins(tensor=2), "cannot be divided"),
        (_profile(4), Pins(data=3), "cannot be dealt to 3 replicas"),
        (_profile(4), Pins(micro_batch_size=7), "no multiple of micro_batch_size 7"),
    ]:
        job = Job(profile, _cluster(1, 4), 64, 1024, pins=pins)
        found = search(job)
        assert not found.best
        assert not found.unfit
        error = refusal(job, found)
        assert error.exit_code == 2
        assert words in error.message
        assert "this would fit" in (error.hint or "")


@pytest.mark.parametrize(
    ("pins", "field", "kept"),
    [
        (Pins(pipeline=16, data=1), "parallel.pipeline", "pipeline 4 x tensor 1 x data 1"),  # the most that there are
        (Pins(tensor=4, data=2, pipeline=1), "parallel.tensor", "pipeline 1 x tensor 2 x data 2"),
        (Pins(pipeline=2, partition=(2, 2)), "parallel.partition", "pipeline 2 x"),
        (Pins(pipeline=2, schedule="interleaved", chunks=4), "parallel.schedule", "pipeline 2 x"),
        (Pins(micro_batch_size=7), "train.micro_batch_size", "micro_batch_size 8"),
    ],
)
def test_what_fits_is_near_to_what_was_asked_for(pins: Pins, field: str, kept: str) -> None:
    answers = nearest(Job(_profile(4), _cluster(1, 4), 64, 1024, pins=pins))
    assert answers[0].startswith(f"with another {field} this would fit: ")
    assert kept in answers[0]
    assert len(answers) <= 3


def test_no_number_of_nodes_that_would_do_is_said() -> None:
    (answer,) = nearest(Job(_profile(4), _cluster(1, 2, "l4"), 2, 2**20))
    assert answer.startswith("64 such nodes would not do either")


def test_more_shards_than_asked_for_are_no_reason() -> None:
    job = Job(_profile(4), _cluster(1, 4), 64, 1024, pins=Pins(pipeline=5))
    assert list(search(job).refused) == ["5 devices are needed and there are 4"]


def test_fewer_devices_are_a_reason_only_where_there_are_fewer() -> None:
    job = Job(_profile(12), _cluster(1, 8, "a100-80gb"), 8, 1024)

    def pinned(pipeline: int, data: int) -> Candidate:
        pins = Pins(pipeline, 1, data, 1, schedule="1f1b", checkpointing="none")
        return search(replace(job, pins=pins)).best[0]

    best, fewer, more = pinned(2, 2), pinned(1, 2), pinned(8, 1)
    assert why_slower(fewer, best).endswith("fewer devices at work")
    assert "idle" in why_slower(more, best)


def test_checkpointing_and_shards_save_memory() -> None:
    """Activation memory against Korthikanti et al. 2022: sbh (34 + 5as/h) a layer, 2 sbh under full checkpointing."""
    s, b, h, a, layers = 1024, 4, 2048, 16, 10
    profile = transformer_profile(num_layers=layers, hidden=h, heads=a, vocab_size=50304, sequence_len=s, dtype="fp16")
    kept = {}
    for checkpointing in ("none", "full"):
        pins = Pins(1, 1, 1, b, schedule="1f1b", zero_stage=1, checkpointing=checkpointing)
        job = Job(profile, _cluster(1, 1, "a100-80gb"), b, s, pins=pins)
        one = search(job).best[0].memory[0]
        kept[checkpointing] = one.activations
        parameters = profile.num_parameters + 50304 * h  # the shared embedding is held by both ends
        assert one.weights == 2 * parameters
        assert one.optimizer == 12 * parameters
    layer = s * b * h * (34 + 5 * a * s / h)
    assert kept["none"] - kept["full"] == pytest.approx(layers * layer - layers * 2 * s * b * h, rel=0.02)


def test_frozen_weights_have_no_operations_of_their_own() -> None:
    """Two of a forward pass's three times remain of the products; attention keeps all."""
    recipe = Recipe.model_validate({"name": "frozen", "model": {"config": {"model_type": "llama"}}})
    whole = _profile(10)
    segments = tuple(replace(segment, frozen_parameters=segment.parameters) for segment in whole.segments)
    rates = []
    for profile in (whole, replace(whole, segments=segments)):
        job = Job(profile, _cluster(1, 1, "a100-80gb"), 8, 1024, pins=Pins(micro_batch_size=2, checkpointing="none"))
        (row,) = as_json(job, search(job), recipe)["layouts"]
        assert row["tflops_per_device"] == row["model_tflops_per_device"] < 312
        rates.append(row["model_tflops_per_device"] * row["step_seconds"] * 1e12)
    attention = 8 * 1024 * 4 * 2048 * 1024 * 10
    products = whole.flops(8 * 1024, 1024) - attention
    assert rates[0] == pytest.approx(3 * products + 3 * attention)
    assert rates[1] == pytest.approx(2 * products + 3 * attention)


def test_descriptions_of_clusters() -> None:
    cluster = described(
        {
            "nodes": [{"device": "h100-80gb", "devices_per_node": 2}, {"device": "a100-40gb", "devices_per_node": 4}],
            "inter_node_gbps": 100,
        },
        "c.yaml",
    )
    assert [(node.device.name, node.count) for node in cluster.nodes] == [("h100-80gb", 2), ("a100-40gb", 4)]
    assert cluster.counts == {"h100-80gb": 2, "a100-40gb": 4}
    own = described({"device": {"memory_gb": 48, "bf16_tflops": 100, "memory_gbps": 600}}, "c.yaml")
    assert own.nodes[0].device.memory_bytes == 48 * GIB
    assert own.nodes[0].device.peak("bf16") == 1e14
    wrongs: list[dict[str, object]] = [
        {"device": "a100-80gb", "node": 3},
        {"nodes": 2},
        {"device": "a100-80gb", "nodes": 0},
        {"device": 7},
        {"device": "a100-80gb", "inter_node_gbps": math.nan},
        {"device": "a100-80gb", "intra_node_gbps": math.inf},
    ]
    for wrong in wrongs:
        with pytest.raises(UsageError):
            described(wrong, "c.yaml")


def test_every_combination_uses_the_whole_batch() -> None:
    job = Job(_profile(10), _cluster(2), 48, 1024)
    for choice in choices(job, Counter()):
        assert choice.micro_batch_size * choice.num_micro_batches * choice.data == 48
        assert choice.num_devices <= 8
