"""The schedule and the cut that a recipe gets when it leaves both open."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest

from llmpipe_cli.data.prepare import prepare
from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.plan.plan import Plan
from llmpipe_cli.plan.resolve import make_plan
from llmpipe_cli.recipe.schema import Recipe

LLAMA = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8,
    "num_attention_heads": 4,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 4096, "n_embd": 256, "n_layer": 8, "n_head": 4}


def _plan(folder: Path, config: dict[str, Any], roomy: bool = True, **parallel: Any) -> Plan:
    recipe = Recipe.model_validate(
        {
            "name": "cut",
            "model": {"config": config},
            "data": {"train": {"synthetic": True}, "sequence_len": 256},
            "train": {"max_steps": 1, "global_batch_size": 16, "micro_batch_size": 2},
            "parallel": {"pipeline": 2, **parallel},
        }
    )
    data = prepare(recipe, folder, folder / "cache")
    return make_plan(recipe, data, device="cpu", num_devices=2, roomy=roomy)


def _stage_costs(plan: Plan) -> list[float]:
    """Forward operations of each stage, over those of a layer."""
    pieces = SlicePlan.from_json(plan.slice_plan)
    costs = pieces.flops(256)
    layer = next(cost for cost, piece in zip(costs, pieces.segments, strict=True) if piece.name == "model.layers.0")
    stages = [0.0] * plan.layout.pipeline
    for part, (start, stop) in enumerate(itertools.pairwise(plan.partition)):
        stages[plan.placement.owner(part)[0]] += sum(costs[start:stop]) / layer
    return stages


def test_a_cut_inside_a_layer_evens_the_stages(tmp_path: Path) -> None:
    """Eight layers and a head of 1.12: whole layers make 5 and 4.12, ZB-V with one cut inside comes near 4.56 each."""
    plan = _plan(tmp_path, LLAMA)
    assert plan.schedule == "zb-v"
    assert len(SlicePlan.from_json(plan.slice_plan).cut_inside(plan.partition)) == 1
    assert _stage_costs(plan) == pytest.approx([4.54, 4.58], abs=0.01)
    whole = _plan(tmp_path, LLAMA, split_layers=False)
    assert (whole.schedule, list(whole.slice_plan["split"])) == ("zb-h2", [])
    assert _stage_costs(whole) == pytest.approx([5.0, 4.12], abs=0.01)


def test_a_named_schedule_stays(tmp_path: Path) -> None:
    for schedule in ("zb-h1", "interleaved"):
        assert _plan(tmp_path, LLAMA, schedule=schedule).schedule == schedule


def test_deep_models_are_cut_between_layers(tmp_path: Path) -> None:
    plan = _plan(tmp_path, LLAMA | {"num_hidden_layers": 32})
    assert (plan.schedule, list(plan.slice_plan["split"])) == ("zb-h2", [])


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["dropout", "partition"])
def test_layers_that_stay_whole_say_why_only_if_asked(
    config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parallel = {} if config is GPT2 else {"partition": [5, 5]}
    with caplog.at_level(logging.WARNING):
        assert not _plan(tmp_path, config, **parallel).slice_plan["split"]
        assert "layers stay whole" not in caplog.text
        _plan(tmp_path, config, split_layers="auto", **parallel)
        assert "layers stay whole" in caplog.text
