"""How a record becomes tokens: what each task reads from a record and writes to the cache.

Runs in the preparing processes, many at a time, so this module imports neither torch nor transformers (chat templates
excepted). Every task stores a few columns of whole numbers; a row of them is one document:

- causal-lm: `input_ids`, the text's tokens without special tokens; in training data each document ends with the
  end-of-text token.
- masked-lm: the text's tokens with the tokenizer's special tokens around them; without packing cut to `sequence_len`.
  `words`, with whole-word masking: for each token the number of its word, counted from 1, and 0 for special ones.
- classification: the same, cut to `sequence_len`, and the label; with several labels a text, their ids in `classes`.
- translation: prefix and source text, cut to `sequence_len`; `labels`: target text, cut to `target_sequence_len`; both
  with the tokenizer's special tokens.
- question-answering: question and a part of the context (`tasks.answers`); several rows a question.
- token-classification: the words' tokens, and in `tags` for each its tag's id, or -100 where nothing is scored.
- chat: the conversation as the chat template writes it, and `answered`, 1 for the tokens that the assistant says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from llmpipe_cli.errors import UsageError

if TYPE_CHECKING:
    from llmpipe_cli.data.sources import Fields, Record
    from llmpipe_cli.data.tokenizer import Encoder
    from llmpipe_cli.recipe.schema import DataSection, DataSource

AVAILABLE_TASKS = (
    "causal-lm",
    "masked-lm",
    "chat",
    "classification",
    "question-answering",
    "translation",
    "token-classification",
)

_WHITE_SPACE = re.compile(r"\s+")
_IGNORED = -100


@dataclass(frozen=True)
class FeatureOptions:
    """What the tokens of a split depend on, besides text and tokenizer; part of the cache's fingerprint.

    `separator` is the token put after each document, or None. Lengths are None where nothing is cut. `scored` keeps
    what metrics need besides tokens. `label_names` are filled in once they are known.
    """

    task: str
    texts: tuple[str, ...]
    label: str | None = None
    max_length: int | None = None
    max_target_length: int | None = None
    source_prefix: str = ""
    separator: int | None = None
    scored: bool = False
    whole_words: bool = False
    multi_label: bool = False
    stride: int = 0
    too_long: Literal["cut", "skip", "stop"] = "cut"
    label_names: tuple[str, ...] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        if self.task == "translation":
            return ("input_ids", "labels")
        if self.task == "question-answering":
            return ("input_ids", "token_types", "facts", *(("offsets",) if self.scored else ()))
        if self.task == "token-classification":
            return ("input_ids", "tags")
        if self.task == "chat":
            return ("input_ids", "answered")
        if self.task == "classification" and self.multi_label:
            return ("input_ids", "classes")
        return ("input_ids", "words") if self.whole_words else ("input_ids",)

    @property
    def names_labels_first(self) -> bool:
        """Whether encoding needs the labels' ids, which then have to be known before it begins."""
        return self.task == "token-classification" or self.multi_label


@dataclass
class Features:
    """The tokens of some records: for each column one list a row, which includes the separator if there is one.

    `num_words` counts runs of white space (the words of a text are one more than its runs, and runs add up over the
    pieces of a document); `num_bytes` is the UTF-8 length of the record's own text. `num_rows` is how many rows each
    record became. `truncated` are the records that were cut, `errors` those that became nothing, and why; `examples`
    what the metrics need of each record.
    """

    tokens: dict[str, list[list[int]]]
    num_white_spaces: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    num_rows: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)


def check_available(task: str) -> None:
    """Raises `UsageError` for a task that there is not."""
    if task not in AVAILABLE_TASKS:
        raise UsageError(
            f"task {task!r} is not available yet", where="task", hint=f"available: {', '.join(AVAILABLE_TASKS)}"
        )


def feature_options(
    task: str, data: DataSection, source: DataSource, *, end_of_text: int | None, training: bool
) -> FeatureOptions:
    """The options of one split. `end_of_text` is the tokenizer's token that separates documents."""
    length = data.sequence_len
    if task == "causal-lm":
        return FeatureOptions(task, (source.text,), separator=end_of_text if training else None)
    if task == "masked-lm":
        whole_words = data.whole_word_masking
        if data.packing is not False:
            return FeatureOptions(task, (source.text,), whole_words=whole_words)
        return FeatureOptions(
            task, (source.text,), max_length=length, whole_words=whole_words, too_long=source.on_too_long
        )
    if task == "classification":
        return FeatureOptions(
            task,
            (source.text,),
            source.label,
            length,
            multi_label=data.multi_label,
            too_long=source.on_too_long,
        )
    if task == "question-answering":
        return FeatureOptions(
            task,
            (source.context, source.question, source.answers),
            max_length=length,
            stride=data.stride,
            scored=not training,
        )
    if task == "token-classification":
        return FeatureOptions(task, (source.words,), source.tags, length, too_long=source.on_too_long)
    if task == "chat":
        return FeatureOptions(task, (source.messages,), max_length=length, too_long=source.on_too_long)
    return FeatureOptions(
        task,
        (source.source, source.target),
        max_length=length,
        max_target_length=data.target_sequence_len or length,
        source_prefix=data.source_prefix,
        scored=not training,
        too_long=source.on_too_long,
    )


def record_fields(options: FeatureOptions) -> Fields:
    """The fields that a source has to deliver."""
    from llmpipe_cli.data import rows
    from llmpipe_cli.data.sources import Fields

    if options.task == "question-answering":
        return Fields(options.texts, parse=rows.question_record, parse_document=rows.question_records)
    if options.task == "token-classification":
        return Fields(options.texts, options.label, parse=rows.tagged_record)
    if options.task == "chat":
        return Fields(options.texts, parse=rows.conversation_record)
    if options.multi_label:
        return Fields(options.texts, options.label, parse=rows.multi_label_record)
    return Fields(options.texts, options.label)


def encode_records(options: FeatureOptions, encoder: Encoder, records: Sequence[Record]) -> Features:
    """Tokenises a few records."""
    features = _ENCODERS[options.task](options, encoder, records)
    texts = [record.texts[0] for record in records]
    features.num_white_spaces = [sum(1 for _ in _WHITE_SPACE.finditer(text)) for text in texts]
    features.num_bytes = [len(text.encode()) for text in texts]
    features.num_rows = features.num_rows or [1] * len(records)
    if options.too_long != "cut":
        _leave_out_truncated(options, features)
    return features


def _leave_out_truncated(options: FeatureOptions, features: Features) -> None:
    """Records that were cut become errors without rows."""
    starts = [0]
    for count in features.num_rows:
        starts.append(starts[-1] + count)
    limits = f"{options.max_length} tokens"
    if options.max_target_length is not None:
        limits += f", or its target {options.max_target_length}"
    for index in features.truncated:
        features.errors[index] = f"longer than {limits}"
        features.num_rows[index] = 0
    for column, rows in features.tokens.items():
        dropped = {row for index in features.truncated for row in range(starts[index], starts[index + 1])}
        features.tokens[column] = [row for number, row in enumerate(rows) if number not in dropped]
    if features.examples:
        cut = set(features.truncated)
        features.examples = [each for index, each in enumerate(features.examples) if index not in cut]
    features.truncated = []


def _encode_causal(options: FeatureOptions, encoder: Encoder, records: Sequence[Record]) -> Features:
    ids = [encoder.encode(record.texts[0]) for record in records]
    if options.separator is not None:
        ids = [[*row, options.separator] if record.last else row for row, record in zip(ids, records, strict=True)]
    return Features({"input_ids": ids})


def _encode_masked(options: FeatureOptions, encoder: Encoder, records: Sequence[Record]) -> Features:
    if options.whole_words:
        encoded = [
            encoder.encode_with_words(record.texts[0], first=record.first, last=record.last) for record in records
        ]
        ids, words = [each[0] for each in encoded], [each[1] for each in encoded]
        if options.max_length is None:
            return Features({"input_ids": ids, "words": words})
        cut = [
            encoder.cut(row, numbers, options.max_length) if record.first else ([], [])
            for row, numbers, record in zip(ids, words, records, strict=True)
        ]
        truncated = [index for index, row in enumerate(ids) if len(row) > options.max_length]
        return Features({"input_ids": [row for row, _ in cut], "words": [row for _, row in cut]}, truncated=truncated)
    if options.max_length is not None:
        ids, truncated = encoder.encode_truncated([record.texts[0] for record in records], options.max_length)
        ids = [row if record.first else [] for row, record in zip(ids, records, strict=True)]  # cut after one piece
        return Features({"input_ids": ids}, truncated=truncated)
    ids = [
        encoder.encode_with_special_tokens(record.texts[0], first=record.first, last=record.last) for record in records
    ]
    return Features({"input_ids": ids})


def _encode_classification(options: FeatureOptions, encoder: Encoder, records: Sequence[Record]) -> Features:
    assert options.max_length is not None
    ids, truncated = encoder.encode_truncated([record.texts[0] for record in records], options.max_length)
    tokens = {"input_ids": ids}
    if options.multi_label:
        assert options.label_names is not None
        number = {name: index for index, name in enumerate(options.label_names)}
        tokens["classes"] = [[number[label] for label in record.labels] for record in records]
    return Features(tokens, truncated=truncated)


def _encode_translation(options: FeatureOptions, encoder: Encoder, records: Sequence[Record]) -> Features:
    assert options.max_length is not None
    assert options.max_target_length is not None
    sources = [options.source_prefix + record.texts[0] for record in records]
    ids, truncated = encoder.encode_truncated(sources, options.max_length)
    targets, cut = encoder.encode_truncated(
        [record.texts[1] for record in records], options.max_target_length, target=True
    )
    examples = [{"source": record.texts[0], "target": record.texts[1]} for record in records] if options.scored else []
    return Features({"input_ids": ids, "labels": targets}, truncated=sorted({*truncated, *cut}), examples=examples)


def _encode_questions(options: FeatureOptions, encoder: Encoder, records: Sequence[Record]) -> Features:
    from llmpipe_cli.tasks.answers import encode_question

    assert options.max_length is not None
    features = Features({name: [] for name in options.columns})
    for index, record in enumerate(records):
        try:
            rows = encode_question(encoder, record.value, options.max_length, options.stride, scored=options.scored)
        except ValueError as error:
            features.errors[index] = str(error)
            rows = []
        features.num_rows.append(len(rows))
        for row in rows:
            for name in options.columns:
                features.tokens[name].append(row[name])
        if options.scored and rows:
            answers = [text for text, _ in record.value["answers"]]
            kept = {name: record.value[name] for name in ("id", "question", "context")}
            features.examples.append({**kept, "answers": answers})
    return features


def _encode_tagged(options: FeatureOptions, encoder: Encoder, records: Sequence[Record]) -> Features:
    """The tag of a word is that of its first token; the others, and special tokens, are not scored."""
    assert options.max_length is not None
    assert options.label_names is not None
    number = {name: index for index, name in enumerate(options.label_names)}
    features = Features({"input_ids": [], "tags": []})
    for index, record in enumerate(records):
        ids, words = encoder.encode_words(record.value, options.max_length)
        tags, before = [], None
        for word in words:
            tags.append(_IGNORED if word is None or word == before else number[record.labels[word]])
            before = word
        if sum(tag != _IGNORED for tag in tags) < sum(bool(word.strip()) for word in record.value):
            features.truncated.append(index)
        features.tokens["input_ids"].append(ids)
        features.tokens["tags"].append(tags)
    return features


def _encode_chat(options: FeatureOptions, encoder: Encoder, records: Sequence[Record]) -> Features:
    assert options.max_length is not None
    features = Features({"input_ids": [], "answered": []})
    for index, record in enumerate(records):
        try:
            ids, answered = encoder.chat.encode(record.value)
        except ValueError as error:
            features.errors[index] = str(error)
            features.num_rows.append(0)
            continue
        if len(ids) > options.max_length:
            features.truncated.append(index)
            ids, answered = ids[: options.max_length], answered[: options.max_length]
            if not any(answered[1:]):
                features.errors[index] = f"no answer begins within the first {options.max_length} tokens"
                features.truncated.pop()
                features.num_rows.append(0)
                continue
        features.num_rows.append(1)
        features.tokens["input_ids"].append(ids)
        features.tokens["answered"].append(answered)
    return features


_ENCODERS = {
    "causal-lm": _encode_causal,
    "masked-lm": _encode_masked,
    "chat": _encode_chat,
    "classification": _encode_classification,
    "question-answering": _encode_questions,
    "translation": _encode_translation,
    "token-classification": _encode_tagged,
}
