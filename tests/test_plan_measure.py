"""Profiles from modules on meta against real models on the processor: operations, parameters, what autograd keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.auto import example_inputs, load_config, model_class
from llmpipe_cli.model.slicing.trace import trace_config
from llmpipe_cli.plan.cuts import splitter
from llmpipe_cli.plan.measure import measure_profile
from llmpipe_cli.plan.plan import Layout
from llmpipe_cli.plan.profile import ModelProfile, SegmentProfile
from llmpipe_cli.plan.recipe_model import recipe_model
from llmpipe_cli.plan.stand_in import stand_in, whole_model
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


LAYERS = {
    "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500,
    "max_position_embeddings": 256, "dtype": "float32",
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


def test_experts_and_wide_heads_are_counted() -> None:
    """Operations as the slice plan counts them (Jiang et al. 2024: two experts of eight take part in each token)."""
    mixtral = {**LAYERS, "model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 8}
    gemma2 = {**LAYERS, "model_type": "gemma2", "num_hidden_layers": 2, "head_dim": 256, "attn_implementation": "eager"}
    for fields in (mixtral, gemma2):
        attention = str(fields.pop("attn_implementation", "auto"))
        config = load_config(ModelSection(config=fields), "causal-lm")
        cls = model_class(config, "causal-lm")
        plan = trace_config(cls, config, "causal-lm", sequence_len=128, attn_implementation=attention)
        profile = measure_profile(cls, config, "causal-lm", plan, dtype="bf16", attn_implementation=attention)
        assert profile.flops(256, 128) == pytest.approx(sum(plan.flops(128, batch=2)), rel=1e-3)
        layer = profile.segments[1]
        if fields is mixtral:
            experts = [product for product in layer.products if product.count == 8]
            assert sorted((one.inner, one.outer, one.rows) for one in experts) == [(64, 320, 0.25), (160, 64, 0.25)]
        else:
            assert [(one.head_dim, one.fused) for one in layer.attentions] == [(256, False)]


def test_frozen_parameters_need_no_gradients() -> None:
    task, fields = CASES["llama"]
    config = load_config(ModelSection(config={"model_type": "llama", **fields}), task)
    cls = model_class(config, task)
    slice_plan = trace_config(cls, config, task, sequence_len=128)
    learning = [name for name in slice_plan.owners if "layers.2." in name]
    profile = measure_profile(cls, config, task, slice_plan, dtype="bf16", trainable=learning)
    assert [segment.learning_on(1) > 0 for segment in profile.segments] == [False, False, False, True, False]


GEMMA3 = {**LAYERS, "head_dim": 16, "sliding_window": 64}
DEEPSEEK = {
    **LAYERS, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "first_k_dense_replace": 3, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "n_group": 1, "topk_group": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "fields", "depth", "few"),
    [
        ("llama", LAYERS, 16, 6),
        ("gemma2", GEMMA3, 14, 6),  # one layer of two sees a window
        ("gemma3_text", GEMMA3, 22, 8),  # five of six do
        ("deepseek_v3", DEEPSEEK, 12, 6),  # the first three have no experts
    ],
)
def test_deep_models_are_measured_with_few_layers(
    model_type: str, fields: dict[str, Any], depth: int, few: int
) -> None:
    """As exactly as whole ones: whole layers, and layers that are split."""
    fields = {**fields, "model_type": model_type, "num_hidden_layers": depth}
    recipe = Recipe.model_validate(
        {
            "name": "deep",
            "model": {"config": fields},
            "data": {"sequence_len": 128},
            "parallel": {"pipeline": 4, "tensor": 1},
        }
    )
    model = recipe_model(recipe)
    short, whole = stand_in(model, "cuda"), whole_model(model, "cuda")
    assert short.few.config.num_hidden_layers == few
    assert short.names == whole.names
    assert len(short.names) == depth + 2
    assert unnamed(short.profile) == unnamed(whole.profile)
    assert short.profile.num_parameters == whole.profile.num_parameters

    wanted = (3, 7, depth - 1)  # the segment 0 is the embedding
    layout = Layout(pipeline=4, tensor=1, data=1)
    finer = []
    for one in (short, whole):
        split = splitter(recipe, "train", layout, one.few.cls, one.few.config, *one.few.sliced)
        assert split is not None
        finer.append(one.split(wanted, split))
    assert (finer[0] is None) == (finer[1] is None)
    if finer[0] is not None and finer[1] is not None:
        assert finer[0][1] == finer[1][1] == tuple(sorted(short.names[index] for index in wanted))
        assert unnamed(finer[0][0]) == unnamed(finer[1][0])
        assert len(finer[0][0].segments) > depth + 2


def test_both_stacks_of_a_deep_model_are_shortened() -> None:
    fields = {
        "model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 14,
        "num_decoder_layers": 12, "vocab_size": 500,
    }  # fmt: skip
    given = {"name": "deep", "task": "translation", "model": {"config": fields}, "data": {"sequence_len": 128}}
    model = recipe_model(Recipe.model_validate(given))
    short, whole = stand_in(model, "cuda"), whole_model(model, "cuda")
    assert (short.few.config.num_layers, short.few.config.num_decoder_layers) == (6, 6)
    assert short.names == whole.names
    assert len(whole.names) == 14 + 12 + 3
    assert unnamed(short.profile) == unnamed(whole.profile)


def test_sequences_longer_than_the_positions_of_a_deep_model_are_refused() -> None:
    fields = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 30, "vocab_size": 500, "n_positions": 256}
    recipe = Recipe.model_validate({"name": "deep", "model": {"config": fields}, "data": {"sequence_len": 512}})
    with pytest.raises(UsageError, match="512 tokens are longer"):
        stand_in(recipe_model(recipe), "cuda")


def unnamed(profile: ModelProfile) -> list[SegmentProfile]:
    return [replace(segment, name="") for segment in profile.segments]


def test_layers_that_differ_without_a_pattern_are_all_measured() -> None:
    fields = {**LAYERS, "model_type": "qwen3", "num_hidden_layers": 14, "use_sliding_window": True, "head_dim": 16}
    kinds = ["full_attention"] * 14
    kinds[9] = "sliding_attention"
    recipe = Recipe.model_validate(
        {"name": "deep", "model": {"config": {**fields, "layer_types": kinds}}, "data": {"sequence_len": 128}}
    )
    assert stand_in(recipe_model(recipe), "cuda").few.config.num_hidden_layers == 12  # to the second one behind it
