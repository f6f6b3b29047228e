"""`llmpipe plan` and `auto` fields on accelerators: stages that begin inside a layer, and recipes that list them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmpipe_cli.data.prepare import prepare
from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.plan.calibration import planned_candidate
from llmpipe_cli.plan.cluster import Cluster, one_node
from llmpipe_cli.plan.devices import find_device
from llmpipe_cli.plan.finer import find
from llmpipe_cli.plan.plan import Plan
from llmpipe_cli.plan.propose import fill_auto, make_job
from llmpipe_cli.plan.resolve import make_plan
from llmpipe_cli.plan.search import search
from llmpipe_cli.recipe.schema import Recipe

LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 10, "num_attention_heads": 16,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 32000, "n_embd": 1024, "n_layer": 10, "n_head": 16}


def recipe(config: dict[str, Any] = LLAMA, **parallel: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "finer",
            "model": {"config": config, "dtype": "bf16"},
            "data": {"train": {"synthetic": True}, "sequence_len": 1024},
            "train": {"max_steps": 1, "global_batch_size": 32},
            "parallel": {"pipeline": 4, "tensor": 1, "data": 1, **parallel},
        }
    )


def cluster() -> Cluster:
    return one_node(find_device("a100-80gb", ""), 4)


def plan_of(given: Recipe, folder: Path, **options: Any) -> Plan:
    data = prepare(given, folder, folder / "cache")
    return make_plan(given, data, device="cuda", num_devices=4, **options)


def test_a_layer_is_cut_where_that_is_faster() -> None:
    given = recipe(schedule="1f1b")
    job = make_job(given, cluster())
    whole, best = search(job).best[0], find(given, job).best[0]
    assert not whole.split_layers
    assert best.split_layers
    assert best.seconds is not None
    assert whole.seconds is not None
    assert best.seconds < 0.98 * whole.seconds
    assert max(cost.total for cost in best.costs) < 0.98 * max(cost.total for cost in whole.costs)
    # the same work in all, wherever it is cut
    assert sum(cost.total for cost in best.costs) == pytest.approx(sum(cost.total for cost in whole.costs), rel=1e-3)


@pytest.mark.parametrize(
    "given",
    [recipe(split_layers=False), recipe(partition=[3, 3, 3, 3]), recipe(GPT2), recipe(activation_checkpointing="full")],
    ids=["false", "partition", "dropout", "recomputed"],
)
def test_layers_stay_whole(given: Recipe) -> None:
    assert not any(candidate.split_layers for candidate in find(given, make_job(given, cluster())).best)


def test_auto_fields_become_the_plan_that_was_predicted(tmp_path: Path) -> None:
    given, machine = recipe(), cluster()
    best = find(given, make_job(given, machine)).best[0]
    filled = fill_auto(given, machine)
    assert filled.parallel.split_layers == list(best.split_layers) != []
    plan = plan_of(filled, tmp_path)
    assert plan.partition == best.bounds
    assert SlicePlan.from_json(plan.slice_plan).split == best.split_layers
    again = planned_candidate(plan, machine)
    assert again is not None
    assert again.seconds == pytest.approx(best.seconds, rel=1e-6)
    # evaluation has no use for the parts of layers
    assert not plan_of(filled, tmp_path, job="evaluate").slice_plan["split"]


def test_a_recipe_that_lists_its_split_layers_is_planned_so() -> None:
    filled = fill_auto(recipe(), cluster())
    job = make_job(filled, cluster())
    assert len(job.profile.segments) > 12
    counts = [stop - start for start, stop in itertools.pairwise(find(filled, job).best[0].bounds)]
    assert counts == filled.parallel.partition
    free = replace(job, pins=replace(job.pins, tensor=None, pipeline=None, data=None, partition=None, schedule=None))
    assert {candidate.choice.tensor for candidate in search(free, exhaustive=True, keep=100).best} == {1}


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"split_layers": ["model.layers.77"]}, "no layer that can be split"),
        ({"split_layers": ["model.layers.9"]}, "no layer that can be split"),  # what follows needs its whole result
        ({"split_layers": ["model.layers.1"], "activation_checkpointing": "full"}, "layers stay whole"),
    ],
)
def test_lists_that_cannot_be(parallel: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        plan_of(recipe(schedule="1f1b", **parallel), tmp_path)
    assert raised.value.where == "parallel.split_layers"
    assert raised.value.hint
