"""Cleaning, duplicates, augmentation, folds, and what `llmpipe data` shows."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasketch import MinHash
from typer.testing import CliRunner

from llmpipe_cli.cli.app import app
from llmpipe_cli.data.augment import Augmenter
from llmpipe_cli.data.cleaning import Cleaner, without_html
from llmpipe_cli.data.dataset import open_split
from llmpipe_cli.data.folds import count_records, in_fold
from llmpipe_cli.data.prepare import prepare
from llmpipe_cli.data.sources import Record, SkipLog, digest_of
from llmpipe_cli.recipe.schema import Augmentation, Cleaning, Recipe


def records(texts: list[str], labels: list[str] | None = None) -> list[Record]:
    return [
        Record(f"a:{number}", (text,), labels[number] if labels else None, digest=digest_of(text))
        for number, text in enumerate(texts)
    ]


def cleaned(texts: list[str], **options: Any) -> tuple[list[str], list[str]]:
    """What stays, and the reasons of what does not."""
    log = SkipLog()
    kept = [record.texts[0] for record in Cleaner(Cleaning(**options)).records(iter(records(texts)), log)]
    return kept, log.examples


def test_what_is_inside_a_text() -> None:
    page = "<html><head><title>x</title></head><p>5 &lt; 6 &amp; <b>so</b>\n on</p><script>a()</script><br>end"
    assert without_html(page) == "5 < 6 & so\non\n\nend"
    assert cleaned(["a\u200bb\x07c\td\n"], control_characters=True)[0] == ["abc\td\n"]
    assert cleaned(["e\u0301 \ufb01"], unicode="nfc")[0] == ["\u00e9 \ufb01"]
    assert cleaned(["e\u0301 \ufb01"], unicode="nfkc")[0] == ["\u00e9 fi"]
    assert cleaned(["schÃ¶n"], unicode="ftfy")[0] == ["schön"]
    assert cleaned(["The cat, and THE dog"], stop_words=["the", "and"])[0] == ["cat, dog"]
    assert cleaned(["<p>a</p>"])[0] == ["<p>a</p>"], "nothing happens by itself"


def test_what_is_left_out_is_counted_with_its_place() -> None:
    texts = ["short", "long enough", "x" * 50, "Это по-русски, да", "long enough"]
    kept, reasons = cleaned(texts, min_chars=6, max_chars=40, scripts=["latin"], duplicates="exact")
    assert kept == ["long enough"]
    assert reasons == [
        "a:0: 5 characters, fewer than 6",
        "a:2: 50 characters, more than 40",
        "a:3: 0 % of the letters are latin",
        "a:4: a copy of an earlier text",
    ]


def test_near_duplicates() -> None:
    draw = random.Random(1)
    words = [f"word{number}" for number in range(400)]
    first = draw.choices(words, k=120)
    near = [*first[:60], "other", *first[61:]]
    texts = [" ".join(first), " ".join(draw.choices(words, k=120)), " ".join(near), "short text", "short text too"]
    sets = [{" ".join(row[i : i + 5]) for i in range(len(row) - 4)} for row in (first, near)]
    hashes = [MinHash(num_perm=128) for _ in sets]
    for hashed, runs in zip(hashes, sets, strict=True):
        hashed.update_batch([run.encode() for run in runs])
    assert len(sets[0] & sets[1]) / len(sets[0] | sets[1]) > 0.9
    kept, reasons = cleaned(texts, duplicates="near", near_duplicate_similarity=0.7)
    assert kept == [texts[0], texts[1], texts[3], texts[4]]
    assert reasons == ["a:2: almost a copy of a:0"]


def test_augmentation_adds_changed_copies_of_training_texts_only(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text('{"quick": ["fast"]}')
    options = Augmentation(copies=2, deletion=0.2, swap=0.2, synonyms="table.json", synonym_share=1.0)
    rows = records(["the quick brown fox jumps over the lazy dog", "a"])
    changed = list(Augmenter(options, tmp_path).records(iter(rows)))
    assert changed == list(Augmenter(options, tmp_path).records(iter(rows))), "the same each time"
    assert [record.texts[0] for record in changed].count(rows[0].texts[0]) == 1
    allowed = Counter([*rows[0].texts[0].split(), "fast"])
    for record in changed[1:-1]:
        assert not Counter(record.texts[0].split()) - allowed
        assert "quick" not in record.texts[0]
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"one two three four {n}", "label": "ab"[n % 2]}) + "\n" for n in range(40))
    )
    data = {
        "train": {"files": str(path)},
        "validation": {"fraction": 0.3},
        "augment": {"copies": 3},
        "sequence_len": 24,
    }
    values = {"name": "t", "task": "classification", "model": {}, "tokenizer": {"train": {"vocab_size": 300}}}
    prepared = prepare(Recipe.model_validate({**values, "data": data}), tmp_path, tmp_path / "cache")
    assert prepared.train is not None
    assert prepared.validation is not None
    assert prepared.validation.num_samples < 40 * 0.6
    assert prepared.train.num_samples > 2 * (40 - prepared.validation.num_samples)


@pytest.mark.parametrize("count", [2, 5, 37])
def test_folds_are_stratified_and_cover_everything_once(count: int) -> None:
    texts = [f"text {number % 37}" for number in range(60)]  # the last 23 are copies
    labels = ["rare" if number % 37 % 6 == 0 else "common" for number in range(60)]
    rows = records(texts, labels)
    assert count_records(iter(rows)) == 37
    seen: list[str] = []
    for index in range(count):
        held = list(in_fold(iter(rows), index, count, validation=True))
        rest = list(in_fold(iter(rows), index, count, validation=False))
        assert len(held) + len(rest) == len(rows)
        assert not {record.digest for record in held} & {record.digest for record in rest}
        different = {record.texts[0]: record.label for record in held}
        rare = sum(label == "rare" for label in different.values())
        assert abs(rare - 7 / count) < 1
        assert abs(len(different) - 37 / count) < 2
        seen += [record.where for record in held]
    assert sorted(seen) == sorted(record.where for record in rows)


def test_prepare_with_folds_gives_the_parts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} sheep", "label": "ab"[n % 2]}) + "\n" for n in range(20)))
    data = {"train": {"files": str(path)}, "sequence_len": 8}
    values = {"name": "t", "task": "classification", "model": {}, "tokenizer": {"train": {"vocab_size": 300}}}
    recipe = Recipe.model_validate({**values, "data": data})
    for index in range(4):
        prepared = prepare(recipe, tmp_path, tmp_path / "cache", fold=(index, 4))
        assert prepared.train is not None
        assert prepared.validation is not None
        held = prepared.validation.num_samples
        assert 4 <= held <= 6
        assert prepared.train.num_samples + held == 20
        assert prepared.label_names == ["a", "b"]
        labels = [int(open_split(prepared.validation)[row]["label"]) for row in range(held)]
        assert set(Counter(labels).values()) <= {2, 3}


def test_data_show_and_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    shown = json.loads(runner.invoke(app, ["data", "show", "chat-mini", "--samples", "1", "--json"]).stdout)
    tokens = shown[0]["tokens"]
    said = "".join(token["text"] for token in tokens if token["is_target"])
    assert said.startswith("That is ")
    assert said.endswith("<|endoftext|>")
    assert "user" in "".join(token["text"] for token in tokens if not token["is_target"])
    named = json.loads(
        runner.invoke(app, ["data", "show", "token-classification-mini", "--samples", "1", "--json"]).stdout
    )
    tags = [token["target"] for token in named[0]["tokens"] if token["is_target"]]
    assert {tag.partition("-")[2] for tag in tags} <= {"", "PER", "LOC", "DAY"}
    assert any(tag.startswith("B-") for tag in tags)
    asked = runner.invoke(app, ["data", "show", "question-answering-mini", "--samples", "2"])
    assert asked.exit_code == 0, asked.output
    assert "label: " in asked.stdout
    summary = json.loads(runner.invoke(app, ["data", "prepare", "chat-mini", "--json"]).stdout)
    assert summary["train"]["num_samples"] + summary["validation"]["num_samples"] == 600
