"""Profiles of GPT and Llama models by formula, with the fused kernels of Megatron-LM.

Published runs were made with other engines than ours; their layers move and keep fewer bytes than transformers'
modules do. What autograd keeps is Korthikanti et al. 2022 (arXiv 2205.05198), equations 1 to 4: sbh (34 + 5as/h) bytes
a layer in 16 bit, of which 24 sbh and the attention's part are divided by tensor shards. The bytes that kernels move
were counted kernel by kernel: layer norms, fused bias + GELU, fused bias + dropout + add, scaled masked softmax,
dropout.
"""

from __future__ import annotations

from llmpipe_cli.plan.profile import Attention, ModelProfile, Product, SegmentProfile, Size


def transformer_profile(
    *,
    num_layers: int,
    hidden: int,
    heads: int,
    vocab_size: int,
    sequence_len: int,
    kv_heads: int | None = None,
    intermediate: int | None = None,
    gated: bool = False,
    tied: bool = True,
    fused_attention: bool = False,
    dropout: bool = True,
    dtype: str = "fp16",
) -> ModelProfile:
    """A decoder-only transformer in 16 bit.

    Args:
        num_layers: layers.
        hidden: width.
        heads: query heads.
        vocab_size: rows of the embedding, padded as it was run.
        sequence_len: tokens a sample; learned positions are counted for models without gated MLPs.
        kv_heads: key-value heads; as many as `heads` if None.
        intermediate: width of the MLP; 4 x `hidden` if None.
        gated: three matrices an MLP (Llama) instead of two.
        tied: embedding and head share their weight.
        fused_attention: flash attention instead of separate softmax and dropout kernels.
        dropout: attention and hidden dropout are on.
        dtype: fp16 or bf16.
    """
    kv_heads, intermediate = kv_heads or heads, intermediate or 4 * hidden
    head_dim = hidden // heads
    qkv, wide = hidden + 2 * kv_heads * head_dim, (3 if gated else 2) * intermediate
    products = (
        Product(hidden, qkv, "outer"),
        Product(hidden, hidden, "inner"),
        Product(hidden, (2 if gated else 1) * intermediate, "outer"),
        Product(intermediate, hidden, "inner"),
    )
    weights = hidden * (qkv + hidden + wide)
    small = 4 * hidden + hidden if not gated else 2 * hidden
    # bytes a token and score: softmax reads and writes 2 + 2, dropout 2 + 2 and a mask of 1
    scores = Size() if fused_attention else Size(squared=heads * (9.0 if dropout else 4.0))
    kept_scores = Size() if fused_attention else Size(squared=heads * (5.0 if dropout else 2.0))
    # norms 2 x 4h, residual adds with dropout 2 x 7h; transposes of q, k, v and context, activation of the MLP
    moved_cut = 4.0 * (qkv + hidden) + 2.0 * (intermediate * (3 if gated else 2))
    # Korthikanti et al.: 10 sbh whole (norm inputs, residuals' masks), 24 sbh divided: q, k, v, context, MLP
    kept_cut = 2.0 * (qkv + hidden) + 2.0 * (intermediate * (3 if gated else 2))
    layer = SegmentProfile(
        name="layer",
        kind="layer",
        parameters=weights + small,
        cut_parameters=weights,
        products=products,
        attentions=(Attention(heads, head_dim, fused=fused_attention, causal=fused_attention),),
        traffic=Size(22.0 * hidden, moved_cut, scores.squared),
        saved=Size((10.0 if dropout else 8.0) * hidden, kept_cut, kept_scores.squared),
        selective_saved=Size((10.0 if dropout else 8.0) * hidden, kept_cut),
        carried=2.0 * hidden,
        kernels=20,
        all_reduces=2,
    )
    table = vocab_size * hidden
    positions = 0 if gated else sequence_len * hidden
    embedding = SegmentProfile(
        name="pre",
        kind="pre",
        parameters=table + positions,
        cut_parameters=table,
        traffic=Size(10.0 * hidden),
        saved=Size(hidden if dropout else 0.0),
        carried=2.0 * hidden,
        kernels=5,
        all_reduces=1,
        tied=table if tied else 0,
    )
    head = SegmentProfile(
        name="post",
        kind="post",
        parameters=table + 2 * hidden,
        cut_parameters=table,
        products=(Product(hidden, vocab_size, "outer"),),
        # logits in 16 bit, made fp32, their maximum, exponentials and sum
        traffic=Size(4.0 * hidden, 24.0 * vocab_size),
        saved=Size(2.0 * hidden, 6.0 * vocab_size),
        temporary=Size(0.0, 4.0 * vocab_size),
        carried=2.0 * hidden,
        kernels=15,
        all_reduces=0,
        tied=table if tied else 0,
    )
    return ModelProfile((embedding, *[layer] * num_layers, head), dtype, divisible=(heads, intermediate))
