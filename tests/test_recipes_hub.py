"""The ready recipes that read the hub, each run for a step at two stages on a local stand-in with the same columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from jobs import Job, steps
from rank_pool import RankPool

from llmpipe_cli.recipe.builtin import builtin_recipes
from llmpipe_cli.recipe.load import load_recipe

WORDS = [
    "the",
    "old",
    "train",
    "came",
    "slowly",
    "into",
    "a",
    "small",
    "town",
    "where",
    "nobody",
    "had",
    "seen",
    "one",
    "before",
]
TEXT = Features({"text": Value("string")})
NAMES = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
ANSWERS = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
COLUMNS: dict[str, Features] = {
    "allenai/c4": Features({"text": Value("string"), "timestamp": Value("string"), "url": Value("string")}),
    "Skylion007/openwebtext": TEXT,
    "wikimedia/wikipedia": Features({"id": Value("string"), "title": Value("string"), "text": Value("string")}),
    "bookcorpus/bookcorpus": TEXT,
    "stanfordnlp/imdb": Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])}),
    "fancyzhx/ag_news": Features({"text": Value("string"), "label": ClassLabel(names=["World", "Sports", "Business"])}),
    "SetFit/20_newsgroups": Features(
        {"text": Value("string"), "label": Value("int64"), "label_text": Value("string")}
    ),
    "rajpurkar/squad": Features(
        {"id": Value("string"), "title": Value("string"), "context": Value("string"), "question": Value("string"),
         "answers": ANSWERS}
    ),
    "unimelb-nlp/wikiann": Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=NAMES))}),
    "wmt/wmt16": Features({"translation": {"de": Value("string"), "en": Value("string")}}),
    "abisee/cnn_dailymail": Features(
        {"article": Value("string"), "highlights": Value("string"), "id": Value("string")}
    ),
    "tatsu-lab/alpaca": Features({name: Value("string") for name in ("instruction", "input", "output", "text")}),
    "roskoN/dailydialog": Features(
        {"id": Value("string"), "acts": List(Value("int64")), "utterances": List(Value("string"))}
    ),
}  # fmt: skip
COLUMNS["rajpurkar/squad_v2"] = COLUMNS["rajpurkar/squad"]
COLUMNS["wmt/wmt14"] = COLUMNS["wmt/wmt16"]
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2},
    "marian": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 64,
    },
}
SIZES["qwen2"] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
PLAIN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
HUB = {
    name: recipe
    for name in builtin_recipes()
    if (recipe := load_recipe(name).recipe).data.train is not None and recipe.data.train.dataset is not None
}


def _value(kind: Any, number: int, name: str) -> Any:
    """Something of the kind that a column holds."""
    sentence = " ".join(WORDS[(number + step * (number % 3 + 1)) % len(WORDS)] for step in range(12))
    if isinstance(kind, dict) and name == "answers":
        empty = number % 4 == 3
        return {"text": [] if empty else ["old"], "answer_start": [] if empty else [4]}
    if isinstance(kind, dict):
        return {key: _value(inner, number, key) for key, inner in kind.items()}
    if isinstance(kind, List):
        return [sentence if name == "utterances" else _value(kind.feature, number + i, name) for i in range(4)]
    if isinstance(kind, ClassLabel):
        return number % kind.num_classes
    if kind.dtype.startswith("int"):
        return number % 3
    return {"context": f"the old {sentence}", "label_text": "abc"[number % 3], "id": str(number)}.get(name, sentence)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as members:
        yield members


@pytest.mark.parametrize("name", sorted(HUB))
def test_hub_recipe_runs_on_a_stand_in(name: str, tmp_path: Path, pool: RankPool) -> None:
    recipe = HUB[name]
    assert recipe.data.train is not None
    assert recipe.data.train.dataset is not None
    features = COLUMNS[recipe.data.train.dataset]
    columns = {key: [_value(kind, number, key) for number in range(120)] for key, kind in features.items()}
    splits = {split: Dataset.from_dict(columns, features=features) for split in ("train", "validation", "test")}
    DatasetDict(splits).save_to_disk(tmp_path / "stand-in")

    values = recipe.model_dump(mode="json", by_alias=True)
    model_type = (values["model"]["config"] or {}).get("model_type") or _type_of(values["model"]["from"])
    values["model"] = {"config": {"model_type": model_type, **SIZES.get(model_type, PLAIN)}, "dtype": "fp32"}
    values["tokenizer"] = {"train": {"vocab_size": 320}}
    values["lora"] = None  # adapters are for pretrained models
    for split in ("train", "validation"):
        source = values["data"][split]
        if source["dataset"] is not None:
            values["data"][split] = {**source, "dataset": str(tmp_path / "stand-in"), "subset": None}
        else:
            source["fraction"] = 0.2
    length = {"chat": 160, "question-answering": 48}.get(recipe.task, 24)
    values["data"] |= {"sequence_len": length, "stride": 8}
    if values["data"]["target_sequence_len"]:
        values["data"]["target_sequence_len"] = 20
    values["train"] |= {"max_steps": 1, "global_batch_size": 4, "micro_batch_size": 2, "warmup_steps": None}
    values["evaluation"]["every_steps"] = None
    values["checkpoint"] = {"keep_best": None}
    job = Job(tmp_path, {key: value for key, value in values.items() if value is not None})
    (step,) = steps(job.train(pool, parallel={"pipeline": 2}))
    assert 0 < step["loss"] < 10
    assert step["num_target_tokens"] > 0
    assert job.data.train is not None
    assert job.data.train.num_skipped == 0, job.data.train.skipped_examples


def _type_of(name: str) -> str:
    known = {"bert": "bert", "t5": "t5", "opus-mt": "marian", "Qwen": "qwen2", "gpt2": "gpt2"}
    return next(model_type for part, model_type in known.items() if part in name)
