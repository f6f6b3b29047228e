"""Where text comes from: one `Record` after the other, in an order that is always the same, in constant memory.

A source is a list of files (text: one document a file; JSON Lines, CSV and parquet: one record a line or row; JSON: one
record an element of an array; CoNLL: one a sentence; each optionally compressed with gzip) or a dataset that `datasets`
opens. Records that are more than texts and a label (questions, conversations, tagged words) are read by `data.rows`.
Every source checks its records: the fields that the task needs exist, hold text, and are not empty. A malformed record
is a `UsageError` with file and line, or with `on_error: skip` it is counted in a `SkipLog` and left out. A text file
without any text is always left out and counted.

A text file of any size is read in pieces, so that a corpus in a single file needs no more memory than one in many. A
piece ends between a letter or digit and the white space that follows, where tokenizers begin a new token anyway.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any

from llmpipe_cli import hub
from llmpipe_cli.data.discover import find_files, find_folder_or_id
from llmpipe_cli.errors import UsageError
from llmpipe_cli.recipe.schema import DataSource

PIECE_CHARS = 1 << 19
"""Longest text that is tokenised at once."""

_FORMAT_BY_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".conll": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".bio": "conll",
}
NUM_KEPT_EXAMPLES = 5


@dataclass(frozen=True)
class Fields:
    """The record fields that a task reads: names of the text fields, and of the label field if there is one.

    `parse` makes a record of a row that is more than texts and a label, and `parse_document` many of one JSON document;
    None where there is no such form.
    """

    texts: tuple[str, ...]
    label: str | None = None
    parse: Callable[[dict[str, Any], Fields, str], Record] | None = None
    parse_document: Callable[[dict[str, Any], Fields, str], Iterator[Record | UsageError]] | None = None

    @property
    def names(self) -> list[str]:
        """All fields that have to be there."""
        return [*self.texts, *([self.label] if self.label else [])]


@dataclass(frozen=True)
class Record:
    """One document, or one piece of a long one.

    `texts` are in the order of `Fields.texts`. `first` and `last` are both True unless the record is a piece of a
    longer document. `digest` is a hash of the whole document's first text. `value` is what `data.rows` read besides;
    `labels` are the names of all labels in it.
    """

    where: str
    texts: tuple[str, ...]
    label: str | int | None = None
    first: bool = True
    last: bool = True
    digest: bytes = b""
    value: Any = None
    labels: tuple[str, ...] = ()


@dataclass
class SkipLog:
    """What happens to malformed records: raised at once, or counted with a few kept as examples."""

    on_error: str = "stop"
    num_skipped: int = 0
    examples: list[str] = field(default_factory=list)
    parent: SkipLog | None = None
    """The log that counts instead of this one."""

    def report(self, error: UsageError) -> None:
        """Raises `error`, or counts it when malformed records are to be skipped."""
        if self.on_error == "stop":
            hint = "`on_error: skip` under the data source leaves such records out and counts them"
            raise UsageError(error.message, where=error.where, hint=f"{error.hint}; or {hint}" if error.hint else hint)
        self.leave_out(error)

    def leave_out(self, error: UsageError) -> None:
        """Counts a record that is left out."""
        if self.parent is not None:
            self.parent.leave_out(error)
            return
        self.num_skipped += 1
        if len(self.examples) < NUM_KEPT_EXAMPLES:
            self.examples.append(f"{error.where}: {error.message}")


class Source(ABC):
    """Records in a fixed order. `total_bytes` is what `position_bytes` grows to, or None where it is not known."""

    total_bytes: int | None = None
    position_bytes: int = 0

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the records depend on, as JSON, for the cache's fingerprint; must be cheap to find out."""

    @abstractmethod
    def raw_records(self, fields: Fields, skipped: SkipLog) -> Iterator[Record]:
        """All records that can be read."""

    @abstractmethod
    def describe(self) -> str:
        """Name of the source in messages."""

    def label_names(self, label: str) -> list[str] | None:
        """Names of the integer labels, where the source itself declares them."""
        return None

    def records(self, fields: Fields, skipped: SkipLog, max_documents: int | None = None) -> Iterator[Record]:
        """The first `max_documents` records that can be read."""
        num_documents = 0
        for record in self.raw_records(fields, skipped):
            if record.first:
                if num_documents == max_documents:
                    return
                num_documents += 1
            yield record


def open_source(section: DataSource, base_dir: Path, *, where: str, default_split: str) -> Source:
    """The source that a recipe's `data.train` or `data.validation` describes.

    Raises:
        UsageError: when no file matches or the section names no data.
    """
    if section.files is not None:
        paths = find_files(section.files, section.exclude, base_dir, where=f"{where}.files")
        return FileSource(paths, section.format)
    if section.dataset is not None:
        folder = find_folder_or_id(section.dataset, base_dir, where=f"{where}.dataset")
        return HubSource(section, folder, section.split or default_split, where=f"{where}.dataset")
    raise UsageError("no data is given", where=where, hint='write `files: "corpus/*.jsonl"` or `dataset: ...`')


class FileSource(Source):
    """Files of text or records; `format` as in the recipe."""

    def __init__(self, paths: list[Path], file_format: str = "auto") -> None:
        self.paths = paths
        self.file_format = file_format
        self._stats = [path.stat() for path in paths]
        self.total_bytes = sum(stat.st_size for stat in self._stats)

    def identity(self) -> dict[str, Any]:
        files = [
            [str(path), stat.st_size, stat.st_mtime_ns] for path, stat in zip(self.paths, self._stats, strict=True)
        ]
        return {"files": files, "format": self.file_format}

    def describe(self) -> str:
        return f"{len(self.paths)} files, the first {self.paths[0]}"

    def raw_records(self, fields: Fields, skipped: SkipLog) -> Iterator[Record]:
        finished_bytes = 0
        for path, stat in zip(self.paths, self._stats, strict=True):
            reader = _READERS[self._format_of(path)]
            try:
                with _open_bytes(path) as (raw, binary):
                    for record in reader(path, binary, fields, skipped):
                        self.position_bytes = finished_bytes + raw.tell()
                        yield record
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                skipped.report(UsageError(f"broken gzip file: {error}", where=str(path), hint="copy the file again"))
            except OSError as error:
                reason = error.strerror or str(error)
                raise UsageError(f"cannot be read: {reason}", where=str(path)) from error
            finished_bytes += stat.st_size
            self.position_bytes = finished_bytes

    def _format_of(self, path: Path) -> str:
        if self.file_format != "auto":
            return self.file_format
        suffixes = [suffix.lower() for suffix in path.suffixes]
        if suffixes and suffixes[-1] == ".gz":
            suffixes.pop()
        return _FORMAT_BY_SUFFIX.get(suffixes[-1], "text") if suffixes else "text"


class HubSource(Source):
    """A dataset of the hub or of a local folder, opened by the `datasets` library when its records are read."""

    def __init__(self, section: DataSource, folder: Path | None, split: str, *, where: str) -> None:
        assert section.dataset is not None
        self.name = section.dataset
        self.folder = folder
        self.split = split
        self.section = section
        self.where = where
        self._dataset: Any = None

    def identity(self) -> dict[str, Any]:
        about: dict[str, Any] = {
            "dataset": self.name,
            "subset": self.section.subset,
            "split": self.split,
            "revision": self.section.revision,
        }
        if self.folder is not None:
            paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
            about["files"] = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
        else:
            about["commit"] = hub_commit(self.name, self.section.revision, kind="datasets")
        return about

    def describe(self) -> str:
        return f"dataset {self.name}, split {self.split}"

    def label_names(self, label: str) -> list[str] | None:
        features = getattr(self._open(), "features", None) or {}
        found = features.get(label)
        found = getattr(found, "feature", found)  # of a list of labels
        names = getattr(found, "names", None)
        return list(names) if names is not None else None

    def raw_records(self, fields: Fields, skipped: SkipLog) -> Iterator[Record]:
        dataset = self._open()
        self.total_bytes = None
        names = self.label_names(fields.label) if fields.label else None
        for number, row in enumerate(dataset, start=1):
            if names and fields.label in row:
                row = {**row, fields.label: _named(row[fields.label], names)}
            record = checked_record(row, fields, f"{self.name}[{self.split}]:{number}", skipped)
            if record is not None:
                yield record

    def _open(self) -> Any:
        if self._dataset is None:
            self._dataset = self._load()
        return self._dataset

    def _load(self) -> Any:
        no_network = hub.expect(self.folder or self.name)
        import datasets  # slow to import: only when records are really read

        datasets.disable_progress_bars()
        try:
            if self.folder is not None and (
                (self.folder / "state.json").exists() or (self.folder / "dataset_dict.json").exists()
            ):
                loaded = datasets.load_from_disk(str(self.folder))
                return loaded[self.split] if isinstance(loaded, datasets.DatasetDict) else loaded
            return datasets.load_dataset(
                str(self.folder or self.name),
                self.section.subset,
                split=self.split,
                revision=self.section.revision,
                streaming=self.section.streaming,
            )
        except Exception as error:  # the library raises many types: network, missing name, unknown split, bad files
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"dataset {self.name!r} cannot be opened: {reason}",
                where=self.where,
                hint=f"{no_network}check the id or folder, `subset` and `split`",
            ) from error


def _named(label: Any, names: list[str]) -> Any:
    """Label ids as the names that the dataset declares for them."""
    if isinstance(label, list):
        return [_named(each, names) for each in label]
    return names[label] if isinstance(label, int) and 0 <= label < len(names) else label


def hub_commit(name: str, revision: str | None, *, kind: str) -> str | None:
    """The commit that a branch of a hub repository had when it was last downloaded here; None if it never was."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    ref = cache / f"{kind}--{name.replace('/', '--')}" / "refs" / (revision or "main")
    return ref.read_text().strip() if ref.is_file() else None


def cut_text(text: str, limit: int = PIECE_CHARS) -> int:
    """Where to end the first piece of a `text` longer than `limit`: at most `limit`, and where a new token begins
    anyway if the text has such a place: before a line end (or else a space) that follows a letter or digit."""
    for mark in ("\n", " "):
        end = text.rfind(mark, 1, limit)
        while end > 0 and not text[end - 1].isalnum():
            end = text.rfind(mark, 1, end)
        if end > 0:
            return end
    return limit


class _open_bytes:  # noqa: N801  (used like the builtin `open`)
    """Opens `path` for reading bytes, decompressed when it is gzip; gives (the raw file, the stream of bytes)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> tuple[IO[bytes], IO[bytes]]:
        self.raw: IO[bytes] = self.path.open("rb")
        if self.path.suffix.lower() == ".gz":
            return self.raw, io.BufferedReader(gzip.GzipFile(fileobj=self.raw))
        return self.raw, self.raw

    def __exit__(self, *exception: object) -> None:
        self.raw.close()


def _read_text(path: Path, binary: IO[bytes], fields: Fields, skipped: SkipLog) -> Iterator[Record]:
    """The whole file as one document, in pieces when it is long."""
    if len(fields.texts) != 1 or fields.label is not None or fields.parse is not None:
        raise UsageError(
            f"a plain text file has no fields {', '.join(fields.names)}",
            where=str(path),
            hint="this task needs records: JSON Lines, CSV or parquet (`format` overrides the file name's ending)",
        )
    head = binary.read(4 * PIECE_CHARS)
    if len(head) < 4 * PIECE_CHARS:
        try:
            text = head.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            skipped.report(_not_utf8(path, 1 + head.count(b"\n", 0, error.start), error))
            return
        if not text.strip():
            # no mistake: source trees are full of empty files
            skipped.leave_out(UsageError("the file is empty", where=f"{path}:1"))
            return
        yield Record(f"{path}:1", (text,), digest=digest_of(text))
        return
    # A long file is read twice: a document that turns out not to be UTF-8 must be skipped as a whole.
    try:
        digest = _check_utf8(path, chain([head], iter(lambda: binary.read(PIECE_CHARS), b"")))
    except UsageError as error:
        skipped.report(error)
        return
    with _open_bytes(path) as (_, again):
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        text, first, line = "", True, 1
        while block := again.read(PIECE_CHARS):
            text += decoder.decode(block)
            while len(text) > 2 * PIECE_CHARS:  # never cut the last piece: it must be known to be the last
                end = cut_text(text)
                yield Record(f"{path}:{line}", (text[:end],), first=first, last=False, digest=digest)
                line += text.count("\n", 0, end)
                text, first = text[end:], False
        yield Record(f"{path}:{line}", (text + decoder.decode(b"", final=True),), first=first, digest=digest)


def _check_utf8(path: Path, blocks: Iterator[bytes]) -> bytes:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    hashed = hashlib.blake2b(digest_size=16)
    line = 1
    for block in chain(blocks, [b""]):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, line + error.object.count(b"\n", 0, error.start), error) from None
        hashed.update(text.encode())
        line += text.count("\n")
    return hashed.digest()


def _read_jsonl(path: Path, binary: IO[bytes], fields: Fields, skipped: SkipLog) -> Iterator[Record]:
    head = binary.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1]  # type: ignore[attr-defined]
    is_json = ".json" in path.suffixes
    if head == b"[" or (head == b"{" and is_json and fields.parse_document is not None):
        data = binary.read()
        if head == b"[":
            yield from _read_json_array(path, data, fields, skipped)
            return
        if (document := _json_document(data)) is not None:
            assert fields.parse_document is not None
            for found in fields.parse_document(document, fields, f"{path}"):
                if isinstance(found, UsageError):
                    skipped.report(found)
                else:
                    yield found
            return
        binary = io.BytesIO(data)  # an object a line after all
    yield from _read_json_lines(path, binary, fields, skipped)


def _json_document(data: bytes) -> dict[str, Any] | None:
    """The single JSON object of a file that holds its records under `data`; None for anything else."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) and isinstance(document.get("data"), list) else None


def _read_json_array(path: Path, data: bytes, fields: Fields, skipped: SkipLog) -> Iterator[Record]:
    """One record an element; each is named by the line that it begins on. The file has to fit into memory."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        skipped.report(_not_utf8(path, 1 + data.count(b"\n", 0, error.start), error))
        return
    decoder, position, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        position = _after_space(text, position)
        if text[position : position + 1] in ("]", ""):
            return
        line += text.count("\n", counted, position)
        counted = position
        try:
            row, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            skipped.report(UsageError(f"not JSON: {reason}; the rest of the file is lost", where=f"{path}:{line}"))
            return
        if (record := checked_record(row, fields, f"{path}:{line}", skipped)) is not None:
            yield record
        position = _after_space(text, position)
        position += text[position : position + 1] == ","


_SPACE = re.compile(r"\s*")


def _after_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    assert found is not None
    return found.end()


def _read_json_lines(path: Path, binary: IO[bytes], fields: Fields, skipped: SkipLog) -> Iterator[Record]:
    for number, line in enumerate(binary, start=1):
        where = f"{path}:{number}"
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        line = line.rstrip()
        if not line:
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            skipped.report(_not_utf8(path, number, error))
            continue
        except json.JSONDecodeError as error:
            skipped.report(UsageError(f"not JSON: {error.msg}", where=f"{where}:{error.colno}"))
            continue
        except RecursionError:
            skipped.report(UsageError("not JSON that can be read: nested too deeply", where=where))
            continue
        if (record := checked_record(row, fields, where, skipped)) is not None:
            yield record


def _read_csv(path: Path, binary: IO[bytes], fields: Fields, skipped: SkipLog) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    # Bytes that are not UTF-8 become lone surrogates here, so that the record they are in can be named and skipped.
    text = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
    except csv.Error as error:
        skipped.report(UsageError(f"not CSV: {error}", where=f"{path}:1"))
        return
    if header is None:
        skipped.report(UsageError("the file is empty", where=f"{path}:1"))
        return
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            skipped.report(UsageError(f"not CSV: {error}", where=f"{path}:{reader.line_num}"))
            continue
        if row is None:
            break
        if not row:
            continue
        if len(row) != len(header):
            message = f"{len(row)} columns where the header names {len(header)}"
            skipped.report(UsageError(message, where=f"{path}:{line}", hint="quote values that hold the delimiter"))
            continue
        record = checked_record(dict(zip(header, row, strict=True)), fields, f"{path}:{line}", skipped)
        if record is not None:
            yield record
    text.detach()  # the caller closes the file


def _read_parquet(path: Path, binary: IO[bytes], fields: Fields, skipped: SkipLog) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    # a dotted name means a field inside a column
    wanted = [name.partition(".")[0] for name in fields.names] if fields.parse is None else []
    try:
        table = pyarrow.parquet.ParquetFile(binary)
        number = 0
        columns = [name for name in wanted if name in table.schema_arrow.names] if wanted else None
        for batch in table.iter_batches(256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                if number == 1 and (missing := [name for name in wanted if name not in row]):
                    # every row lacks it: no use in skipping them one by one
                    raise missing_field(missing[0], table.schema_arrow.names, str(path))
                if (record := checked_record(row, fields, f"{path}:{number}", skipped)) is not None:
                    yield record
    except pyarrow.ArrowException as error:
        reason = (str(error).splitlines() or ["?"])[0]
        skipped.report(UsageError(f"not a parquet file that can be read: {reason}", where=str(path)))


def _read_conll(path: Path, binary: IO[bytes], fields: Fields, skipped: SkipLog) -> Iterator[Record]:
    """Sentences with a word a line, its tag in the last column, and an empty line after each sentence."""
    if len(fields.texts) != 1 or fields.label is None:
        raise UsageError(
            "a CoNLL file has words and tags, which the task does not read",
            where=str(path),
            hint="task: token-classification",
        )
    words: list[str] = []
    tags: list[str] = []
    start, broken = 1, False
    for number, line in enumerate(chain(binary, [b""]), start=1):
        try:
            columns = line.decode("utf-8-sig" if number == 1 else "utf-8").split()
        except UnicodeDecodeError as error:
            skipped.report(_not_utf8(path, number, error))
            broken = True
            continue
        if columns and not columns[0].startswith("-DOCSTART-"):
            start = start if words or broken else number
            if len(columns) < 2 and not broken:
                skipped.report(UsageError(f"the word {columns[0]!r} has no tag", where=f"{path}:{number}"))
                broken = True
            words.append(columns[0])
            tags.append(columns[-1])
        elif words or broken:
            row = {fields.texts[0]: words, fields.label: tags}
            if not broken and (record := checked_record(row, fields, f"{path}:{start}", skipped)) is not None:
                yield record
            words, tags, broken = [], [], False


_READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "conll": _read_conll,
}


def checked_record(row: Any, fields: Fields, where: str, skipped: SkipLog) -> Record | None:
    """The record of a row; a malformed one is reported and None."""
    try:
        return _record(row, fields, where)
    except UsageError as error:
        skipped.report(error)
        return None


def _record(row: Any, fields: Fields, where: str) -> Record:
    if not isinstance(row, dict):
        raise UsageError(f"a record must be an object with fields, not {type_name(row)}", where=where)
    if fields.parse is not None:
        record = fields.parse(row, fields, where)
        return replace(record, digest=digest_of(record.texts[0]))
    texts = tuple(text_of(row, name, where) for name in fields.texts)
    label = _label(row, fields.label, where) if fields.label else None
    return Record(where, texts, label, digest=digest_of(texts[0]))


def text_of(row: dict[str, Any], name: str, where: str) -> str:
    """The text in a field of a row; `UsageError` where there is none."""
    if name not in row:
        outer, dot, inner = name.partition(".")
        if dot and isinstance(row.get(outer), dict):  # translation.en of {"translation": {"en": ..., "de": ...}}
            return text_of(row[outer], inner, where)
        raise missing_field(name, list(row), where)
    text = row[name]
    if not isinstance(text, str):
        raise UsageError(f"field {name!r} holds {type_name(text)}, not text", where=where)
    if not text.strip():
        raise UsageError(f"field {name!r} is empty", where=where)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"field {name!r} is not UTF-8", where=where, hint="convert the file with iconv") from None
    return text


def _label(row: dict[str, Any], name: str, where: str) -> str | int:
    if name not in row:
        raise missing_field(name, list(row), where)
    label = row[name]
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, int) or (isinstance(label, str) and label.strip()):
        return label
    what = "is empty" if label == "" or isinstance(label, str) else f"holds {type_name(label)}"
    raise UsageError(f"label field {name!r} {what}; a label is text or a whole number", where=where)


def missing_field(name: str, present: list[str], where: str) -> UsageError:
    """The error of a field that a row lacks, with the nearest one that it has."""
    near = difflib.get_close_matches(name, present, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    listed = ", ".join(repr(key) for key in present[:20]) or "none"
    return UsageError(f"there is no field {name!r}", where=where, hint=f"{hint}the fields are {listed}")


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> UsageError:
    byte = error.object[error.start]
    return UsageError(f"not UTF-8: byte 0x{byte:02x}", where=f"{path}:{line}", hint="convert the file with iconv")


def digest_of(text: str) -> bytes:
    """Hash of a document's text: decides on which side of a split it lies."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def type_name(value: Any) -> str:
    """What a value is, in words of JSON."""
    names = {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")
