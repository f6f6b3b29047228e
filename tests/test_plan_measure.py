"""Profiles from modules on meta against real models on the processor: operations, parameters, what autograd keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llmpipe_cli.model.auto import example_inputs, load_config, model_class
from llmpipe_cli.model.slicing.trace import trace_config
from llmpipe_cli.plan.measure import measure_profile
from llmpipe_cli.plan.recipe_model import recipe_profile
from llmpipe_cli.recipe.schema import ModelSection, Recipe

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "causal-lm",
        {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 500, "max_position_embeddings": 256, "tie_word_embeddings": True},
    ),
    "gpt2": ("causal-lm", {"n_embd": 64, "n_head": 4, "n_layer": 3, "vocab_size": 500, "n_positions": 256}),
    "bert": (
        "masked-lm",
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 500, "max_position_embeddings": 256},
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", CASES)
def test_profile_of_real_modules(model_type: str) -> None:
    task, fields = CASES[model_type]
    section = ModelSection(config={"model_type": model_type, **fields}, dropout=0.0)
    config = load_config(section, task)
    cls = model_class(config, task)
    slice_plan = trace_config(cls, config, task, sequence_len=128)
    profile = measure_profile(cls, config, task, slice_plan, dtype="fp32")

    model = cls(config).train()
    batch, length = 3, 80
    kept: dict[int, Any] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**example_inputs(config, task, batch, length))
    tokens = batch * length
    assert profile.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    # torch's counter knows no fused attention of processors: two products of length x hidden a token and layer
    attention = 4 * tokens * length * 64 * sum(segment.kind == "layer" for segment in profile.segments)
    assert profile.flops(tokens, length) == pytest.approx(counter.get_total_flops() + attention, rel=1e-6)
    saved = sum(segment.saved.bytes(tokens, length, 1) for segment in profile.segments)
    assert saved == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.07)
    layers = [segment for segment in profile.segments if segment.kind == "layer"]
    assert all(segment.carried == 64 * 4 for segment in layers)
    assert all(segment.attentions[0].heads == 4 and segment.attentions[0].head_dim == 16 for segment in layers)
    # tensor shards divide the matrices of a layer, and keep its norms and biases' vectors whole
    matrices = sum(p.numel() for name, p in model.named_parameters() if name.startswith(layers[0].name) and p.dim() > 1)
    assert layers[0].cut_parameters == matrices


def test_frozen_parameters_need_no_gradients() -> None:
    task, fields = CASES["llama"]
    config = load_config(ModelSection(config={"model_type": "llama", **fields}), task)
    cls = model_class(config, task)
    slice_plan = trace_config(cls, config, task, sequence_len=128)
    learning = [name for name in slice_plan.owners if "layers.2." in name]
    profile = measure_profile(cls, config, task, slice_plan, dtype="bf16", trainable=learning)
    assert [segment.learning_on(1) > 0 for segment in profile.segments] == [False, False, False, True, False]


def test_deep_models_are_measured_with_few_layers() -> None:
    """As exactly as whole ones, where layers are alike."""
    task, fields = CASES["llama"]
    fields = {**fields, "num_hidden_layers": 26}
    recipe = Recipe.model_validate(
        {"name": "deep", "model": {"config": {"model_type": "llama", **fields}}, "data": {"sequence_len": 128}}
    )
    config = load_config(recipe.model, task)
    cls = model_class(config, task)
    slice_plan = trace_config(cls, config, task, sequence_len=128)
    whole = measure_profile(cls, config, task, slice_plan, dtype="fp32")
    stretched = recipe_profile(recipe)
    assert len(stretched.segments) == len(whole.segments) == 28
    assert [replace(one, name="") for one in stretched.segments] == [replace(one, name="") for one in whole.segments]
    assert stretched.num_parameters == whole.num_parameters
