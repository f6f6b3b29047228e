"""Tiny configs of any architecture: the same code paths as the real model, in a few thousand weights.

transformers' config classes name their sizes in a limited vocabulary (`hidden_size`, `d_model`, `n_embd` ...). Every
field whose name says that it is a size gets a small value that fits the others, also in configs inside (`text_config`).
The few architectures whose fields must fit in another way are listed. Flags and kinds stay as they are by default.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from llmpipe_cli.model.auto import own_config

VOCAB_SIZE = 96
NUM_LABELS = 3
NUM_LAYERS = 3

_WIDTH = dict.fromkeys(
    ["hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "embed_dim", "n_embed", "dim_model"], 32
)
_INNER = dict.fromkeys(
    [
        "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner", "d_ff", "dff", "n_inner",
        "dim_ff", "ffn_hidden_size", "feed_forward_size", "intermediate_size_mlp", "dense_intermediate_size",
        "shared_intermediate_size",
    ],
    48,
)  # fmt: skip
_LAYERS = dict.fromkeys(
    [
        "num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers",
        "num_encoder_layers", "num_decoder_layers",
    ],
    NUM_LAYERS,
)  # fmt: skip
_HEADS = dict.fromkeys(
    [
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "num_encoder_attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads",
    ],
    4,
)  # fmt: skip
_POSITIONS = dict.fromkeys(
    [
        "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "max_sequence_length",
        "max_source_positions", "max_target_positions", "seq_length",
    ],
    64,
)  # fmt: skip
_EXPERTS = {
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(
        [
            "moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
        ],
        16,
    ),
    **dict.fromkeys(
        [
            "n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "moe_num_shared_experts",
            "num_shared_experts", "zero_expert_num", "num_expert_groups", "num_limited_groups", "num_expert_group",
            "moe_layer_start_index", "num_dense_layers",
        ],
        1,
    ),
}  # fmt: skip
_SPECIAL = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "mask_token_id": 3,
    "image_token_id": 5,
    "image_token_index": 5,
    "audio_token_id": 6,
    "audio_token_index": 6,
    "video_token_id": 7,
    "video_token_index": 7,
    "boi_token_id": 8,
    "eoi_token_id": 9,
}
_RECURRENT = {
    **dict.fromkeys(
        [
            "state_size", "mamba_d_state", "ssm_state_size", "mamba_n_heads", "mamba_d_head", "mamba_num_heads",
            "mamba_head_dim", "chunk_size", "mamba_chunk_size",
        ],
        8,
    ),
    **dict.fromkeys(["mamba_n_groups", "n_groups", "mamba_ngroups"], 1),
    **dict.fromkeys(["mamba_dt_rank", "time_step_rank"], 4),
    "mamba_d_ssm": 64,
    "lru_width": 32,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 2,
}  # fmt: skip
_OTHER = {
    **dict.fromkeys(
        [
            "head_dim", "d_kv", "attention_head_dim", "attention_head_size", "dim_head", "v_head_dim", "swa_head_dim",
            "swa_v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "global_head_dim", "laurel_rank",
            "hidden_size_per_layer_input", "sliding_window", "sliding_window_size", "attention_chunk_size",
            "window_size", "local_attention", "attention_window_size",
        ],
        8,
    ),
    **dict.fromkeys(
        ["num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_global_key_value_heads"], 2
    ),
    **dict.fromkeys(["vocab_size", "n_words", "vocab_size_per_layer_input", "decoder_vocab_size"], VOCAB_SIZE),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "qk_head_dim", "index_head_dim"], 16),
    "word_embed_proj_dim": 32,
    "index_n_heads": 2,
    "index_topk": 8,
    "o_lora_rank": 8,
    "o_groups": 2,
    "num_kv_shared_layers": 0,
    **dict.fromkeys(
        ["router_jitter_noise", "input_jitter_noise", "encoder_layerdrop", "decoder_layerdrop", "layerdrop"], 0.0
    ),
    **dict.fromkeys(["num_nextn_predict_layers", "mtp_num_hidden_layers"], 0),
}  # fmt: skip
_VISION = {
    "image_size": 32,
    "patch_size": 8,
    "depth": 2,
    "out_hidden_size": 32,
    "projection_dim": 32,
    "vision_output_dim": 32,
    "mm_tokens_per_image": 16,
}
"""Towers that text alone never enters; they need only be small."""
_SIZES: dict[str, Any] = {
    **_WIDTH, **_INNER, **_LAYERS, **_HEADS, **_POSITIONS, **_EXPERTS, **_SPECIAL, **_RECURRENT, **_VISION, **_OTHER
}  # fmt: skip
_HEADS_NOT_GROUPED = [
    "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "esmc", "glm4_moe_lite",
    "glm_moe_dsa", "longcat_flash", "minicpm3", "mistral4", "youtu",
]  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SPECIFIC: dict[str, dict[str, Any]] = {
    **{name: {"num_key_value_heads": 4} for name in _HEADS_NOT_GROUPED},
    "blt": {"encoder_hash_byte_group_vocab": 32},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "rope_parameters": _ROPE,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "encoder-decoder": {
        "encoder": {"model_type": "bert"},
        "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
    },
    "fsmt": {"langs": ["en", "de"], "src_vocab_size": VOCAB_SIZE, "tgt_vocab_size": VOCAB_SIZE},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 1},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 8},
    "mamba2": {"num_heads": 8},
    "markuplm": {"max_depth": 4, "xpath_unit_hidden_size": 8},
    "perceiver": {
        "num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 3, "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
    },
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 4,
        "feed_forward_size": 48,
        "attention_head_size": 8,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 64,
        "shape_vocab_size": 64,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "num_mem_blocks": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
_UNSET_BY_DEFAULT = {"q_lora_rank", "n_inner", "cross_attention_hidden_size"}
"""Fields whose default of None selects another way of computing."""


def tiny_config(model_type: str, task: str = "causal-lm", *, dropout: float = 0.0, **changes: Any) -> PreTrainedConfig:
    """A config of `model_type` with widths of 32, 3 or 4 layers and every dropout set to `dropout`.

    Args:
        model_type: a type that transformers registers.
        task: the recipe's task; decides about labels and about causal attention.
        changes: fields with other values.

    Raises:
        Exception: whatever the config class raises at values that it does not accept.
    """
    cls = CONFIG_MAPPING[model_type]
    values = _values(cls, dropout)
    if task in ("causal-lm", "chat") and _defaults(cls).get("is_decoder") is False:
        values["is_decoder"] = True
    if task == "classification":
        values |= {"num_labels": NUM_LABELS, "problem_type": "single_label_classification"}
    elif task == "token-classification":
        # decoders' token classification takes this from the config, and 0.1 where it has none
        values |= {"num_labels": NUM_LABELS, "classifier_dropout": dropout}
    config = own_config(cls(**(values | changes)), task)
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    return config


def _values(cls: type[PreTrainedConfig], dropout: float) -> dict[str, Any]:
    """Values of the fields of one config class and of the configs inside it."""
    defaults = _defaults(cls)
    values = {
        name: value
        for name, value in _SIZES.items()
        if name in defaults and not (defaults[name] is None and name in _UNSET_BY_DEFAULT)
    }
    for name, default in defaults.items():
        if "drop" in name and "layerdrop" not in name and type(default) in (int, float):
            values[name] = type(default)(dropout)
    values |= _SPECIFIC.get(cls.model_type, {})
    for name, inner in _inner_classes(cls, values).items():
        values[name] = {"model_type": inner.model_type, **_values(inner, dropout), **values.get(name, {})}
    return values


def _inner_classes(cls: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, type[PreTrainedConfig]]:
    """Classes of the configs inside a config: those that it names, else those that it holds by default."""
    declared: dict[str, type[Any]] = getattr(cls, "sub_configs", None) or {}
    found: dict[str, type[PreTrainedConfig]] = {}
    default = None
    for name, inner in declared.items():
        if inner is not AutoConfig:
            found[name] = inner
        elif "model_type" in values.get(name, {}):
            found[name] = CONFIG_MAPPING[values[name]["model_type"]]
        else:
            default = default or cls()
            if isinstance(getattr(default, name, None), PreTrainedConfig):
                found[name] = type(getattr(default, name))
    return found


def _defaults(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    return {field.name: None if field.default is MISSING else field.default for field in fields(cls)}
