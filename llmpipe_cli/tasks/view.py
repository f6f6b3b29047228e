"""Samples as the model sees them, token by token, for people to look at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmpipe_cli.data.dataset import Sample, Samples, open_split
from llmpipe_cli.data.prepared import PreparedData, PreparedSplit
from llmpipe_cli.data.sources import SkipLog
from llmpipe_cli.data.stream import Place, buffers, positions_of
from llmpipe_cli.tasks.base import IGNORED
from llmpipe_cli.tasks.registry import get_task


@dataclass(frozen=True)
class TokenView:
    """One position of the input.

    Attributes:
        text: the token as text.
        id: its id.
        is_target: whether something is learned at this place.
        target: what is to be predicted where that is not the token itself: a hidden token, a tag.
    """

    text: str
    id: int
    is_target: bool
    target: str | None = None


@dataclass(frozen=True)
class SampleView:
    """One sample: its input, its labels where those are no tokens of the input, and how much is padding."""

    index: int
    tokens: list[TokenView]
    labels: str | None
    num_padding: int


def view_samples(data: PreparedData, split: PreparedSplit, indices: Iterable[int]) -> list[SampleView]:
    """The samples with these numbers, each as a micro-batch of its own."""
    from transformers import AutoTokenizer

    task = get_task(data)
    samples: Samples | list[Sample] = _first_of_stream(split) if split.kind == "stream" else open_split(split)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_dir) if data.tokenizer_dir else None

    def text(token: int) -> str:
        return str(tokenizer.decode([token])) if tokenizer is not None else f"{token} "

    views = []
    for index in indices:
        sample = samples[index]
        batch = {name: value[0] for name, value in task.collate([sample], seed=(index,)).items()}
        ids = batch["input_ids"].tolist()
        length = int(batch["attention_mask"].sum()) if "attention_mask" in batch else len(sample["input_ids"])
        marks, labels = _marks(data, batch, text)
        tokens = [TokenView(text(token), token, *marks.get(place, (False, None))) for place, token in enumerate(ids)]
        views.append(SampleView(index, tokens[:length], labels, len(ids) - length))
    return views


def _first_of_stream(split: PreparedSplit) -> list[Sample]:
    """The samples of a stream's first buffer, in the source's order."""
    first = next(buffers(split, 0, Place(), SkipLog("skip")))
    positions = positions_of(first.begins)
    return [
        {"input_ids": row.astype(np.int64), "positions": places}
        for row, places in zip(first.tokens, positions, strict=True)
    ]


def _marks(
    data: PreparedData, batch: dict[str, Any], text: Any
) -> tuple[dict[int, tuple[bool, str | None]], str | None]:
    """The places where something is learned, with what is predicted there, and labels of the sample as a whole."""
    names = data.label_names or []
    if data.task == "question-answering":
        start, end = int(batch["start_positions"]), int(batch["end_positions"])
        answer = "".join(text(int(token)) for token in batch["input_ids"][start : end + 1])
        return dict.fromkeys(range(start, end + 1), (True, None)), f"{start}-{end}: {answer.strip()}"
    labels = batch["labels"]
    if data.task == "classification":
        chosen = labels.nonzero()[:, 0].tolist() if data.multi_label else [int(labels)]
        return {}, ", ".join(names[label] for label in chosen) or "none"
    if data.task == "translation":
        return {}, "".join(text(token) for token in labels.tolist() if token != IGNORED)
    shift = 1 if data.task in ("causal-lm", "chat") else 0
    places = [place for place, label in enumerate(labels.tolist()) if label != IGNORED and place >= shift]
    if data.task == "token-classification":
        return {place: (True, names[int(labels[place])]) for place in places}, None
    hidden = data.task == "masked-lm"
    return {place: (True, text(int(labels[place])) if hidden else None) for place in places}, None
