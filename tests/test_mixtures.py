"""Several weighted sources, and held-out shares of each class."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmpipe_cli.data.batches import BatchPlan
from llmpipe_cli.data.dataset import MixedSamples, open_split
from llmpipe_cli.data.mixture import draws_an_epoch
from llmpipe_cli.data.order import MixtureOrder
from llmpipe_cli.data.prepare import count_documents, prepare
from llmpipe_cli.data.prepared import PreparedData
from llmpipe_cli.data.store import Documents
from llmpipe_cli.errors import UsageError
from llmpipe_cli.recipe.schema import Recipe
from llmpipe_cli.report.samples import data_summary
from llmpipe_cli.tasks.registry import get_task


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe_of(task: str, **data: Any) -> Recipe:
    values = {
        "name": "mixed",
        "task": task,
        "model": {"config": {"model_type": "llama"}},
        "tokenizer": {"train": {"vocab_size": 300}},
        "data": {"sequence_len": 32, **data},
        "train": {"max_steps": 1},
    }
    return Recipe.model_validate(values)


def prepared(folder: Path, task: str, **data: Any) -> PreparedData:
    return prepare(recipe_of(task, **data), folder, folder / "cache")


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 1.0], [0.05, 0.05, 0.9]])
def test_an_epoch_has_each_source_in_its_share(weights: list[float] | None) -> None:
    sizes = [40, 10, 150]
    draws = draws_an_epoch(sizes, weights)
    assert sum(draws) == 200
    if weights is not None:
        exact = [200 * weight / sum(weights) for weight in weights]
        assert all(abs(count - share) < 1 for count, share in zip(draws, exact, strict=True))
    order = MixtureOrder(sizes, draws, seed=5)
    stream = order.indices(0, 2000)
    source_of = np.repeat([0, 1, 2], sizes)
    for epoch in range(10):
        counted = Counter(source_of[stream[200 * epoch : 200 * (epoch + 1)]].tolist())
        assert [counted[source] for source in range(3)] == draws
    for source, size in enumerate(sizes):
        own = stream[source_of[stream] == source].tolist()
        # a source's samples come round by round, and each round in another order
        rounds = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert not draws[source] * 10 >= 2 * size or len(rounds) >= 2
    for start, stop in ((0, 7), (199, 203), (777, 1234)):
        assert order.indices(start, stop).tolist() == stream[start:stop].tolist()
    half = np.count_nonzero(source_of[stream[:100]] == 2) / 100
    assert abs(half - draws[2] / 200) < 0.2, "sources are mixed, not one after the other"


def test_a_source_is_used_up_before_it_repeats() -> None:
    sizes, draws = [40, 160], [150, 50]
    stream = MixtureOrder(sizes, draws, seed=1).indices(0, 1600)  # eight epochs: 1200 of 40 and 400 of 160
    small, large = stream[stream < 40], stream[stream >= 40]
    counts = Counter(small.tolist())
    assert len(counts) == 40
    assert max(counts.values()) - min(counts.values()) <= 0
    # 400 draws from 160 samples: each comes two or three times
    assert set(Counter(large.tolist()).values()) == {2, 3}


def test_sources_with_fields_and_weights_of_their_own(tmp_path: Path) -> None:
    draw = random.Random(2)

    def line(word: str) -> str:
        return " ".join([word] * draw.randint(4, 9))

    news = write(tmp_path / "news.jsonl", [{"body": line("news")} for _ in range(120)])
    books = write(tmp_path / "books.jsonl", [{"text": line("books")} for _ in range(60)] + [{"text": ""}])
    sources = [
        {"files": news, "text": "body", "weight": 1},
        {"files": books, "weight": 3, "on_error": "skip"},
    ]
    data = prepared(tmp_path, "causal-lm", train={"mixture": sources}, validation={"fraction": 0.2})
    split, held_out = data.train, data.validation
    assert split is not None
    assert held_out is not None
    assert (split.num_skipped, held_out.num_skipped) == (1, 0)
    assert split.num_documents + held_out.num_documents == 180
    assert split.draws == [round(split.num_samples / 4), split.num_samples - round(split.num_samples / 4)]
    samples = open_split(split)
    assert isinstance(samples, MixedSamples)
    batches = BatchPlan(samples, get_task(data), global_batch_size=4, micro_batch_size=2, seed=3)
    chosen = [index for step in range(30) for part in range(2) for index in batches.sample_indices(step, part)]
    share = np.mean([index >= samples.sizes[0] for index in chosen])
    assert 0.6 < share < 0.9
    first = batches.micro_batch(0, 0)["input_ids"]
    assert first.tolist() == [samples[int(index)]["input_ids"].tolist() for index in batches.sample_indices(0, 0)]
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as shown:
        console.print(data_summary(data))
    assert f"{books}: {split.draws[1]:,} samples an epoch (7" in shown.get()
    with pytest.raises(UsageError, match="cannot be divided into folds"):
        count_documents(recipe_of("causal-lm", train={"mixture": sources}), tmp_path)
    # The same sources in plain words: no weights draw each sample once.
    plain = prepared(tmp_path, "causal-lm", train={"mixture": [{**each, "weight": None} for each in sources]}).train
    assert plain is not None
    assert plain.draws == [part.num_samples for part in plain.parts]


def test_labels_of_all_sources_are_known_in_each(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [{"text": f"a {i}", "label": "spam"} for i in range(8)])
    two = write(tmp_path / "two.jsonl", [{"text": f"b {i}", "label": "ham"} for i in range(8)])
    data = prepared(tmp_path, "classification", train={"mixture": [{"files": one}, {"files": two}]})
    assert data.label_names == ["ham", "spam"]
    assert data.train is not None
    assert data.train.label_counts == [8, 8]
    assert [part.label_counts for part in data.train.parts] == [[0, 8], [8, 0]]


def test_a_share_of_each_class_is_held_out(tmp_path: Path) -> None:
    sizes = {"common": 200, "rare": 10, "two": 2, "once": 1}
    rows = [{"text": f"{name} {i}", "label": name} for name, size in sizes.items() for i in range(size)]
    rows += [dict(row) for row in rows[:30]]  # copies
    random.Random(4).shuffle(rows)
    path = write(tmp_path / "rows.jsonl", rows)
    data = prepared(tmp_path, "classification", train={"files": path}, validation={"fraction": 0.1})
    assert data.train is not None
    assert data.validation is not None
    names = ["common", "once", "rare", "two"]
    assert data.label_names == names

    def texts(directory: str) -> list[tuple[int, ...]]:
        documents = Documents(Path(directory))
        return [tuple(documents.document(index).tolist()) for index in range(len(documents))]

    train, held_out = texts(data.train.directory), texts(data.validation.directory)
    assert len(train) + len(held_out) == len(rows)
    assert not set(train) & set(held_out), "copies lie on one side"
    distinct = Counter(dict(zip(held_out, Documents(Path(data.validation.directory)).labels, strict=True)).values())
    assert [distinct[index] for index in range(4)] == [20, 0, 1, 1]
    by_hash = prepared(
        tmp_path, "classification", train={"files": path}, validation={"fraction": 0.1, "stratify": False}
    ).validation
    assert by_hash is not None
    assert by_hash.fingerprint != data.validation.fingerprint
