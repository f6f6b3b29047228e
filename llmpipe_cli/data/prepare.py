"""Turns a recipe's data into memory-mapped tokens, before any rank starts.

    files or dataset -> records -> tokens -> cache folder -> `PreparedData`

The tokenizer comes first, then the training split, then the validation split. Each has its own cache entry, named by
a fingerprint of all it depends on: files (path, size, time of change) or dataset and commit, fields, tokenizer, the
task's features. What only decides how tokens are cut into samples (`sequence_len` of a packed corpus) is not part of
it, so changing that needs no new tokenising. When all entries exist, only file sizes and small JSON files are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from llmpipe_cli.data.augment import Augmenter
from llmpipe_cli.data.cache import cached_folder, default_cache_dir, fingerprint
from llmpipe_cli.data.cleaning import Cleaner
from llmpipe_cli.data.folds import count_records, in_fold
from llmpipe_cli.data.held_out import HeldOut
from llmpipe_cli.data.mixture import ChainedSource, draws_an_epoch
from llmpipe_cli.data.prepared import PreparedData, PreparedSplit
from llmpipe_cli.data.sources import NUM_KEPT_EXAMPLES, Fields, Record, SkipLog, Source, open_source
from llmpipe_cli.data.tokenizer import TokenizerInfo, prepare_tokenizer
from llmpipe_cli.errors import UsageError
from llmpipe_cli.recipe.schema import DataSource, Recipe
from llmpipe_cli.tasks.features import FeatureOptions, check_available, feature_options, record_fields

__all__ = ["PreparedData", "PreparedSplit", "prepare"]

Progress = Callable[[str, int, int | None], None]

_VERSION = 3  # of everything that decides a split's contents and is not in its fingerprint: raise it on change
_SYNTHETIC_SAMPLES = {"train": 1 << 20, "validation": 64}
_SYNTHETIC_LABELS = 2


def prepare(
    recipe: Recipe,
    base_dir: Path,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    fold: tuple[int, int] | None = None,
) -> PreparedData:
    """Tokenises what is not in the cache yet.

    Args:
        recipe: the resolved recipe.
        base_dir: the recipe's folder, for relative file names.
        cache_dir: unset takes `LLMPIPE_CACHE` or ``~/.cache/llmpipe``.
        progress: called with (what is being done, bytes read so far, all bytes or None).
        fold: (index, number of folds) of a cross-validation: this part of the training data is the validation data,
            the others are the training data. What the recipe says of validation data is not read.

    Raises:
        UsageError: no files, a malformed record, an empty corpus, an unknown label, a task that is not available.
        PreflightError: the cache cannot be written.
    """
    return _Preparation(recipe, base_dir, cache_dir or default_cache_dir(), progress, fold).run()


def count_documents(recipe: Recipe, base_dir: Path) -> int:
    """How many different documents the training data has, as cross-validation counts them; reads all of them.

    Raises:
        UsageError: data that cannot be divided.
    """
    preparation = _Preparation(recipe, base_dir, default_cache_dir(), None)
    assert preparation.train is not None
    _check_divisible(preparation.train)
    preparation.held_out = None
    preparation.recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"augment": None})})
    options = feature_options(recipe.task, recipe.data, preparation.train, end_of_text=None, training=True)
    log = SkipLog(preparation.train.on_error)
    source, limit = preparation.sources["train"], preparation.train.max_documents
    records = preparation._records("train", source, record_fields(options), log, "counting documents", limit)
    return count_records(records)


def _check_divisible(section: DataSource) -> None:
    for field, what in (("streaming", "a stream"), ("mixture", "a mixture of sources")):
        if getattr(section, field):
            message = f"{what} cannot be divided into folds"
            raise UsageError(message, where=f"data.train.{field}", hint="cross-validate on one prepared source")


class _Preparation:
    """The state of one `prepare` call."""

    def __init__(
        self,
        recipe: Recipe,
        base_dir: Path,
        cache_dir: Path,
        progress: Progress | None,
        fold: tuple[int, int] | None = None,
    ) -> None:
        check_available(recipe.task)
        self.fold = fold
        self.recipe = recipe
        self.base_dir = base_dir
        self.cache_dir = cache_dir
        self.progress = progress
        self.train, self.validation = recipe.data.train, recipe.data.validation
        # A share of the training documents can be held out; both splits then read the training source.
        self.held_out = self.validation.fraction if self.validation else None
        if self.held_out is not None:
            if self.train is None or self.train.synthetic:
                raise UsageError(
                    "`fraction` holds out training documents, and there are none",
                    where="data.validation.fraction",
                    hint="give `data.train` files or a dataset",
                )
            self.validation = self.train
        if fold is not None:
            self.held_out, self.validation = None, self.train
        self.sources: dict[str, Source] = {}
        self._parts: list[tuple[DataSource, Source]] = []
        """The sources of the training data, if it is a mixture."""
        self._held_out: HeldOut | None = None
        for name, section in (("train", self.train), ("validation", self.validation)):
            if section is not None and section is self.train and "train" in self.sources:
                self.sources[name] = self.sources["train"]
            elif section is not None and not section.synthetic:
                self.sources[name] = self._open(section, name)

    def _open(self, section: DataSource, name: str) -> Source:
        where = f"data.{name}"
        if section.mixture is None:
            return open_source(section, self.base_dir, where=where, default_split=name)
        parts = [
            (part, open_source(part, self.base_dir, where=f"{where}.mixture.{index}", default_split=name))
            for index, part in enumerate(section.mixture)
        ]
        if section is self.train:
            self._parts = parts
        return ChainedSource(parts, self._fields)

    def _fields(self, section: DataSource) -> Fields:
        return record_fields(
            feature_options(self.recipe.task, self.recipe.data, section, end_of_text=None, training=True)
        )

    def run(self) -> PreparedData:
        if self.train is None and self.validation is None:
            raise UsageError(
                "the recipe has no data", where="data", hint='write `data: {train: {files: "corpus/*.jsonl"}}`'
            )
        tokenizer = self._tokenizer()
        vocab_size = tokenizer.vocab_size if tokenizer else _model_vocab_size(self.recipe)
        data = PreparedData(
            task=self.recipe.task,
            tokenizer_dir=tokenizer.directory if tokenizer else None,
            tokenizer_fingerprint=tokenizer.fingerprint if tokenizer else None,
            vocab_size=vocab_size,
            special_token_ids=tokenizer.special_token_ids if tokenizer else {},
            all_special_ids=tokenizer.all_special_ids if tokenizer else [],
            token_types=tokenizer.token_types if tokenizer else False,
            packing=self.recipe.packs,
            block_attention=self.recipe.blocks_attention,
            multi_label=self.recipe.data.multi_label,
            whole_word_masking=self.recipe.data.whole_word_masking,
            scoring=_scoring(self.recipe),
        )
        label_names = None if self.train else _pretrained_label_names(self.recipe, self.base_dir)
        if self.train is not None:
            if self.train.streaming:
                assert tokenizer is not None
                data.train = self._stream(self.train, tokenizer)
            elif self._parts:
                data.train = self._mixture(self.train, tokenizer, vocab_size)
            else:
                data.train = self._split("train", self.train, tokenizer, vocab_size, None)
            label_names = self._label_names(data.train.parts[0] if data.train.parts else data.train)
        if self.validation is not None:
            data.validation = self._split("validation", self.validation, tokenizer, vocab_size, label_names)
            label_names = label_names or self._label_names(data.validation)
        data.label_names = label_names
        data.class_weights = _class_weights(self.recipe, data)
        return data

    def _tokenizer(self) -> TokenizerInfo | None:
        section = self.train or self.validation
        assert section is not None
        name = "train" if self.train else "validation"
        if name not in self.sources:
            if not self.sources and self.recipe.tokenizer is None:
                return None  # random ids need no tokenizer
            name = next(iter(self.sources), name)
        if name not in self.sources:
            if not isinstance(self.recipe.tokenizer, str):
                raise UsageError(
                    "a tokenizer cannot be trained on random ids",
                    where="tokenizer",
                    hint="leave `tokenizer` out: synthetic data takes the vocabulary size of the model's config",
                )
            return prepare_tokenizer(self.recipe, self.base_dir, self.cache_dir, lambda: iter(()), {})
        source = self.sources[name]
        options = feature_options(self.recipe.task, self.recipe.data, section, end_of_text=None, training=True)
        fields = record_fields(options)

        def texts() -> Iterator[str]:
            log, doing = SkipLog(section.on_error), "training the tokenizer"
            for record in self._records(name, source, fields, log, doing, section.max_documents):
                yield from record.texts

        identity = {
            "source": source.identity(),
            "task": self.recipe.task,
            "fields": [*fields.texts, fields.label],
            "held_out": [self.held_out, self._stratified],
            "fold": self.fold,
            "max_documents": section.max_documents,
            **self._changes("train"),
        }
        return prepare_tokenizer(self.recipe, self.base_dir, self.cache_dir, texts, identity)

    def _stream(self, section: DataSource, tokenizer: TokenizerInfo) -> PreparedSplit:
        """Training data that is read while training: only what it is read from is known."""
        options = feature_options(
            self.recipe.task, self.recipe.data, section, end_of_text=tokenizer.end_of_text, training=True
        )
        _check_special_tokens(tokenizer, options, training=True)
        clean = self.recipe.data.clean
        stream = {
            "source": section.model_dump(mode="json"),
            "base_dir": str(self.base_dir.resolve()),
            "options": asdict(options),
            "tokenizer_dir": tokenizer.directory,
            "clean": clean.model_dump(mode="json") if clean is not None else None,
            "shuffle_buffer": section.shuffle_buffer,
        }
        length = self.recipe.data.sequence_len
        identity = {
            "stream": self.sources["train"].identity(),
            "options": stream["options"],
            "tokenizer": tokenizer.fingerprint,
            "shape": [length, section.shuffle_buffer, section.max_documents, section.on_error, stream["clean"]],
        }
        return self._unwritten("stream", identity, tokenizer.vocab_size).model_copy(update={"stream": stream})

    def _unwritten(
        self, kind: Literal["stream", "synthetic"], identity: dict[str, Any], vocab_size: int
    ) -> PreparedSplit:
        """A split without files: its samples come into being when they are asked for."""
        length = self.recipe.data.sequence_len
        return PreparedSplit(
            kind=kind,
            directory="",
            fingerprint=fingerprint(identity),
            task=self.recipe.task,
            sequence_len=length,
            target_sequence_len=self.recipe.data.target_sequence_len or length,
            vocab_size=vocab_size,
            num_samples=0,
        )

    def _mixture(self, section: DataSource, tokenizer: TokenizerInfo | None, vocab_size: int) -> PreparedSplit:
        """The training data of several sources: a split each, and how many of its samples an epoch has."""
        chained, first = self.sources["train"], self._parts[0][0]
        options = feature_options(self.recipe.task, self.recipe.data, first, end_of_text=None, training=True)
        names = None
        if options.label is not None:
            names = chained.label_names(options.label) or self._find_labels("train", section, chained, options)
        splits = []
        for index, (part, source) in enumerate(self._parts):
            split = self._split("train", part, tokenizer, vocab_size, names, source=source)
            origin = part.dataset or " ".join([part.files] if isinstance(part.files, str) else part.files or [])
            splits.append(split.model_copy(update={"origin": origin or f"source {index}"}))
        sizes = [split.num_samples for split in splits]
        weights = [part.weight for part, _ in self._parts if part.weight is not None]
        draws = draws_an_epoch(sizes, weights or None)
        totals = {
            field: sum(getattr(split, field) for split in splits)
            for field in ("num_documents", "num_tokens", "num_words", "num_bytes", "num_skipped", "num_truncated")
        }
        examples = {
            field: [each for split in splits for each in getattr(split, field)][:NUM_KEPT_EXAMPLES]
            for field in ("skipped_examples", "truncated_examples")
        }
        drawn = [
            [count * drawn / split.num_samples for count in split.label_counts]
            for split, drawn in zip(splits, draws, strict=True)
        ]
        return splits[0].model_copy(
            update={
                "kind": "mixture",
                "directory": "",
                "origin": "",
                "fingerprint": fingerprint({"parts": [split.fingerprint for split in splits], "draws": draws}),
                "num_samples": sum(sizes),
                "label_counts": [round(sum(counts)) for counts in zip(*drawn, strict=True)],
                "parts": splits,
                "draws": draws,
                **totals,
                **examples,
            }
        )

    def _split(
        self,
        name: str,
        section: DataSource,
        tokenizer: TokenizerInfo | None,
        vocab_size: int,
        label_names: list[str] | None,
        source: Source | None = None,
    ) -> PreparedSplit:
        if section.synthetic:
            return self._synthetic(name, section, vocab_size)
        assert tokenizer is not None
        source = source or self.sources[name]
        options = feature_options(
            self.recipe.task, self.recipe.data, section, end_of_text=tokenizer.end_of_text, training=name == "train"
        )
        _check_special_tokens(tokenizer, options, training=name == "train")
        identity = {
            "version": _VERSION,
            "source": source.identity(),
            "options": asdict(options),
            "tokenizer": tokenizer.fingerprint,
            "held_out": self._held_out_identity(name),
            "fold": self.fold if self.fold is None else [name, *self.fold],
            "max_documents": section.max_documents,
            **self._changes(name),
            "on_error": section.on_error,
            "label_names": label_names,
        }
        folder = cached_folder(
            self.cache_dir / "data" / fingerprint(identity),
            lambda directory: self._fill(directory, name, section, source, options, tokenizer, label_names),
        )
        return self._describe(name, folder, options, vocab_size)

    def _fill(
        self,
        folder: Path,
        name: str,
        section: DataSource,
        source: Source,
        options: FeatureOptions,
        tokenizer: TokenizerInfo,
        label_names: list[str] | None,
    ) -> None:
        from llmpipe_cli.data.store import SplitWriter
        from llmpipe_cli.data.tokenise import tokenise

        skipped = SkipLog(section.on_error)
        labels = None
        if options.label is not None:
            known = label_names or source.label_names(options.label)
            if known is None and options.names_labels_first:
                known = self._find_labels(name, section, source, options)
            labels = _Labels(known, fixed=known is not None)
            if options.names_labels_first:
                options = replace(options, label_names=tuple(known or ()))
        writer = SplitWriter(
            folder,
            options.columns,
            tokenizer.vocab_size,
            separated=options.separator is not None,
            labelled=labels is not None and not options.names_labels_first,
        )
        records = self._records(
            name, source, record_fields(options), skipped, f"tokenising {name} data", section.max_documents
        )
        if labels is not None:
            records = labels.checked(records, skipped)
        label_id = labels.number if labels is not None and not options.names_labels_first else None
        truncated = tokenise(records, options, tokenizer.directory, writer, label_id, self._too_long(section, skipped))
        if writer.num_documents == 0:
            raise self._no_documents(name, source, skipped)
        # Both splits of one source meet the same malformed records: they are counted with the training data alone.
        count = not (name == "validation" and (self.held_out is not None or self.fold is not None))
        final_names, final_ids = labels.sorted() if labels is not None else (None, None)
        if options.names_labels_first:
            final_ids = None
        writer.close(
            num_skipped=skipped.num_skipped if count else 0,
            num_truncated=truncated.count,
            skipped_examples=skipped.examples if count else [],
            truncated_examples=truncated.examples,
            label_names=final_names,
            label_ids=final_ids,
        )

    @staticmethod
    def _too_long(section: DataSource, skipped: SkipLog) -> SkipLog:
        """The log for records that tokens cannot be made of: `on_too_long` decides where it is given."""
        if section.on_too_long == "skip":
            return SkipLog("skip", parent=skipped)
        return SkipLog("stop") if section.on_too_long == "stop" else skipped

    def _find_labels(self, name: str, section: DataSource, source: Source, options: FeatureOptions) -> list[str]:
        """All labels of a split, sorted: a first reading of its records."""
        found = _Labels(None, fixed=False)
        fields, doing = record_fields(options), "looking for labels"
        for record in self._records(name, source, fields, SkipLog("skip"), doing, section.max_documents):
            for label in record.labels if record.label is None else (str(record.label),):
                found.ids.setdefault(label, len(found.ids))
        if not found.ids:
            raise UsageError("there is no label at all", where=f"data.{name}")
        return found.sorted()[0]

    def _records(
        self,
        name: str,
        source: Source,
        fields: Fields,
        skipped: SkipLog,
        doing: str,
        max_documents: int | None = None,
    ) -> Iterator[Record]:
        """The records of a split; of one source with a held-out share, those on this split's side."""
        records = self._cleaned(source, fields, skipped, max_documents)
        next_report = 0
        if self.fold is not None:
            records = in_fold(records, *self.fold, validation=name == "validation")
        elif self.held_out is not None:
            held_out = self._find_held_out()
            source.position_bytes = 0
            records = (each for each in records if (each in held_out) == (name == "validation"))
        if self.recipe.data.augment is not None and name == "train":
            records = Augmenter(self.recipe.data.augment, self.base_dir).records(records)
        for record in records:
            if self.progress and source.position_bytes >= next_report:
                self.progress(doing, source.position_bytes, source.total_bytes)
                next_report = source.position_bytes + (1 << 20)
            yield record
        if self.progress:
            self.progress(doing, source.position_bytes, source.position_bytes)

    def _cleaned(self, source: Source, fields: Fields, skipped: SkipLog, max_documents: int | None) -> Iterator[Record]:
        source.position_bytes = 0
        records = source.records(fields, skipped, max_documents)
        if self.recipe.data.clean is not None:
            records = Cleaner(self.recipe.data.clean).records(records, skipped)
        return records

    @property
    def _stratified(self) -> bool:
        """Whether each class is held out of by itself: classes are those of one label a text."""
        section = self.recipe.data.validation
        one_label = self.recipe.task == "classification" and not self.recipe.data.multi_label
        return self.held_out is not None and section is not None and section.stratify and one_label

    def _find_held_out(self) -> HeldOut:
        """The held-out side, found once: with classes in a first reading of all training documents."""
        if self._held_out is None:
            assert self.held_out is not None
            assert self.train is not None
            records = None
            if self._stratified:
                fields = self._fields(self.train)
                records = self._cleaned(self.sources["train"], fields, SkipLog("skip"), self.train.max_documents)
            self._held_out = HeldOut(self.held_out, records)
        return self._held_out

    def _held_out_identity(self, name: str) -> list[Any] | None:
        """What decides a split's side; with classes that is all of a mixture's documents."""
        if self.held_out is None:
            return None
        identity: list[Any] = [name, self.held_out, self._stratified]
        return [*identity, self.sources["train"].identity()] if self._stratified and self._parts else identity

    def _changes(self, name: str) -> dict[str, Any]:
        """What the recipe changes in texts, for fingerprints."""
        clean, augment = self.recipe.data.clean, self.recipe.data.augment
        return {
            "clean": clean.model_dump() if clean is not None else None,
            "augment": augment.model_dump() if augment is not None and name == "train" else None,
        }

    def _no_documents(self, name: str, source: Source, skipped: SkipLog) -> UsageError:
        where = f"data.{name}"
        if self.held_out is not None and not skipped.num_skipped:
            return UsageError(
                f"a fraction of {self.held_out} leaves the {name} data without a document",
                where="data.validation.fraction",
                hint="documents are held out by a hash of their content; give more documents or another fraction",
            )
        if skipped.examples:
            return UsageError(
                f"no document is left: {skipped.num_skipped} were skipped",
                where=where,
                hint=f"the first: {skipped.examples[0]}",
            )
        return UsageError(f"there is no document in {source.describe()}", where=where)

    def _describe(self, name: str, folder: Path, options: FeatureOptions, vocab_size: int) -> PreparedSplit:
        from llmpipe_cli.data.store import TOKEN_COLUMNS, read_meta

        meta = read_meta(folder)
        length = self.recipe.data.sequence_len
        target_length = self.recipe.data.target_sequence_len or length
        # A causal model is always scored on consecutive blocks, so that the figure does not depend on `packing`.
        packed = (options.task in ("causal-lm", "masked-lm") and self.recipe.packs) or (
            options.task == "causal-lm" and name == "validation"
        )
        binned = options.task == "chat" and self.recipe.packs and name == "train"  # scores are those of conversations
        num_tokens = sum(count for column, count in meta.num_tokens.items() if column in TOKEN_COLUMNS)
        num_samples = num_tokens // length if packed else meta.num_documents
        if binned:
            num_samples = _count_bins(folder, length)
        if packed and num_samples == 0:
            if name == "train":
                raise UsageError(
                    f"the training data has {num_tokens} tokens, fewer than one sample of {length}",
                    where="data.sequence_len",
                    hint=f"give more text, or a `sequence_len` of at most {num_tokens}",
                )
            num_samples = 1  # a short block
        num_truncated = meta.num_truncated
        if not packed and options.max_length is None:
            num_truncated = _count_longer(folder, length)
        shape = f"{meta.digest} {'bins' if binned else packed} {length} {target_length}"
        return PreparedSplit(
            kind="packed" if packed else "bins" if binned else "records",
            directory=str(folder),
            fingerprint=fingerprint({"samples": shape}),
            task=options.task,
            sequence_len=length,
            target_sequence_len=target_length,
            vocab_size=vocab_size,
            num_samples=num_samples,
            num_documents=meta.num_documents,
            num_tokens=num_tokens,
            num_words=meta.num_words,
            num_bytes=meta.num_bytes,
            num_skipped=meta.num_skipped,
            num_truncated=num_truncated,
            skipped_examples=meta.skipped_examples,
            truncated_examples=meta.truncated_examples,
            num_labels=len(meta.label_names or ()),
            label_counts=_label_counts(folder, len(meta.label_names or ())),
        )

    def _synthetic(self, name: str, section: DataSource, vocab_size: int) -> PreparedSplit:
        length = self.recipe.data.sequence_len
        target_length = self.recipe.data.target_sequence_len or length
        num_samples = section.max_documents or _SYNTHETIC_SAMPLES[name]
        num_labels = _SYNTHETIC_LABELS if self.recipe.task in ("classification", "token-classification") else 0
        identity = {"synthetic": name, "shape": [num_samples, length, target_length, vocab_size, num_labels]}
        sizes = {"num_samples": num_samples, "num_tokens": num_samples * length, "num_labels": num_labels}
        return self._unwritten("synthetic", identity, vocab_size).model_copy(update=sizes)

    def _label_names(self, split: PreparedSplit) -> list[str] | None:
        if self.recipe.task not in ("classification", "token-classification"):
            return None
        if split.kind == "synthetic":
            return [f"LABEL_{index}" for index in range(split.num_labels)]
        from llmpipe_cli.data.store import read_meta

        return read_meta(Path(split.directory)).label_names


class _Labels:
    """Numbers labels as they come, and sorts them at the end.

    Args:
        names: labels known beforehand, in the order of their ids.
        fixed: any other label is an error.
    """

    def __init__(self, names: list[str] | None, *, fixed: bool) -> None:
        self.declared = names is not None
        self.fixed = fixed
        self.ids: dict[str, int] = {name: index for index, name in enumerate(names or ())}

    def checked(self, records: Iterator[Record], skipped: SkipLog) -> Iterator[Record]:
        """The records whose label is known, or may be new."""
        for record in records:
            names = record.labels if record.label is None else (str(record.label),)
            name = next((name for name in names if name not in self.ids), None) if self.fixed else None
            if name is not None:
                near = get_close_matches(name, self.ids, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                known = ", ".join(repr(known) for known in list(self.ids)[:20])
                skipped.report(
                    UsageError(f"unknown label {name!r}", where=record.where, hint=f"{hint}the labels are {known}")
                )
                continue
            yield record

    def number(self, record: Record) -> int:
        """Id of a record's label for now; new labels get the next one."""
        return self.ids.setdefault(str(record.label), len(self.ids))

    def sorted(self) -> tuple[list[str], list[int]]:
        """The names in the order of their final ids, and for each id given so far the final one. Whole numbers are
        sorted by value, other labels by name; declared ones keep their order."""
        names = list(self.ids)
        if not self.declared:
            numeric = all(name.lstrip("-").isdecimal() for name in names)
            names.sort(key=lambda name: (int(name), name) if numeric else (0, name))
        if len(names) < 2:
            raise UsageError(
                f"all documents have the label {names[0]!r}", where="data.train.label", hint="two classes are needed"
            )
        final = {name: index for index, name in enumerate(names)}
        return names, [final[name] for name in self.ids]


def _label_counts(folder: Path, num_labels: int) -> list[int]:
    """Documents of each label; empty where documents have none, or several."""
    from llmpipe_cli.data.store import Documents

    if not num_labels or (documents := Documents(folder)).labels is None:
        return []
    import numpy as np

    return [int(count) for count in np.bincount(documents.labels, minlength=num_labels)]


def _class_weights(recipe: Recipe, data: PreparedData) -> list[float] | None:
    """The factor on the loss of each class, in the order of the labels.

    Raises:
        UsageError: a weight for a label that there is not, or counts that are not known.
    """
    given, names = recipe.data.class_weights, data.label_names
    if given is None or names is None:
        return None
    if given == "balanced":
        counts = data.train.label_counts if data.train else []
        if data.train is None:
            return None  # weights are for learning alone
        if not counts or 0 in counts:
            raise UsageError(
                "balanced class weights need training documents of each class, with one label each",
                where="data.class_weights",
                hint="write a factor for each label",
            )
        return [sum(counts) / (len(counts) * count) for count in counts]
    for name in given:
        if name not in names:
            known = ", ".join(repr(known) for known in names[:20])
            raise UsageError(f"unknown label {name!r}", where="data.class_weights", hint=f"the labels are {known}")
    return [given.get(name, 1.0) for name in names]


def _scoring(recipe: Recipe) -> dict[str, float]:
    """What of the recipe decides how the model's outputs become answers and labels."""
    options = recipe.evaluation
    names: tuple[str, ...] = ()
    if recipe.task == "question-answering":
        names = ("n_best", "max_answer_len", "null_score_threshold")
    elif recipe.task == "classification" and recipe.data.multi_label:
        names = ("threshold",)
    return {name: float(getattr(options, name)) for name in names}


def _check_special_tokens(tokenizer: TokenizerInfo, options: FeatureOptions, *, training: bool) -> None:
    if options.task == "causal-lm" and training and options.separator is None:
        raise UsageError(
            "the tokenizer has no end-of-text token, which has to stand between documents",
            where="tokenizer",
            hint="set `eos_token` in its tokenizer_config.json",
        )
    if options.task == "masked-lm" and "mask" not in tokenizer.special_token_ids:
        raise UsageError(
            "the tokenizer has no mask token, which masked-lm hides tokens behind",
            where="tokenizer",
            hint="take a tokenizer of an encoder such as BERT, or `tokenizer: {train: {vocab_size: 8000}}`",
        )


def _count_longer(folder: Path, length: int) -> int:
    from llmpipe_cli.data.store import Documents

    documents = Documents(folder)
    return int((documents.counts["input_ids"] + int(documents.meta.separated) > length).sum())


def _count_bins(folder: Path, length: int) -> int:
    from llmpipe_cli.data.bins import best_fit
    from llmpipe_cli.data.store import Documents

    return len(best_fit(Documents(folder).counts["input_ids"], length))


def _model_vocab_size(recipe: Recipe) -> int:
    """Vocabulary size of the model's config, for random ids."""
    config: dict[str, Any] = recipe.model.config or {}
    if "vocab_size" in config:
        return int(config["vocab_size"])
    from transformers import AutoConfig

    try:
        if recipe.model.from_:
            loaded = AutoConfig.from_pretrained(recipe.model.from_, revision=recipe.model.revision)
        else:
            loaded = AutoConfig.for_model(**config)
        return int(loaded.get_text_config().vocab_size)
    except Exception as error:  # unknown model_type, no such model, no vocabulary at all
        raise UsageError(
            "synthetic data needs the vocabulary size", where="model", hint="write `vocab_size` in `model.config`"
        ) from error


def _pretrained_label_names(recipe: Recipe, base_dir: Path) -> list[str] | None:
    """The labels of a pretrained classifier in a folder: without training data they are the only ones there are."""
    if recipe.task not in ("classification", "token-classification") or not recipe.model.from_:
        return None
    import json

    from llmpipe_cli.data.discover import find_folder

    folder = find_folder(recipe.model.from_, base_dir)
    if folder is None or not (folder / "config.json").is_file():
        return None
    names: dict[str, str] = json.loads((folder / "config.json").read_text()).get("id2label") or {}
    return [names[key] for key in sorted(names, key=int)] or None
