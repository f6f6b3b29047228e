"""How a record becomes tokens: what each task reads from a record and writes to the cache.

Runs in the preparing processes, many at a time, so this module imports neither torch nor transformers. Every task
stores one or two columns of tokens:

- causal-lm: the text's tokens without special tokens; in training data each document ends with the end-of-text token.
- masked-lm: the text's tokens with the tokenizer's special tokens around them; without packing cut to `sequence_len`.
- classification: the same, cut to `sequence_len`, and the label.
- translation: prefix and source text, cut to `sequence_len`; target text, cut to `target_sequence_len`; both with the
  tokenizer's special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmpipe_cli.errors import UsageError

if TYPE_CHECKING:
    from llmpipe_cli.data.sources import Fields, Record
    from llmpipe_cli.data.tokenizer import Encoder
    from llmpipe_cli.recipe.schema import DataSection, DataSource

AVAILABLE_TASKS = ("causal-lm", "masked-lm", "classification", "translation")

_WHITE_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class FeatureOptions:
    """What the tokens of a split depend on, besides text and tokenizer; part of the cache's fingerprint.

    `separator` is the token put after each document, or None. Lengths are None where nothing is cut.
    """

    task: str
    texts: tuple[str, ...]
    label: str | None = None
    max_length: int | None = None
    max_target_length: int | None = None
    source_prefix: str = ""
    separator: int | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the token columns."""
        return ("input_ids", "labels") if self.task == "translation" else ("input_ids",)


@dataclass
class Features:
    """The tokens of some records: for each column one list a record, which includes the separator if there is one.

    `num_words` counts runs of white space (the words of a text are one more than its runs, and runs add up over the
    pieces of a document); `num_bytes` is the UTF-8 length of the record's own text.
    """

    tokens: dict[str, list[list[int]]]
    num_white_spaces: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    num_truncated: int = 0


def check_available(task: str) -> None:
    """Raises `UsageError` for a task that this version does not train."""
    if task not in AVAILABLE_TASKS:
        raise UsageError(
            f"task {task!r} is not available yet", where="task", hint=f"available: {', '.join(AVAILABLE_TASKS)}"
        )


def feature_options(
    task: str, data: DataSection, source: DataSource, *, end_of_text: int | None, training: bool
) -> FeatureOptions:
    """The options of one split. `end_of_text` is the tokenizer's token that separates documents."""
    if task == "causal-lm":
        return FeatureOptions(task, (source.text,), separator=end_of_text if training else None)
    if task == "masked-lm":
        return FeatureOptions(task, (source.text,), max_length=None if data.packing else data.sequence_len)
    if task == "classification":
        return FeatureOptions(task, (source.text,), source.label, data.sequence_len)
    return FeatureOptions(
        task,
        (source.source, source.target),
        max_length=data.sequence_len,
        max_target_length=data.target_sequence_len or data.sequence_len,
        source_prefix=data.source_prefix,
    )


def record_fields(options: FeatureOptions) -> Fields:
    """The fields that a source has to deliver."""
    from llmpipe_cli.data.sources import Fields

    return Fields(options.texts, options.label)


def encode_records(options: FeatureOptions, encoder: Encoder, records: Sequence[Record]) -> Features:
    """Tokenises a few records."""
    texts = [record.texts[0] for record in records]
    if options.task == "causal-lm":
        ids = [encoder.encode(text) for text in texts]
        if options.separator is not None:
            ids = [[*row, options.separator] if record.last else row for row, record in zip(ids, records, strict=True)]
        features = Features({"input_ids": ids})
    elif options.task == "masked-lm" and options.max_length is not None:
        ids, num_truncated = encoder.encode_truncated(texts, options.max_length)
        ids = [row if record.first else [] for row, record in zip(ids, records, strict=True)]  # cut after one piece
        features = Features({"input_ids": ids}, num_truncated=num_truncated)
    elif options.task == "masked-lm":
        ids = [
            encoder.encode_with_special_tokens(record.texts[0], first=record.first, last=record.last)
            for record in records
        ]
        features = Features({"input_ids": ids})
    elif options.task == "classification":
        assert options.max_length is not None
        ids, num_truncated = encoder.encode_truncated(texts, options.max_length)
        features = Features({"input_ids": ids}, num_truncated=num_truncated)
    else:
        assert options.max_length is not None
        assert options.max_target_length is not None
        sources = [options.source_prefix + text for text in texts]
        ids, num_truncated = encoder.encode_truncated(sources, options.max_length)
        targets, num_cut_targets = encoder.encode_truncated(
            [record.texts[1] for record in records], options.max_target_length, target=True
        )
        features = Features({"input_ids": ids, "labels": targets}, num_truncated=num_truncated + num_cut_targets)
    features.num_white_spaces = [sum(1 for _ in _WHITE_SPACE.finditer(text)) for text in texts]
    features.num_bytes = [len(text.encode()) for text in texts]
    return features
