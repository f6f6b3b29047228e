"""Which layers of a model are divided, and how.

transformers carries plans for many types (`base_model_tp_plan`); those that were compared with the undivided model are
followed. For common types without one, ours are here. A plan
maps names of modules or parameters to styles, in transformers' words:

    colwise                         a linear layer divided by columns (its outputs); what follows it works on the part
    rowwise                         divided by rows (its inputs); its results are summed over the shards
    packed_colwise, packed_rowwise  the same for two matrices in one (gate and up)
    colwise_gather_output           divided by columns, the parts of its result joined at once
    rowwise_split_input             divided by rows, for an input that every shard has whole
    moe_tp_experts                  experts whose matrices are divided: results are summed over the shards
    replicated_with_grad_allreduce  whole weights that see a part of the heads: gradients are summed over the shards
    mla_kv_a_proj                   a projection whose last columns go to all heads directly, undivided
    replicate                       whole everywhere

and two of ours:

    packed_colwise_3                queries, keys and values in one matrix, one after the other (GPT-2)
    head_table                      an embedding with one column a head (T5's relative positions)
"""

from __future__ import annotations

import re

from transformers import PreTrainedModel

SUPPORTED_STYLES = {
    "colwise", "rowwise", "packed_colwise", "packed_colwise_3", "packed_rowwise", "colwise_gather_output",
    "colwise_rep", "rowwise_split_input", "rowwise_rep", "moe_tp_experts", "replicated_with_grad_allreduce",
    "mla_kv_a_proj", "replicate", "head_table",
}  # fmt: skip
# The vocabulary is divided wherever the model allows it, whatever its plan says.
VOCABULARY_STYLES = {"embedding_rowwise"}

_BERT = {
    "attention.self.query": "colwise",
    "attention.self.key": "colwise",
    "attention.self.value": "colwise",
    "crossattention.self.query": "colwise",
    "crossattention.self.key": "colwise",
    "crossattention.self.value": "colwise",
    "attention.output.dense": "rowwise",
    "crossattention.output.dense": "rowwise",
    "intermediate.dense": "colwise",
    r"(layer|layers|encoder)\.\d+\.output.dense": "rowwise",
}
_BART = {
    **{
        f"{attention}.{name}": "colwise"
        for attention in ("self_attn", "encoder_attn")
        for name in ("q_proj", "k_proj", "v_proj")
    },
    "self_attn.out_proj": "rowwise",
    "encoder_attn.out_proj": "rowwise",
    "fc1": "colwise",
    "fc2": "rowwise",
}
_T5 = {
    **{
        f"{attention}.{name}": "colwise"
        for attention in ("SelfAttention", "EncDecAttention")
        for name in ("q", "k", "v")
    },
    "SelfAttention.o": "rowwise",
    "EncDecAttention.o": "rowwise",
    "SelfAttention.relative_attention_bias": "head_table",
    "DenseReluDense.wi": "colwise",
    "DenseReluDense.wi_0": "colwise",
    "DenseReluDense.wi_1": "colwise",
    "DenseReluDense.wo": "rowwise",
}
_GPT2 = {
    "attn.c_attn": "packed_colwise_3",
    "attn.c_proj": "rowwise",
    "mlp.c_fc": "colwise",
    "mlp.c_proj": "rowwise",
}
_FUSED_BY_HEAD = {  # each head's queries, keys and values lie together
    "self_attention.query_key_value": "colwise",
    "self_attention.dense": "rowwise",
    "attention.query_key_value": "colwise",
    "attention.dense": "rowwise",
    "mlp.dense_h_to_4h": "colwise",
    "mlp.dense_4h_to_h": "rowwise",
}

OWN_PLANS: dict[str, dict[str, str]] = {
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "camembert"], _BERT),
    **dict.fromkeys(["bart", "marian", "opt"], _BART),
    **dict.fromkeys(["t5", "mt5"], _T5),
    "gpt2": _GPT2,
    **dict.fromkeys(["bloom", "falcon", "gpt_neox"], _FUSED_BY_HEAD),
}
"""Plans by model type; a name matches the end of a module's name, its last part whole."""

FOLLOWED = {
    "afmoe", "arcee", "aria_text", "axk1", "bailing_hybrid", "cohere", "cohere2", "cohere2_moe", "cwm",
    "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo",
    "flint", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm", "glm4", "glm4_moe",
    "glm_moe_dsa", "granite", "granitemoeshared", "hrm_text", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3",
    "iquestcoder", "jamba", "kolibri1", "llama", "llama4_text", "mellum", "minicpm3", "minimax", "minimax_m2",
    "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral", "nanochat", "nemotron", "nemotron_h",
    "olmo", "olmo2", "olmo3", "olmoe", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe_text",
    "qwen3_5_text", "qwen3_moe", "qwen3_next", "qwen4_exp_text", "seed_oss", "smollm3", "solar_open", "starcoder2",
}  # fmt: skip
"""Types whose plan in transformers gives the loss and the gradients of the undivided model.

Each was compared at two shards: loss to 1e-6 relative, gradients to 1e-5 of their largest element, logits to 1e-4."""


def styles_of(model: PreTrainedModel) -> dict[str, str]:
    """The style of each module and parameter that the model's plan names; empty when the type has no plan.

    Args:
        model: the model; its parameters may be on meta.
    """
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    own = OWN_PLANS.get(model.config.model_type)
    if own is not None:
        patterns = {rf"(.*\.)?{name}": style for name, style in own.items()}
    else:
        plan = {name: style for name, style in (model._tp_plan or {}).items() if style not in VOCABULARY_STYLES}
        patterns = {re.escape(name).replace(r"\*", r"[^.]+"): style for name, style in plan.items()}
        head = model.get_output_embeddings()
        names = [name for name in names if head is None or model.get_submodule(_module(model, name)) is not head]
    return {name: style for name in names for pattern, style in patterns.items() if re.fullmatch(pattern, name)}


def reason_without_plan(model: PreTrainedModel) -> str | None:
    """Why the model cannot be divided; None if it can."""
    styles = set(styles_of(model).values())
    if not styles:
        return "neither transformers nor llmpipe has a plan for it"
    unknown = sorted(styles - SUPPORTED_STYLES)
    if unknown:
        return f"transformers' plan for it uses {', '.join(unknown)}, which llmpipe does not follow"
    if model.config.model_type not in {*OWN_PLANS, *FOLLOWED}:
        return "following transformers' plan for it has not been shown to give the same gradients"
    return None


def _module(model: PreTrainedModel, name: str) -> str:
    """The module that `name` is, or belongs to."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return name.rpartition(".")[0]
    return name
