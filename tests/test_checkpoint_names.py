"""Checkpoints that two stages write are what Hugging Face's own `save_pretrained` writes, for ten architectures.

Training takes one step of warm-up, whose learning rate is 0, so that the weights are those drawn from the seed: what
transformers loads from the checkpoint has to give the logits of that model exactly.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from jobs import Job, full_model
from rank_pool import RankPool
from safetensors import safe_open
from tiny_models import tiny_inputs

STDLIB = sysconfig.get_paths()["stdlib"]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("causal-lm", GROUPED),
    "qwen2": ("causal-lm", {**GROUPED, "tie_word_embeddings": True}),
    "gpt2": ("causal-lm", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "bloom": ("causal-lm", {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "mixtral": ("causal-lm", {**GROUPED, "num_local_experts": 4}),
    "gemma3_text": ("causal-lm", {**GROUPED, "head_dim": 8, "sliding_window": 8}),
    "bert": ("masked-lm", SMALL),
    "albert": ("masked-lm", {**SMALL, "embedding_size": 16}),
    "t5": ("translation", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}),
    "marian": ("translation", {**SEQ2SEQ, "decoder_start_token_id": 0}),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as members:
        yield members


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("names")
    rows = [{"source": f"line {number}", "target": f"number {number}"} for number in range(40)]
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("model_type", MODELS)
def test_save_load_logits(model_type: str, folder: Path, pool: RankPool) -> None:
    task, values = MODELS[model_type]
    job = Job(
        folder,
        {
            "name": model_type,
            "task": task,
            "model": {"config": {"model_type": model_type, **values}, "dropout": 0.0},
            "tokenizer": {"train": {"vocab_size": 300}},
            "data": {
                "train": {"files": str(folder / "pairs.jsonl") if task == "translation" else f"{STDLIB}/json/*.py"},
                "sequence_len": 16,
            },
            "train": {"max_steps": 1, "global_batch_size": 2, "warmup_steps": 1, "seed": 3},
            "checkpoint": {"max_shard_size": "40KB"},
        },
    )
    run = job.train(pool, parallel={"pipeline": 2})
    checkpoint = run.checkpoints / "latest"
    drawn = full_model(job.plan()).eval()

    # names, shapes and dtypes are those of transformers' own save
    drawn.save_pretrained(folder / f"{model_type}-saved")
    assert _tensors(checkpoint) == _tensors(folder / f"{model_type}-saved")
    if model_type == "mixtral":
        assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in _tensors(checkpoint)
    sizes = [path.stat().st_size for path in checkpoint.glob("model-*.safetensors")]
    assert len(sizes) > 2
    assert sorted(sizes)[len(sizes) // 2] < 50_000

    # transformers opens it, and gives the same logits to the last bit
    cls = getattr(transformers, type(drawn).__name__)
    opened, report = cls.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = tiny_inputs(task)
    with torch.no_grad():
        assert torch.equal(opened.eval()(**inputs).logits, drawn(**inputs).logits)


def _tensors(directory: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor in a model directory."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is no mapping
                stored = file.get_slice(name)
                found[name] = (stored.get_dtype(), stored.get_shape())
    return found
