"""`auto` fields and forecasts take the devices that the launcher found, not those of the machine where one types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmpipe_cli.cluster.devices import Devices
from llmpipe_cli.data.prepare import prepare
from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.plan.devices import GIB
from llmpipe_cli.plan.plan import Plan
from llmpipe_cli.plan.propose import cluster_of, fill_auto, machines_for
from llmpipe_cli.plan.resolve import make_plan
from llmpipe_cli.recipe.schema import Recipe

SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
GPUS = Devices("cuda", 16, "NVIDIA A100-SXM4-80GB", 80 * GIB, by_node=(8, 8))


def recipe(**parallel: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "auto",
        "model": {"config": {"model_type": "llama", "vocab_size": 32000, **SMALL}, "dtype": "bf16"},
        "data": {"train": {"synthetic": True}, "sequence_len": 1024},
        "train": {"max_steps": 1, "global_batch_size": 64},
        "parallel": parallel,
    }
    return Recipe.model_validate(values)


def plan_on(devices: Devices, given: Recipe, folder: Path) -> Plan:
    cluster = cluster_of(devices)
    assert cluster is not None
    data = prepare(given, folder, folder / "cache")
    return make_plan(fill_auto(given, cluster), data, job="train", device=devices.kind, num_devices=devices.count)


def test_nodes_of_a_launcher() -> None:
    cluster = cluster_of(GPUS)
    assert cluster is not None
    assert [node.count for node in cluster.nodes] == [8, 8]
    assert (cluster.nodes[0].device.name, cluster.num_devices) == ("a100-80gb", 16)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_devices_that_are_not_known_from_here(kind: Any) -> None:
    """Under Slurm nobody knows the compute nodes' memory before the job runs."""
    assert cluster_of(Devices(kind, 8, "", 0, by_node=(4, 4))) is None


def test_auto_fields_become_a_plan(tmp_path: Path) -> None:
    plan = plan_on(GPUS, recipe(), tmp_path)
    assert plan.layout.num_ranks <= 16
    assert plan.micro_batch_size * plan.num_micro_batches * plan.layout.data == 64
    assert plan.partition[-1] == len(SlicePlan.from_json(plan.slice_plan).segments) >= 10
    machines = machines_for(plan, GPUS)
    assert machines is not None
    assert machines.num_devices == 16


def test_auto_fields_keep_what_the_recipe_fixes(tmp_path: Path) -> None:
    plan = plan_on(GPUS, recipe(pipeline=4, schedule="zb-h1", zero_stage=1), tmp_path)
    assert (plan.layout.pipeline, plan.schedule, plan.zero_stage) == (4, "zb-h1", 1)


def test_one_unknown_accelerator_gets_rates_of_a_common_one(tmp_path: Path) -> None:
    unheard = Devices("cuda", 1, "Unheard Of 3000", 24 * GIB)
    cluster = cluster_of(unheard)
    assert cluster is not None
    assert (cluster.nodes[0].device.name, cluster.nodes[0].device.memory_bytes) == ("Unheard Of 3000", 24 * GIB)
    assert plan_on(unheard, recipe(), tmp_path).layout.num_ranks == 1
