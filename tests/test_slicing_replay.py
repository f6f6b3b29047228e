"""What a stage keeps besides loss and gradients: dropout over cuts, checkpointing, dtypes, plans as JSON, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny_models import Outcome, Pipeline, assert_same, run_whole, tiny_config, tiny_inputs, tiny_model
from transformers import PreTrainedModel

from llmpipe_cli.errors import RankError, UsageError
from llmpipe_cli.model.auto import example_inputs, model_class
from llmpipe_cli.model.parity import check_split, splits_alike
from llmpipe_cli.model.slicing import SlicePlan, StageReplay, trace, trace_config, whole_plan
from llmpipe_cli.model.slicing.split import splittable
from llmpipe_cli.model.slicing.trace import NotSliceableError, trace_split
from llmpipe_cli.model.stage import build_stage


def make(model_type: str, task: str = "causal-lm", **changes: Any) -> tuple[PreTrainedModel, SlicePlan]:
    config = tiny_config(model_type, task, **changes)
    return tiny_model(config, task), trace_config(model_class(config, task), config, task, sequence_len=16)


def seeded_run(
    model: PreTrainedModel, plan: SlicePlan, cuts: list[int], inputs: dict[str, torch.Tensor], mode: str = "none"
) -> Outcome:
    pipeline = Pipeline(model, plan, cuts)
    torch.manual_seed(len(cuts))  # a layout has no say in the draws, whatever the generator's state
    for stage in pipeline.stages:
        stage.seed_fn = lambda index: torch.manual_seed(1000 + index)
        stage.set_checkpointing(mode)  # type: ignore[arg-type]
    return pipeline.run(inputs)


@pytest.mark.parametrize(
    ("task", "model_type"),
    [("causal-lm", "gpt2"), ("classification", "bert"), ("translation", "t5"), ("translation", "bart")],
)
def test_dropout_is_the_same_for_every_cut(task: str, model_type: str) -> None:
    model, plan = make(model_type, task, dropout=0.2)
    inputs = tiny_inputs(task)
    one_stage = seeded_run(model, plan, [], inputs)
    for cuts in ([1], [2, 4], list(range(1, plan.num_segments))):
        assert_same(seeded_run(model, plan, cuts, inputs), one_stage)
    without = run_whole(model.eval(), inputs)
    assert abs(float(without.loss - one_stage.loss)) > 1e-4, "dropout was not active"


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize(
    ("task", "model_type"),
    [
        ("causal-lm", "llama"),
        ("causal-lm", "gpt2"),
        ("causal-lm", "mixtral"),
        ("causal-lm", "gpt_oss"),
        ("causal-lm", "granitemoe"),
        ("causal-lm", "zamba2"),
        ("causal-lm", "mamba"),
        ("classification", "albert"),
        ("translation", "t5"),
        ("translation", "bart"),
    ],
)
def test_checkpointing_changes_nothing(task: str, model_type: str, mode: str) -> None:
    model, plan = make(model_type, task, dropout=0.1)
    inputs = tiny_inputs(task)
    for cuts in ([], [2, 4]):
        assert_same(seeded_run(model, plan, cuts, inputs, mode), seeded_run(model, plan, cuts, inputs))


def test_checkpointing_keeps_less() -> None:
    config = tiny_config("llama")
    plan = trace_config(model_class(config, "causal-lm"), config, "causal-lm")
    inputs = tiny_inputs("causal-lm", sequence_len=32)
    saved = {}
    for mode in ("none", "selective", "full"):
        model = build_stage(model_class(config, "causal-lm"), config, plan, range(3), seed=0)
        stage = StageReplay(model, plan, 0, 3)
        stage.set_checkpointing(mode)  # type: ignore[arg-type]
        sizes: list[int] = []

        def count(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            stage(None, inputs)
        saved[mode] = sum(sizes)
    assert saved["full"] < 0.5 * saved["none"]


def test_bf16_stage_runs() -> None:
    for model_type in ("llama", "gpt2", "gemma3_text", "mixtral"):
        config = tiny_config(model_type)
        cls = model_class(config, "causal-lm")
        plan = trace_config(cls, config, "causal-lm", sequence_len=16)
        middle, last = plan.num_segments // 2, plan.num_segments
        inputs = tiny_inputs("causal-lm")
        first = build_stage(cls, config, plan, range(middle), dtype=torch.bfloat16, seed=3)
        second = build_stage(cls, config, plan, range(middle, last), dtype=torch.bfloat16, seed=3)
        whole = build_stage(cls, config, plan, range(last), dtype=torch.bfloat16, seed=3)
        carry = StageReplay(first, plan, 0, middle)(None, inputs)
        assert all(tensor.dtype is torch.bfloat16 for tensor in carry if tensor.is_floating_point())
        output = StageReplay(second, plan, middle, last)(carry, inputs)
        assert output.logits.dtype is torch.bfloat16
        torch.testing.assert_close(output.loss, whole(**inputs, use_cache=False).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("task", "model_type"), [("causal-lm", "llama"), ("masked-lm", "bert")])
def test_logits_without_labels(task: str, model_type: str) -> None:
    model, plan = make(model_type, task)
    model.eval()
    inputs = tiny_inputs(task, sequence_len=9)
    del inputs["labels"]
    with torch.no_grad():
        expected = model(**inputs)
    found = Pipeline(model, plan, [1, 3]).forward(inputs)
    assert found.loss is None
    assert torch.equal(found.logits, expected.logits)


def test_two_stages_may_share_one_model() -> None:
    model, plan = make("gpt2")
    inputs = tiny_inputs("causal-lm")
    first, second = StageReplay(model, plan, 0, 2), StageReplay(model, plan, 2, plan.num_segments)
    output = second(first(None, inputs), inputs)
    torch.testing.assert_close(output.loss.detach(), run_whole(model, inputs).loss, rtol=1e-6, atol=0)


def test_plan_survives_json() -> None:
    for task, model_type in (("causal-lm", "gemma3n_text"), ("translation", "t5"), ("classification", "canine")):
        _, plan = make(model_type, task)
        assert SlicePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_plan_is_the_same_with_and_without_weights() -> None:
    for task, model_type in (("causal-lm", "llama"), ("causal-lm", "gemma3n_text"), ("translation", "t5")):
        model, from_config = make(model_type, task)
        from_model = trace(model, example_inputs(model.config, task, 2, 16))
        assert [segment.name for segment in from_model.segments] == [s.name for s in from_config.segments]
        assert from_model.boundaries == from_config.boundaries
        assert from_model.owners == from_config.owners


def test_segments_and_ties() -> None:
    _, plan = make("gpt2")
    assert [segment.kind for segment in plan.segments] == ["pre", "layer", "layer", "layer", "post"]
    assert plan.owners["transformer.wte.weight"] == [0, 4]
    assert plan.ties == {"transformer.wte.weight": ("lm_head.weight",)}
    assert plan.owners["transformer.wpe.weight"] == [0]
    assert plan.owners["transformer.ln_f.weight"] == [4]
    _, plan = make("t5", "translation")
    kinds = [segment.kind for segment in plan.segments]
    assert kinds == ["pre", "layer", "layer", "layer", "mid", "layer", "layer", "layer", "post"]
    # a decoder layer takes the hidden states, the encoder's result and two biases; the cross attention's is constant
    assert (plan.num_carried(6), len(plan.gradient_free(6))) == (4, 1)


def test_flops_follow_the_sequence() -> None:
    """A Llama layer: twice the weights of its products a token, and two products of attention a pair of tokens."""
    config = tiny_config("llama")
    plan = trace_config(model_class(config, "causal-lm"), config, "causal-lm", sequence_len=64)
    hidden, inner, keys, length = 32, 48, 16, 100
    weights = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    layer = 2 * weights * length + 2 * 2 * length**2 * hidden
    for found in plan.flops(length, batch=2)[1:-1]:
        assert found == pytest.approx(2 * layer, rel=1e-6)
    # Nothing but a lookup, and in some versions the rotary angles: an outer product of positions and half a head.
    assert plan.flops(length)[0] in (0, 2 * length * config.head_dim // 2)
    assert plan.flops(length)[-1] == pytest.approx(2 * hidden * config.vocab_size * length, rel=1e-6)


@pytest.mark.parametrize(
    ("task", "model_type", "changes", "largest"),
    [
        ("causal-lm", "llama", {}, ("self_attn", "mlp")),
        ("causal-lm", "qwen2", {"tie_word_embeddings": True}, ("self_attn", "mlp")),
        ("causal-lm", "gpt2", {}, ("attn", "mlp")),
        ("causal-lm", "mixtral", {"output_router_logits": True}, ("self_attn", "mlp")),
        ("masked-lm", "bert", {}, ("attention", "output")),
    ],
)
def test_a_cut_inside_a_layer(task: str, model_type: str, changes: dict[str, Any], largest: tuple[str, str]) -> None:
    """Between attention and MLP one tensor crosses; all costs and parameters stay those of the whole layer."""
    model, whole = make(model_type, task, **changes)
    layers = splittable(whole)
    assert len(layers) == 2, "the last of three layers is not split"
    for chosen in (layers, layers[1:]):
        plan = trace_split(type(model), model.config, task, whole, chosen, sequence_len=16)
        assert plan is not None
        assert plan.split == chosen
        parts = [(i, name) for i, s in enumerate(plan.segments) for name in chosen if s.name.startswith(f"{name}.")]
        assert [plan.segments[i].name for i, _ in parts] == [f"{name}.{part}" for name in chosen for part in largest]
        for boundary in range(1, plan.num_segments):
            assert plan.carried_elements_per_token(boundary) <= max(
                whole.carried_elements_per_token(b) for b in range(1, whole.num_segments)
            )
        for length in (16, 500):
            for layer in chosen:
                own = [whole.flops(length)[i] for i, s in enumerate(whole.segments) if s.name == layer]
                found = sum(plan.flops(length)[i] for i, name in parts if name == layer)
                assert found == pytest.approx(own[0], rel=1e-6)
        assert sum(s.num_parameters for s in plan.segments) == sum(s.num_parameters for s in whole.segments)
        assert SlicePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        inputs = tiny_inputs(task, batch=3)
        expected = run_whole(model, inputs)
        for cuts in ([parts[1][0]], [1, parts[-1][0]], list(range(1, plan.num_segments))):
            assert_same(Pipeline(model, plan, cuts).run(inputs), expected)


def test_layers_that_stay_whole() -> None:
    """Attention and MLP side by side; a choice of adapters between them; random draws, which are seeded by segment."""
    model, whole = make("gpt_neox")
    assert trace_split(type(model), model.config, "causal-lm", whole, splittable(whole)) is None
    assert splittable(make("albert", "masked-lm")[1]) == ()
    assert check_split("xmod", "causal-lm").status == "differs"
    assert not splits_alike(tiny_config("xmod"), "causal-lm")
    assert splits_alike(tiny_config("llama"), "chat")
    assert not make("gpt2")[1].random
    assert make("gpt2", dropout=0.1)[1].random
    assert make("phimoe")[1].random, "noise in its router"


def test_flops_count_only_chosen_experts() -> None:
    dense = make("mixtral", num_local_experts=4, num_experts_per_tok=1)[1].flops(64)[1]
    double = make("mixtral", num_local_experts=4, num_experts_per_tok=2)[1].flops(64)[1]
    expert = 2 * 3 * 32 * 48 * 64
    assert double - dense == pytest.approx(expert, rel=1e-6)


def test_large_config_is_traced_without_its_size() -> None:
    """70 billion parameters: tracing knows them all and allocates next to nothing."""
    import resource

    changes = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    }
    config = tiny_config("llama", **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = trace_config(model_class(config, "causal-lm"), config, "causal-lm", sequence_len=64)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert sum(segment.num_parameters for segment in plan.segments) == 70553706496
    assert plan.num_segments == 82
    assert grown_kib < 2**20, "a gibibyte for a model of 262"


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("reformer", {}, "ReformerOutput"),
        ("hrm_text", {}, "without gradient"),
        ("squeezebert", {}, "never calls the layers"),
    ],
)
def test_unsliceable_models_are_refused_by_name(model_type: str, changes: dict[str, Any], reason: str) -> None:
    if model_type == "reformer":
        changes = {
            "axial_pos_embds": False,
            "attn_layers": ["local", "local"],
            "local_attn_chunk_length": 4,
            "feed_forward_size": 48,
            "attention_head_size": 8,
        }
    task = "masked-lm" if model_type == "squeezebert" else "causal-lm"
    config = tiny_config(model_type, task, **changes)
    with pytest.raises(UsageError, match=reason) as caught:
        trace_config(model_class(config, task), config, task)
    assert f"({model_type})" in caught.value.message
    assert isinstance(caught.value, NotSliceableError)


SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize(
    ("model_type", "changes", "what"),
    [
        ("mixtral", {"output_router_logits": True}, "@captured"),
        ("jamba", {"output_router_logits": True}, "@captured"),
        ("gemma3n_text", SHARED, "@argument"),
        ("gemma4_text", SHARED, "@argument"),
    ],
)
def test_what_layers_leave_behind_crosses_stages(
    model_type: str, changes: dict[str, Any], what: str, mode: str
) -> None:
    """Router logits for the auxiliary loss, keys and values for later layers: no layer's result."""
    model, plan = make(model_type, **changes)
    inputs = tiny_inputs("causal-lm", batch=3)
    expected = run_whole(model, inputs)
    assert any(side.path[0] == what for side in plan.sides if side.path)
    for cuts in ([], [2], [2, 4], list(range(1, plan.num_segments))):
        assert_same(seeded_run(model, plan, cuts, inputs, mode), expected)
    assert SlicePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_shared_keys_and_values_matter() -> None:
    """The comparison above would see a layer that kept keys and values of its own."""
    inputs = tiny_inputs("causal-lm")
    shared, own = (run_whole(make("gemma4_text", **SHARED | {"num_kv_shared_layers": n})[0], inputs) for n in (2, 0))
    assert shared.gradients.keys() != own.gradients.keys()


def test_a_model_that_is_not_cut_runs_on_one_stage() -> None:
    config = tiny_config("mixtral", output_router_logits=True)
    model = tiny_model(config, "causal-lm")
    plan = whole_plan(type(model), config)
    inputs = tiny_inputs("causal-lm")
    expected = run_whole(model, inputs)
    assert_same(Pipeline(model, plan, []).run(inputs), expected)
    assert plan.owners.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("task", "model_type", "positions"),
    [
        ("causal-lm", "gpt2", 64),
        ("masked-lm", "roberta", 63),
        ("translation", "bart", 64),
        ("translation", "marian", 64),
    ],
)
def test_sequences_beyond_the_table_of_positions_are_refused(task: str, model_type: str, positions: int) -> None:
    config = tiny_config(model_type, task)
    trace_config(model_class(config, task), config, task, sequence_len=positions)
    with pytest.raises(UsageError, match=f"{positions + 1} tokens are longer than the model's {positions} positions"):
        trace_config(model_class(config, task), config, task, sequence_len=positions + 1)


def test_another_order_of_layers_is_an_error() -> None:
    model, plan = make("llama")
    stage = StageReplay(model, plan, 0, plan.num_segments)
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    with pytest.raises(RankError, match="another order"):
        stage(None, tiny_inputs("causal-lm"))
