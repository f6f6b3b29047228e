"""Reading text: formats, order of files, and every kind of malformed record with its place."""

from __future__ import annotations

import csv
import gzip
import json
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from llmpipe_cli.data.discover import find_files
from llmpipe_cli.data.sources import PIECE_CHARS, Fields, FileSource, Record, SkipLog, cut_text, open_source
from llmpipe_cli.errors import UsageError
from llmpipe_cli.recipe.schema import DataSource

STDLIB = Path(sysconfig.get_paths()["stdlib"])
TEXT = Fields(("text",))
LABELLED = Fields(("text",), "label")
TEXTS = [(STDLIB / name).read_text("utf-8") for name in ("this.py", "heapq.py", "csv.py")]  # quotes, commas, line ends


def read(path: Path, fields: Fields = TEXT, on_error: str = "stop") -> list[Record]:
    return list(FileSource([path]).records(fields, SkipLog(on_error)))


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def as_format(folder: Path, name: str) -> Path:
    rows = [{"id": str(index), "text": text, "label": "ab"[index % 2]} for index, text in enumerate(TEXTS)]
    path = folder / name
    kind = name.removesuffix(".gz").split(".")[-1]
    if kind in ("jsonl", "json", "ndjson"):
        return write(path, "".join(json.dumps(row) + "\n" for row in rows))
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    plain = folder / "plain"
    with plain.open("w", newline="") as file:
        table = csv.DictWriter(file, ["id", "text", "label"], delimiter="\t" if kind == "tsv" else ",")
        table.writeheader()
        table.writerows(rows)
    return write(path, plain.read_bytes())


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.csv", "a.CSV", "a.csv.gz", "a.tsv", "a.parquet"]
)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    path = as_format(tmp_path, name) if name != "a.CSV" else as_format(tmp_path, "a.csv").rename(tmp_path / name)
    records = read(path, LABELLED)
    assert [record.texts[0] for record in records] == TEXTS
    assert [record.label for record in records] == ["a", "b", "a"]
    assert all(record.where.startswith(f"{path}:") for record in records)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    for name, content in [("a.py", TEXTS[0]), ("b.txt.gz", TEXTS[1]), ("c", "\ufeff" + TEXTS[2])]:
        (record,) = read(write(tmp_path / name, content))
        assert record.texts == (content.removeprefix("\ufeff"),)
        assert record.first
        assert record.last


def test_places_in_csv_count_lines_not_records(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,n\n"two\nlines",1\nplain,2\n')
    assert [record.where for record in read(path)] == [f"{path}:2", f"{path}:4"]


def test_a_long_text_file_comes_in_pieces(tmp_path: Path) -> None:
    text = "".join((STDLIB / name).read_text("utf-8") for name in sorted(p.name for p in STDLIB.glob("[a-z]*.py")))
    assert len(text) > 4 * PIECE_CHARS
    for path in (write(tmp_path / "long.txt", text), write(tmp_path / "long.txt.gz", text)):
        pieces = read(path)
        assert "".join(piece.texts[0] for piece in pieces) == text
        assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert max(len(piece.texts[0]) for piece in pieces) <= 3 * PIECE_CHARS
        assert len({piece.digest for piece in pieces}) == 1
        for piece in pieces[:-1]:
            assert piece.texts[0][-1].isalnum()
        third = pieces[2]
        assert int(third.where.rsplit(":", 1)[1]) == 1 + sum(piece.texts[0].count("\n") for piece in pieces[:2])


def test_cut_prefers_line_ends_then_spaces() -> None:
    assert cut_text("one two\nthree four five", 20) == 7
    assert cut_text("one two;\nthree four five", 21) == 19
    assert cut_text("....", 3) == 3


MALFORMED_JSONL = [
    (b'{"text": "a"', "not JSON", ":2:13", None),
    (b'{"text": "a"} x', "not JSON", ":2:15", None),
    (b'{"txt": "a", "id": 3}', "no field 'text'", ":2", "did you mean 'txt'? the fields are 'txt', 'id'"),
    (b"{}", "no field 'text'", ":2", "the fields are none"),
    (b'{"text": null}', "holds null", ":2", None),
    (b'{"text": 3}', "holds a number", ":2", None),
    (b'{"text": ["a"]}', "holds a list", ":2", None),
    (b'{"text": ""}', "is empty", ":2", None),
    (b'{"text": " \\n\\t"}', "is empty", ":2", None),
    (b'"text"', "must be an object", ":2", None),
    (b'["text"]', "must be an object", ":2", None),
    (b'{"text": "\xff"}', "not UTF-8: byte 0xff", ":2", "iconv"),
    (b'{"text": "\\ud800"}', "not UTF-8", ":2", "iconv"),
    (b"[" * 100_000, "nested too deeply", ":2", None),
]


@pytest.mark.parametrize(("line", "message", "place", "hint"), MALFORMED_JSONL)
def test_malformed_json_lines(tmp_path: Path, line: bytes, message: str, place: str, hint: str | None) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "first"}\n' + line + b'\n\n{"text": "last"}\n')
    with pytest.raises(UsageError) as caught:
        read(path)
    assert message in caught.value.message
    assert caught.value.where == f"{path}{place}"
    assert caught.value.hint is not None
    assert "on_error: skip" in caught.value.hint
    assert (hint or "") in caught.value.hint

    skipped = SkipLog("skip")
    records = list(FileSource([path]).records(TEXT, skipped))
    assert [record.texts[0] for record in records] == ["first", "last"]
    assert [record.where for record in records] == [f"{path}:1", f"{path}:4"]
    assert skipped.num_skipped == 1
    assert skipped.examples[0].startswith(f"{path}{place}: ")


MALFORMED_LABELS = [
    ('{"text": "a"}', "no field 'label'"),
    ('{"text": "a", "label": null}', "holds null"),
    ('{"text": "a", "label": 0.5}', "holds a number"),
    ('{"text": "a", "label": ""}', "is empty"),
    ('{"text": "a", "label": ["x"]}', "holds a list"),
]


@pytest.mark.parametrize(("line", "message"), MALFORMED_LABELS)
def test_malformed_labels(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", line)
    with pytest.raises(UsageError) as caught:
        read(path, LABELLED)
    assert message in caught.value.message
    assert caught.value.where == f"{path}:1"


def test_malformed_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"text,n\ngood,1\nbad\nbad,2,3\n,4\nno\xe9,5\nlast,6\n")
    with pytest.raises(UsageError) as caught:
        read(path)
    assert caught.value.where == f"{path}:3"
    assert caught.value.message == "1 columns where the header names 2"
    skipped = SkipLog("skip")
    assert [record.texts[0] for record in FileSource([path]).records(TEXT, skipped)] == ["good", "last"]
    assert [example.split(": ")[0] for example in skipped.examples] == [f"{path}:{line}" for line in (3, 4, 5, 6)]
    assert skipped.examples[3].endswith("is not UTF-8")


@pytest.mark.parametrize(
    ("name", "content", "place", "message"),
    [
        ("a.txt", b"one\ntwo\nth\xe9ree\n", ":3", "not UTF-8: byte 0xe9"),
        ("a.csv", b"", ":1", "is empty"),
        ("a.parquet", b"nothing of the kind", "", "not a parquet file"),
        ("a.jsonl.gz", b"nothing of the kind", "", "broken gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "whole"}\n' * 9999)[:-50], "", "broken gzip file"),
        ("a.txt.gz", gzip.compress(TEXTS[0].encode())[:-20], "", "broken gzip file"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: bytes, place: str, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read(path)
    assert message in caught.value.message
    assert caught.value.where == f"{path}{place}"
    good = write(tmp_path / "z.txt", "good")
    skipped = SkipLog("skip")
    records = list(FileSource([path, good]).records(TEXT, skipped))
    assert records[-1].texts == ("good",)
    assert skipped.num_skipped == 1


def test_empty_text_files_are_counted_and_no_mistake(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "__init__.py", ""),
        write(tmp_path / "a.py", TEXTS[0]),
        write(tmp_path / "b.txt", " \n\n"),
    ]
    skipped = SkipLog("stop")
    assert [record.texts[0] for record in FileSource(paths).records(TEXT, skipped)] == [TEXTS[0]]
    assert skipped.num_skipped == 2
    assert skipped.examples == [f"{paths[0]}:1: the file is empty", f"{paths[2]}:1: the file is empty"]


def test_a_long_text_file_that_is_not_utf8_is_skipped_whole(tmp_path: Path) -> None:
    text = (STDLIB / "inspect.py").read_bytes() * 40
    line = 1 + text.count(b"\n")
    path = write(tmp_path / "a.txt", text + b"\xff\n" + text)
    assert len(text) > 4 * PIECE_CHARS
    skipped = SkipLog("skip")
    assert list(FileSource([path]).records(TEXT, skipped)) == []
    assert skipped.examples == [f"{path}:{line}: not UTF-8: byte 0xff"]


def test_parquet_rows_and_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "c"], "n": [1, 2, 3]}), path)
    with pytest.raises(UsageError) as caught:
        read(path)
    assert caught.value.where == f"{path}:2"
    with pytest.raises(UsageError) as caught:
        read(path, Fields(("txt",)))
    assert caught.value.where == str(path)
    assert caught.value.hint == "did you mean 'text'? the fields are 'text', 'n'"


def test_a_json_array_is_read_with_the_lines_of_its_elements(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[\n  {"text": "a"},\n  {"text":\n   "b]"},{"text": "c"}\n]\n')
    assert [(record.where.rpartition(":")[2], record.texts[0]) for record in read(path)] == [
        ("2", "a"),
        ("3", "b]"),
        ("4", "c"),
    ]
    with pytest.raises(UsageError) as caught:
        read(write(tmp_path / "b.json", '[\n  {"text": "a"},\n  {"text": }]\n'))
    assert caught.value.where == f"{tmp_path}/b.json:3"


def test_plain_text_has_no_labels(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(write(tmp_path / "a.txt", "text"), LABELLED)
    assert "no fields text, label" in caught.value.message


def test_files_are_found_sorted_once_and_without_the_excluded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b/x.txt", "a/x.txt", "a/test/y.txt", "c.txt", "a/test_z.txt", "[odd]/q.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)

    def names(patterns: str | list[str], exclude: str | list[str] | None = None) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in find_files(patterns, exclude, tmp_path)]

    assert names("**/*.txt") == ["[odd]/q.txt", "a/test/y.txt", "a/test_z.txt", "a/x.txt", "b/x.txt", "c.txt"]
    assert names(["c.txt", "**/x.txt", f"{tmp_path}/c.txt"]) == ["a/x.txt", "b/x.txt", "c.txt"]
    assert names("**/*.txt", ["**/test/**", "[[]odd]/*"]) == ["a/test_z.txt", "a/x.txt", "b/x.txt", "c.txt"]
    assert names("**/*.txt", ["test*", f"{tmp_path}/c.txt", "b/*"]) == ["[odd]/q.txt", "a/x.txt"]
    with pytest.raises(UsageError) as caught:
        names("a/*.txt", "*")
    assert caught.value.message == "`exclude` leaves none of the 2 files that match"


def test_exclude_looks_below_the_pattern_only(tmp_path: Path) -> None:
    (tmp_path / "test" / "corpus").mkdir(parents=True)
    path = write(tmp_path / "test" / "corpus" / "a.txt", "text")
    assert find_files(f"{tmp_path}/test/corpus/**/*.txt", "**/test/**", tmp_path) == [path]


def test_relative_patterns_prefer_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, recipes = tmp_path / "here", tmp_path / "recipes"
    for folder, name in ((here, "both.txt"), (recipes, "both.txt"), (recipes, "only.txt")):
        folder.mkdir(exist_ok=True)
        write(folder / name, "text")
    monkeypatch.chdir(here)
    assert find_files("both.txt", None, recipes) == [here / "both.txt"]
    assert find_files("only.txt", None, recipes) == [recipes / "only.txt"]


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("corpus", "write corpus/**/*"),
        ("corpus/data.jsnl", "did you mean corpus/data.jsonl?"),
        ("corpus/*.csv", "holds 1 files, such as data.jsonl"),
        ("corpse/*.jsonl", "there is no folder corpse"),
    ],
)
def test_no_files(tmp_path: Path, pattern: str, hint: str) -> None:
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus" / "data.jsonl", "{}")
    with pytest.raises(UsageError) as caught:
        find_files(pattern, None, tmp_path, where="data.train.files")
    assert caught.value.where == "data.train.files"
    assert caught.value.message == f"no files match {pattern!r}"
    assert hint in (caught.value.hint or "")


def test_the_standard_library_is_a_corpus(tmp_path: Path) -> None:
    files = find_files("{stdlib}/**/*.py", ["**/test/**", "idlelib/*"], tmp_path)
    names = [str(path.relative_to(STDLIB)) for path in files]
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert not [name for name in names if name.startswith(("test/", "idlelib/", "site-packages/", "dist-packages/"))]
    assert names == sorted(names)


def test_a_folder_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    as_format(tmp_path / "set", "train.jsonl")
    section = DataSource(dataset="set")
    source = open_source(section, tmp_path, where="data.train", default_split="train")
    records = list(source.records(LABELLED, SkipLog()))
    assert [record.texts[0] for record in records] == TEXTS
    assert records[1].where == "set[train]:2"
    assert source.identity()["files"][0][0] == str(tmp_path / "set" / "train.jsonl")
    source = open_source(DataSource(dataset="set", split="dev"), tmp_path, where="data.train", default_split="x")
    with pytest.raises(UsageError) as caught:
        list(source.records(TEXT, SkipLog()))
    assert caught.value.where == "data.train.dataset"
    assert "dev" in caught.value.message
