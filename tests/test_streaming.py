"""Text that is learned from while it is read: the same samples as prepared, from any position, on any layout."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import Job, full_model, losses, train_plain
from rank_pool import RankPool

from llmpipe_cli.data.dataset import open_split
from llmpipe_cli.data.prepare import prepare
from llmpipe_cli.data.prepared import PreparedSplit
from llmpipe_cli.data.stream import SampleStream, positions_of
from llmpipe_cli.errors import UsageError
from llmpipe_cli.recipe.schema import Recipe
from llmpipe_cli.report.samples import data_summary
from llmpipe_cli.tasks.view import view_samples

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as members:
        yield members


def corpus(folder: Path, *, count: int = 300) -> str:
    draw = random.Random(8)
    words = ["tide", "lamp", "green", "of", "runs", "the", "seven", "boats", "under"]
    for part in range(2):
        rows = [{"text": " ".join(draw.choices(words, k=draw.randint(1, 40)))} for _ in range(count)]
        (folder / f"part-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "part-*.jsonl")


def values(files: str, *, shuffle: bool = False, data: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    return {
        "name": "streamed",
        "model": {"config": {"model_type": "llama", "max_position_embeddings": 64, **SIZES}},
        "tokenizer": {"train": {"vocab_size": 300, "max_documents": 50}},
        "data": {"train": {"files": files, **train}, "sequence_len": 32, "shuffle": shuffle, **(data or {})},
        "train": {"max_steps": 6, "global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 4e-3},
        "checkpoint": {"every_steps": 3},
    }


def stream_of(folder: Path, files: str, **train: Any) -> PreparedSplit:
    recipe = Recipe.model_validate(values(files, streaming=True, **train))
    split = prepare(recipe, folder, folder / "cache").train
    assert split is not None
    assert split.kind == "stream"
    return split


def test_a_stream_is_the_prepared_text_over_and_over(tmp_path: Path) -> None:
    files = corpus(tmp_path)
    plain = prepare(Recipe.model_validate(values(files)), tmp_path, tmp_path / "cache").train
    assert plain is not None
    samples = open_split(plain)
    folders = list((tmp_path / "cache" / "data").iterdir())
    split = stream_of(tmp_path, files, shuffle_buffer=7)
    assert list((tmp_path / "cache" / "data").iterdir()) == folders, "nothing is prepared"
    stream = SampleStream(split, seed=3, shuffle=False)
    count = 3 * len(samples)
    tokens, begins = stream.samples(0, count)
    assert samples.documents is not None
    whole = np.tile(samples.documents.tokens["input_ids"].astype(np.int64), 4)
    assert np.array_equal(tokens.ravel(), whole[: count * 32]), "the end runs on into the next round"
    positions = positions_of(begins)
    for index in range(len(samples)):
        assert np.array_equal(positions[index], samples[index]["positions"])
    # Shuffled, each buffer holds the same blocks in another order, and any checkpoint's place goes on exactly.
    shuffled = SampleStream(split, seed=3, shuffle=True)
    drawn, states = [], {}
    for start in range(0, count - 5, 5):
        drawn.append(shuffled.samples(start, start + 5)[0])
        states[start + 5] = shuffled.state(start + 5)
    drawn = np.concatenate(drawn)
    for first in range(0, len(drawn) - 6, 7):
        blocks = [{tuple(row) for row in rows[first : first + 7].tolist()} for rows in (drawn, tokens)]
        assert blocks[0] == blocks[1]
    assert not np.array_equal(drawn, tokens[: len(drawn)])
    for place in (5, 35, 70, 5 * (len(samples) // 5) + 10):
        again = SampleStream(split, seed=3, shuffle=True, state=json.loads(json.dumps(states[place])))
        assert np.array_equal(again.samples(place, place + 12)[0], drawn[place : place + 12])
    assert states[70]["buffer"] == 10
    data = prepare(Recipe.model_validate(values(files, streaming=True, shuffle_buffer=7)), tmp_path, tmp_path / "cache")
    (view,) = view_samples(data, split, [3])
    assert [token.id for token in view.tokens] == tokens[3].tolist()
    assert data_summary(data)


def test_records_that_cannot_be_read(tmp_path: Path) -> None:
    files = corpus(tmp_path)
    path = tmp_path / "part-1.jsonl"
    path.write_text(path.read_text() + '{"body": "no text"}\n')
    stream = SampleStream(stream_of(tmp_path, files), seed=3, shuffle=False)
    with pytest.raises(UsageError) as caught:
        stream.samples(0, 5000)
    assert caught.value.where == f"{path}:301"
    skipping = SampleStream(stream_of(tmp_path, files, on_error="skip", shuffle_buffer=64), seed=3, shuffle=False)
    skipping.samples(0, 1024)
    assert skipping.skipped.num_skipped >= 1
    assert skipping.skipped.examples[0].startswith(f"{path}:301")


@pytest.mark.parametrize("shuffle", [False, True])
def test_training_and_going_on_from_a_stream(shuffle: bool, tmp_path: Path, pool: RankPool) -> None:
    files = corpus(tmp_path)
    job = Job(tmp_path, values(files, shuffle=shuffle, streaming=True, shuffle_buffer=12))
    run = job.train(pool, parallel={"pipeline": 2})
    if not shuffle:
        prepared = Job(tmp_path, values(files))
        plan = prepared.plan()
        assert losses(run) == pytest.approx(train_plain(plan, full_model(plan))[0], rel=1e-5)
    resumed = job.train(pool, resume=run.checkpoints / "step-00000003", parallel={"pipeline": 2, "data": 2})
    assert losses(resumed) == pytest.approx(losses(run)[3:], rel=1e-5)
    if shuffle:
        other = Job(tmp_path, values(files, shuffle=shuffle, streaming=True, shuffle_buffer=13))
        with pytest.raises(UsageError, match="another stream"):
            other.plan(resume=run.checkpoints / "step-00000003")
