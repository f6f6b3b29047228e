"""Tiny random models of many architectures, and a pipeline of independent stages in one process.

A stage built here holds what a rank would hold: the skeleton on meta with copies of its own parameters only. Values
cross the boundaries detached and gradients are handed back by hand, as between processes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from llmpipe_cli.model.auto import model_class
from llmpipe_cli.model.initialise import initialise
from llmpipe_cli.model.skeleton import all_names, build_skeleton, replace_parameter
from llmpipe_cli.model.slicing import SlicePlan, StageReplay
from llmpipe_cli.model.slicing.forward import forward_options
from llmpipe_cli.model.stage import make_real, stage_parameters

VOCAB_SIZE = 96
NUM_LABELS = 3

_WIDTH = dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "embed_dim"], 32)
_INNER = dict.fromkeys(
    ["intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner", "d_ff", "dff", "n_inner"], 48
)
_LAYERS = dict.fromkeys(
    [
        "num_hidden_layers",
        "n_layer",
        "num_layers",
        "n_layers",
        "encoder_layers",
        "decoder_layers",
        "num_decoder_layers",
    ],
    3,
)
_HEADS = dict.fromkeys(
    ["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"], 4
)
_POSITIONS = dict.fromkeys(
    ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "max_sequence_length"], 64
)
_EXPERTS = {
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"], 1),
}
_SPECIAL = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "mask_token_id": 3,
}
_OTHER = {
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "attention_head_dim": 8,
    "v_head_dim": 8,
    "word_embed_proj_dim": 32,
    "vocab_size": VOCAB_SIZE,
    "n_words": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "sliding_window": 8,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "chunk_size": 8,
    "lru_width": 32,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "layerdrop": 0.0,
}
_SIZES: dict[str, Any] = {
    **_WIDTH, **_INNER, **_LAYERS, **_HEADS, **_POSITIONS, **_EXPERTS, **_SPECIAL, **_OTHER
}  # fmt: skip
_SPECIFIC: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "mamba2": {"num_heads": 8},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "num_mem_blocks": 1,
    },
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "roc_bert": {
        "pronunciation_vocab_size": 64,
        "shape_vocab_size": 64,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
}


def tiny_config(model_type: str, task: str = "causal-lm", *, dropout: float = 0.0, **changes: Any) -> PreTrainedConfig:
    """A config of `model_type` with widths of 32, 3 or 4 layers and every dropout set to `dropout`."""
    cls = CONFIG_MAPPING[model_type]
    defaults = {field.name: field.default for field in fields(cls)}
    values = {name: value for name, value in _SIZES.items() if name in defaults}
    for name, default in defaults.items():
        if "drop" in name and "layerdrop" not in name and type(default) in (int, float):
            values[name] = dropout
    if task in ("causal-lm", "chat") and defaults.get("is_decoder") is False:
        values["is_decoder"] = True
    if task == "classification":
        values |= {"num_labels": NUM_LABELS, "problem_type": "single_label_classification"}
    config = cls(**(values | _SPECIFIC.get(model_type, {}) | changes))
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    return config


def tiny_inputs(task: str, *, batch: int = 2, sequence_len: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Random ids with three positions of padding at the end of the second sample, and labels."""
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> Tensor:
        return torch.randint(10, VOCAB_SIZE, shape, generator=generator)

    input_ids = ids(batch, sequence_len)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -3:] = 0
    if task == "classification":
        labels = torch.randint(0, NUM_LABELS, (batch,), generator=generator)
    elif task == "translation":
        labels = ids(batch, sequence_len - 2)
    else:
        labels = input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def tiny_model(config: PreTrainedConfig, task: str, seed: int = 0) -> PreTrainedModel:
    """The whole model with real weights, in training mode."""
    model = build_skeleton(model_class(config, task), config)
    groups = all_names(model)
    for names in groups.values():
        make_real(model, names, "cpu")
    initialise(model, groups, seed)
    return model


@dataclass
class Outcome:
    """Loss, logits and gradients by parameter name of one forward and backward pass."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]


def run_whole(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Outcome:
    """Forward and backward of the undivided model, as transformers does it."""
    model.zero_grad(set_to_none=True)
    output = model(**inputs, **forward_options(model, inputs))
    output.loss.backward()
    return Outcome(output.loss.detach(), output.logits.detach(), _gradients([model]))


class Pipeline:
    """Independent stages of `model`, cut before the segments `cuts`."""

    def __init__(self, model: PreTrainedModel, plan: SlicePlan, cuts: list[int]) -> None:
        self.plan = plan
        bounds = [0, *cuts, plan.num_segments]
        self.models = [copy_stage(model, plan, start, stop) for start, stop in pairwise(bounds)]
        self.stages = [
            StageReplay(stage, plan, start, stop)
            for stage, start, stop in zip(self.models, bounds, bounds[1:], strict=False)
        ]

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        """The last stage's output, without gradients."""
        carry = None
        with torch.no_grad():
            for stage in self.stages:
                carry = stage(carry, inputs)
        return carry

    def run(self, inputs: dict[str, Tensor]) -> Outcome:
        """Forward and backward over all stages."""
        received: list[tuple[Tensor, ...]] = []
        sent: list[Any] = []
        for stage in self.stages:
            carry = self._receive(stage.start, sent[-1]) if sent else None
            received.append(carry or ())
            sent.append(stage(carry, inputs))
        output = sent[-1]
        output.loss.backward()
        for index in range(len(self.stages) - 2, -1, -1):
            pairs = [(t, r.grad) for t, r in zip(sent[index], received[index + 1], strict=True) if r.requires_grad]
            assert all(gradient is not None for _, gradient in pairs), "a carried tensor got no gradient"
            torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
        return Outcome(output.loss.detach(), output.logits.detach(), _gradients(self.models))

    def _receive(self, boundary: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        without = self.plan.gradient_free(boundary)
        assert len(tensors) == self.plan.num_carried(boundary)
        assert all(tensor.is_contiguous() for tensor in tensors)
        return tuple(t.detach().clone().requires_grad_(i not in without) for i, t in enumerate(tensors))


def copy_stage(model: PreTrainedModel, plan: SlicePlan, start: int, stop: int) -> PreTrainedModel:
    """A skeleton with copies of `model`'s parameters of segments [start, stop), the rest on meta."""
    stage = build_skeleton(type(model), model.config, dtype=next(model.parameters()).dtype)
    groups = all_names(stage)
    for name in [*stage_parameters(plan, range(start, stop)), *plan.replicated]:
        replace_parameter(stage, groups[name], nn.Parameter(model.get_parameter(name).detach().clone()))
    return stage.train(model.training)


def _gradients(models: list[PreTrainedModel]) -> dict[str, Tensor]:
    """Sum of all stages' gradients by parameter name."""
    gradients: dict[str, Tensor] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = gradients[name] + parameter.grad if name in gradients else parameter.grad.clone()
    return gradients


def assert_same(found: Outcome, expected: Outcome) -> None:
    """Loss to 1e-6 relative, each gradient to 1e-5 of its largest element.

    Gradients that are zero up to rounding (the bias of attention keys) are compared against the largest of all.
    """
    assert torch.isfinite(expected.loss)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    sizes = {name: float(gradient.abs().amax()) for name, gradient in expected.gradients.items() if gradient.numel()}
    floor = 1e-6 * max(sizes.values())
    for name, size in sizes.items():
        assert name in found.gradients or size == 0, f"no gradient for {name}"
        if name in found.gradients:
            difference = float((found.gradients[name] - expected.gradients[name]).abs().amax())
            assert difference <= 1e-5 * max(size, floor), f"{name}: {difference} of {size}"
