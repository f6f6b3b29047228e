"""The files of one prepared split: token columns and a table of documents, both memory-mapped.

    <column>.bin      all values of a column, one document after the other: tokens (uint16 or uint32, little endian), or
                      numbers of another kind, such as tags (int32)
    documents.bin     int64 [num_documents, num_fields]: for each column where the document's tokens start and how many
                      they are (its separator not counted), then words, bytes and, if there is one, the label's id
    examples.jsonl    data to be scored whose metrics need texts (answers, references): a JSON object an example
    meta.json         `SplitMeta`: the types, the counts and the malformed records that were left out

`SplitWriter` appends, `open_columns` maps; neither holds more than a few megabytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

TOKEN_COLUMNS = ("input_ids", "labels")
EXAMPLES = "examples.jsonl"


class SplitMeta(BaseModel):
    """What is known about a split without opening its arrays."""

    columns: list[str]
    dtypes: dict[str, str]
    separated: bool
    """Each document is followed by one separator token."""
    num_documents: int
    num_tokens: dict[str, int]
    """Tokens of each column, separators included."""
    num_words: int
    num_bytes: int
    num_skipped: int
    num_truncated: int
    longest_document_tokens: int
    skipped_examples: list[str]
    truncated_examples: list[str] = []
    label_names: list[str] | None
    num_examples: int = 0
    """Lines of examples.jsonl."""
    digest: str
    """Hash of all arrays."""


class SplitWriter:
    """Writes a split document by document.

    Args:
        folder: an existing, empty folder.
        columns: names of the token columns.
        vocab_size: one more than the largest token id; decides the type.
        separated: the tokens of each document end with one separator.
        labelled: documents have a label.
    """

    def __init__(
        self, folder: Path, columns: Sequence[str], vocab_size: int, *, separated: bool, labelled: bool
    ) -> None:
        self.folder = folder
        self.columns = list(columns)
        tokens = np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")
        self.dtypes = {name: tokens if name in TOKEN_COLUMNS else np.dtype("<i4") for name in self.columns}
        self.separated = separated
        self.labelled = labelled
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in self.columns}
        self._table = (folder / "documents.bin").open("wb")
        self._examples: IO[str] | None = None
        self.num_examples = 0
        self._hash = hashlib.sha256(tokens.str.encode())
        self._stops = dict.fromkeys(self.columns, 0)
        self._starts = dict.fromkeys(self.columns, 0)
        self._rows: list[list[int]] = []
        self._words = self._bytes = 0
        self.num_documents = self.num_words = self.num_bytes = self.longest = 0

    def append_tokens(self, column: str, tokens: npt.NDArray[np.int32]) -> None:
        """Appends the values of one or more documents to a column, int32 [n]."""
        data = tokens.astype(self.dtypes[column]).tobytes()
        self._files[column].write(data)
        self._hash.update(data)

    def append_example(self, example: dict[str, Any]) -> None:
        """Appends to the examples: what the metrics need to know and the model does not read."""
        if self._examples is None:
            self._examples = (self.folder / EXAMPLES).open("w", encoding="utf-8")
        line = json.dumps(example, ensure_ascii=False)
        self._examples.write(line + "\n")
        self._hash.update(line.encode())
        self.num_examples += 1

    def append_piece(
        self,
        num_tokens: dict[str, int],
        num_white_spaces: int,
        num_bytes: int,
        *,
        last: bool = True,
        label: int | None = None,
    ) -> None:
        """Adds a piece of the current document, whose tokens were or will be appended; `last` completes it."""
        for name, count in num_tokens.items():
            self._stops[name] += count
        self._words += num_white_spaces
        self._bytes += num_bytes
        if not last:
            return
        row = []
        for name in self.columns:
            count = self._stops[name] - self._starts[name] - self.separated
            row += [self._starts[name], count]
            self._starts[name] = self._stops[name]
            self.longest = max(self.longest, count)
        row += [self._words + 1, self._bytes]
        self._rows.append([*row, label] if label is not None else row)
        self.num_documents += 1
        self.num_words += self._words + 1
        self.num_bytes += self._bytes
        self._words = self._bytes = 0
        if len(self._rows) >= 8192:
            self._flush_rows()

    def close(
        self,
        *,
        num_skipped: int,
        num_truncated: int,
        skipped_examples: list[str],
        truncated_examples: Sequence[str] = (),
        label_names: list[str] | None,
        label_ids: Sequence[int] | None = None,
    ) -> SplitMeta:
        """Finishes the files. `label_ids[i]`, when given, is the final id of the label that was appended as i."""
        self._flush_rows()
        for file in (*self._files.values(), self._table):
            file.close()
        if self._examples is not None:
            self._examples.close()
        if label_ids is not None and self.num_documents:
            self._renumber_labels(label_ids)
        self._hash.update(repr(label_names).encode())
        meta = SplitMeta(
            columns=self.columns,
            dtypes={name: dtype.str for name, dtype in self.dtypes.items()},
            separated=self.separated,
            num_documents=self.num_documents,
            num_tokens=self._stops,
            num_words=self.num_words,
            num_bytes=self.num_bytes,
            num_skipped=num_skipped,
            num_truncated=num_truncated,
            longest_document_tokens=self.longest,
            skipped_examples=skipped_examples,
            truncated_examples=list(truncated_examples),
            label_names=label_names,
            num_examples=self.num_examples,
            digest=self._hash.hexdigest(),
        )
        (self.folder / "meta.json").write_text(meta.model_dump_json(indent=1))
        return meta

    def _flush_rows(self) -> None:
        if self._rows:
            data = np.array(self._rows, dtype="<i8").tobytes()
            self._table.write(data)
            self._hash.update(data)
            self._rows = []

    def _renumber_labels(self, label_ids: Sequence[int]) -> None:
        mapped = np.memmap(self.folder / "documents.bin", "<i8", "r+")
        table = mapped.reshape(self.num_documents, -1)
        final = np.asarray(label_ids, dtype=np.int64)
        for start in range(0, self.num_documents, 1 << 16):
            part = table[start : start + (1 << 16)]
            part[:, -1] = final[part[:, -1]]
        mapped.flush()


def read_examples(folder: Path) -> list[dict[str, Any]]:
    """The examples of a split, in order; none where its task needs none."""
    path = folder / EXAMPLES
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def read_meta(folder: Path) -> SplitMeta:
    """The description of a split that `SplitWriter` wrote."""
    return SplitMeta.model_validate_json((folder / "meta.json").read_text())


class Documents:
    """The memory-mapped arrays of a split.

    `tokens[column]` is uint16, uint32 or int32 [num_tokens]; `starts[column]`, `counts[column]`, `words`, `bytes` and
    `labels` (None without labels) are int64 [num_documents].
    """

    def __init__(self, folder: Path) -> None:
        self.meta = read_meta(folder)
        meta = self.meta
        self.tokens = {
            name: _map(folder / f"{name}.bin", meta.dtypes[name], (meta.num_tokens[name],)) for name in meta.columns
        }
        labelled = meta.label_names is not None and not set(meta.columns) & {"tags", "classes"}
        num_fields = 2 * len(meta.columns) + 2 + labelled
        table = _map(folder / "documents.bin", "<i8", (meta.num_documents, num_fields))
        self.starts = {name: table[:, 2 * index] for index, name in enumerate(meta.columns)}
        self.counts = {name: table[:, 2 * index + 1] for index, name in enumerate(meta.columns)}
        self.words = table[:, 2 * len(meta.columns)]
        self.bytes = table[:, 2 * len(meta.columns) + 1]
        self.labels = table[:, -1] if labelled else None

    def __len__(self) -> int:
        return self.meta.num_documents

    def document(self, index: int, column: str = "input_ids") -> npt.NDArray[np.int64]:
        """Tokens of one document without its separator, int64 [n]."""
        start = int(self.starts[column][index])
        return self.tokens[column][start : start + int(self.counts[column][index])].astype(np.int64)


def _map(path: Path, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.integer]:
    if 0 in shape:  # an empty file cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", shape=shape)
