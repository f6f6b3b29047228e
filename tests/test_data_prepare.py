"""From a recipe to memory-mapped tokens: exact packing, the cache, held-out documents, tokenizers, labels, memory."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from llmpipe_cli.data.cache import cached_folder
from llmpipe_cli.data.dataset import open_split
from llmpipe_cli.data.prepare import prepare
from llmpipe_cli.data.prepared import PreparedData, PreparedSplit
from llmpipe_cli.data.sources import PIECE_CHARS, Record, SkipLog
from llmpipe_cli.data.store import Documents, SplitWriter
from llmpipe_cli.data.tokenise import tokenise
from llmpipe_cli.data.tokenizer import Encoder, train_tokenizer
from llmpipe_cli.errors import PreflightError, UsageError
from llmpipe_cli.recipe.schema import Recipe, TokenizerTraining
from llmpipe_cli.tasks.features import FeatureOptions

STDLIB = Path(sysconfig.get_paths()["stdlib"])
FILES = ["{stdlib}/json/*.py", "{stdlib}/csv.py", "{stdlib}/heapq.py"]


def recipe(task: str = "causal-lm", *, tokenizer: Any = None, **data: Any) -> Recipe:
    sections = {"train": {"files": FILES}, "sequence_len": 64, **data}
    sections = {name: section for name, section in sections.items() if section is not None}
    return Recipe.model_validate(
        {
            "name": "test",
            "task": task,
            "model": {"config": {"model_type": "llama", "vocab_size": 500}},
            "tokenizer": tokenizer or {"train": {"vocab_size": 500}},
            "data": sections,
        }
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(made: Recipe, cache: Path, base_dir: Path | None = None) -> PreparedData:
    return prepare(made, base_dir or Path.cwd(), cache)


def train_split(made: Recipe, cache: Path) -> PreparedSplit:
    split = run(made, cache).train
    assert split is not None
    return split


def stdlib_texts() -> list[str]:
    paths = [*(STDLIB / "json").glob("*.py"), STDLIB / "csv.py", STDLIB / "heapq.py"]
    return [path.read_text("utf-8") for path in sorted(paths)]


def test_packing_is_the_documents_tokens_with_the_end_token_between(cache: Path) -> None:
    data = run(recipe(), cache)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_dir)
    texts = stdlib_texts()
    expected = [
        token
        for text in texts
        for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]
    split = data.train
    assert split is not None
    samples = open_split(split)
    assert len(samples) == len(expected) // 64
    stream = np.concatenate([samples[index]["input_ids"] for index in range(len(samples))])
    assert stream.tolist() == expected[: 64 * len(samples)]
    assert split.num_tokens == len(expected)
    assert split.num_documents == len(texts)
    assert split.num_words == sum(len(re.split(r"\s+", text)) for text in texts)
    assert split.num_bytes == sum(len(text.encode()) for text in texts)
    documents = samples.documents
    assert documents is not None
    assert documents.document(1).tolist() == tokenizer(texts[1], add_special_tokens=False)["input_ids"]
    assert documents.words[1] == len(re.split(r"\s+", texts[1]))
    assert documents.tokens["input_ids"].dtype == np.uint16


def test_validation_text_has_no_special_tokens(cache: Path) -> None:
    data = run(recipe(validation={"files": FILES}), cache)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_dir)
    split = data.validation
    assert split is not None
    samples = open_split(split)
    stream = np.concatenate([samples[index]["input_ids"] for index in range(len(samples))]).tolist()
    expected = [token for text in stdlib_texts() for token in tokenizer(text)["input_ids"]]
    assert stream == expected[: len(expected) // 64 * 64]
    assert tokenizer.eos_token_id not in stream


def test_one_document_a_sample(cache: Path) -> None:
    split = train_split(recipe(packing=False, sequence_len=4000), cache)
    samples = open_split(split)
    lengths = [len(samples[index]["input_ids"]) for index in range(len(samples))]
    assert split.kind == "records"
    assert len(samples) == len(stdlib_texts())
    assert max(lengths) == 4000
    assert split.num_truncated == lengths.count(4000) > 0
    short = lengths.index(min(lengths))
    assert samples[short]["input_ids"][-1] == run(recipe(), cache).special_token_ids["eos"]


def test_a_changed_sequence_len_needs_no_new_tokens(cache: Path) -> None:
    one, two = train_split(recipe(), cache), train_split(recipe(sequence_len=32), cache)
    assert one.directory == two.directory
    assert two.num_samples in (2 * one.num_samples, 2 * one.num_samples + 1)
    assert one.fingerprint != two.fingerprint


def test_second_run_reads_the_cache_and_imports_nothing_heavy(cache: Path, tmp_path: Path) -> None:
    made = recipe(validation={"fraction": 0.3})
    first = run(made, cache)
    script = tmp_path / "again.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from llmpipe_cli.data.prepare import prepare\n"
        "from llmpipe_cli.recipe.schema import Recipe\n"
        "data = prepare(Recipe.model_validate_json(sys.argv[1]), Path('.'), Path(sys.argv[2]))\n"
        "heavy = {'torch', 'transformers', 'datasets', 'tokenizers', 'pyarrow'} & set(sys.modules)\n"
        "print(data.model_dump_json()); print(sorted(heavy))\n"
    )
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    printed = subprocess.run(
        [sys.executable, script, made.model_dump_json(by_alias=True), str(cache)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert PreparedData.model_validate_json(printed[0]) == first
    assert printed[1] == "[]"
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == before


def test_changed_text_is_tokenised_again(cache: Path, tmp_path: Path) -> None:
    tokenizer = run(recipe(), cache).tokenizer_dir
    path = tmp_path / "a.txt"
    path.write_text("one two three " * 99)
    made = recipe(tokenizer=tokenizer, train={"files": str(path)})
    one = train_split(made, cache)
    path.write_text("four five six " * 99)
    two = train_split(made, cache)
    assert one.directory != two.directory
    assert one.fingerprint != two.fingerprint


def test_held_out_documents_are_chosen_by_content(cache: Path, tmp_path: Path) -> None:
    texts = [text[start : start + 300] for text in stdlib_texts() for start in range(0, len(text) - 300, 300)]
    texts = [text for text in texts if text.strip()]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts + texts[:50]))
    tokenizer = run(recipe(), cache).tokenizer_dir
    data = run(recipe(tokenizer=tokenizer, train={"files": str(path)}, validation={"fraction": 0.25}), cache)
    assert data.train is not None
    assert data.validation is not None
    train, held_out = Documents(Path(data.train.directory)), Documents(Path(data.validation.directory))
    assert len(train) + len(held_out) == len(texts) + 50
    assert 0.15 < len(held_out) / len(texts) < 0.35
    sides = [{tuple(side.document(index).tolist()) for index in range(len(side))} for side in (train, held_out)]
    assert not sides[0] & sides[1]  # the copies lie on the same side as the originals

    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in reversed(texts + texts[:50])))
    again = run(recipe(tokenizer=tokenizer, train={"files": str(path)}, validation={"fraction": 0.25}), cache)
    assert again.validation is not None
    other = Documents(Path(again.validation.directory))
    assert {tuple(other.document(index).tolist()) for index in range(len(other))} == sides[1]


def test_tokens_do_not_depend_on_the_number_of_processes(cache: Path, tmp_path: Path) -> None:
    tokenizer = run(recipe(), cache).tokenizer_dir
    assert tokenizer is not None
    texts = [path.read_text("utf-8") for path in sorted(STDLIB.glob("[a-i]*.py"))]
    long_text = "".join(texts)  # is cut in pieces, and is one document all the same
    assert len(long_text) > 2 * PIECE_CHARS
    texts = texts[:40]
    records = [Record(f"{index}", (text,)) for index, text in enumerate([*texts, long_text, texts[0]])]
    options = FeatureOptions("causal-lm", ("text",), separator=0)
    results = []
    for num_processes in (1, 3):
        folder = tmp_path / str(num_processes)
        folder.mkdir()
        writer = SplitWriter(folder, options.columns, 500, separated=True, labelled=False)
        tokenise(iter(records), options, tokenizer, writer, None, SkipLog(), num_processes=num_processes)
        results.append(writer.close(num_skipped=0, num_truncated=0, skipped_examples=[], label_names=None).model_dump())
    assert results[0] == results[1]
    assert results[0]["num_documents"] == len(records)
    whole = AutoTokenizer.from_pretrained(tokenizer)(long_text, add_special_tokens=False)["input_ids"]
    assert Documents(tmp_path / "3").document(len(texts)).tolist() == whole


def test_a_long_file_is_one_document_with_the_same_tokens(cache: Path, tmp_path: Path) -> None:
    text = "".join(path.read_text("utf-8") for path in sorted(STDLIB.glob("[a-r]*.py")))
    path = tmp_path / "long.txt"
    path.write_text(text)
    tokenizer_dir = run(recipe(), cache).tokenizer_dir
    split = train_split(recipe(tokenizer=tokenizer_dir, train={"files": str(path)}), cache)
    documents = Documents(Path(split.directory))
    assert len(documents) == 1
    assert documents.document(0).tolist() == AutoTokenizer.from_pretrained(tokenizer_dir)(text)["input_ids"]
    assert split.num_words == len(re.split(r"\s+", text))
    assert split.num_bytes == len(text.encode())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_memory_does_not_grow_with_the_corpus(cache: Path, tmp_path: Path, kind: str) -> None:
    tokenizer = run(recipe(), cache).tokenizer_dir
    texts = [path.read_text("utf-8") for path in sorted(STDLIB.glob("*.py"))]
    lines = [json.dumps({"text": text}) + "\n" for text in texts] if kind == "jsonl" else texts
    peaks = []
    for copies in (1, 4):  # 5 MB and 19 MB
        path = tmp_path / f"{copies}.{kind}"
        path.write_text("".join(lines * copies))
        made = tmp_path / "recipe.json"
        made.write_text(recipe(tokenizer=tokenizer, train={"files": str(path)}).model_dump_json(by_alias=True))
        printed = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("data_memory_worker.py")), made, tmp_path / "cache"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        peaks.append(json.loads(printed))
    assert peaks[1]["num_tokens"] > 3.9 * peaks[0]["num_tokens"]
    growth = {name: peaks[1][name] - peaks[0][name] for name in ("own", "all")}
    # 14 MB of text are more than 5 million tokens: held as Python numbers they would take 200 MB
    assert growth["own"] < 40 << 20
    assert growth["all"] < 100 << 20


def test_trained_tokenizers_are_the_same_each_time(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from llmpipe_cli.data.tokenizer import train_tokenizer\n"
        "from llmpipe_cli.recipe.schema import TokenizerTraining\n"
        f"paths = sorted(Path({str(STDLIB)!r}).glob('[a-d]*.py'))\n"
        "texts = (path.read_text('utf-8') for path in paths)\n"
        "train_tokenizer(texts, TokenizerTraining(vocab_size=1500), 'causal').save_pretrained(sys.argv[1])\n"
    )
    for name, parallel, seed in (("one", "true", "1"), ("two", "false", "2")):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TOKENIZERS_PARALLELISM": parallel,
            "PYTHONHASHSEED": seed,
        }
        subprocess.run([sys.executable, "-c", script, tmp_path / name], env=environment, check=True)
    one, two = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two"))
    assert one == two
    assert len(json.loads(one)["model"]["vocab"]) == 1500


@pytest.mark.parametrize(
    ("template", "around"), [("causal", ([], [])), ("encoder", (["[CLS]"], ["[SEP]"])), ("seq2seq", ([], ["</s>"]))]
)
def test_trained_tokenizers_lose_no_byte(tmp_path: Path, template: str, around: tuple[list[str], list[str]]) -> None:
    tokenizer = train_tokenizer(iter(stdlib_texts()), TokenizerTraining(vocab_size=600), template)
    tokenizer.save_pretrained(tmp_path)
    text = "def f():\r\n\treturn 'Grüße, 世界 🙂'  \n\n\n"
    encoder = Encoder(str(tmp_path))
    ids = encoder.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    full = encoder.encode_with_special_tokens(text)
    assert full == tokenizer(text)["input_ids"]
    before, after = (tokenizer.convert_tokens_to_ids(tokens) for tokens in around)
    assert full == [*before, *ids, *after]
    cut, which = encoder.encode_truncated([text, "a"], 8)
    assert cut[0] == tokenizer(text, truncation=True, max_length=8)["input_ids"]
    assert len(cut[0]) == 8
    assert which == [0]
    assert (template == "encoder") == (tokenizer.mask_token_id is not None)


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "qwen2", "qwen3", "qwen3_5", "mistral", "bert", "t5", "gemma2"]
)
def test_a_checkpoint_of_any_family_opens_with_the_trained_tokenizer(
    cache: Path, tmp_path: Path, model_type: str
) -> None:
    made = recipe()
    assert made.model.config is not None
    made.model.config["model_type"] = model_type
    data = run(made, cache)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_dir)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    text = "  def f(x):\n        return x + 12345;\n\n\n# I'LL  Grüße\n}\n"
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert data.tokenizer_dir is not None
    assert opened(text)["input_ids"] == Encoder(data.tokenizer_dir).encode(text)
    assert opened.decode(opened(text)["input_ids"]) == text
    assert opened.eos_token_id == data.special_token_ids["eos"]


def test_a_trained_tokenizer_has_not_seen_the_held_out_documents(cache: Path, tmp_path: Path) -> None:
    # Each document has words of its own, made of the same eight letters.
    letters = random.Random(3)
    texts = [" ".join("".join(letters.sample("xqzvjwkp", 8)) for _ in range(30)) for _ in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = recipe(train={"files": str(path)}, validation={"fraction": 0.5}, tokenizer={"train": {"vocab_size": 700}})
    data = run(made, cache)
    assert data.train is not None
    assert data.validation is not None
    ratios = [split.num_tokens / split.num_bytes for split in (data.train, data.validation)]
    assert ratios[0] < 0.9 * ratios[1]  # words of the training side have become tokens, the other side's have not


LABELS = [
    (["ham", "spam", "ham", "eggs"], ["eggs", "ham", "spam"], [1, 2, 1, 0]),
    ([2, 10, 1, 2], ["1", "2", "10"], [1, 2, 0, 1]),
    ([True, False, True], ["false", "true"], [1, 0, 1]),
]


@pytest.mark.parametrize(("labels", "names", "ids"), LABELS)
def test_labels_are_numbered_in_a_fixed_order(
    cache: Path, tmp_path: Path, labels: list[Any], names: list[str], ids: list[int]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": f"text {i}", "kind": k}) + "\n" for i, k in enumerate(labels)))
    source = {"files": str(path), "text": "body", "label": "kind"}
    data = run(recipe("classification", train=source, validation=source), cache)
    assert data.label_names == names
    for split in (data.train, data.validation):
        assert split is not None
        samples = open_split(split)
        assert [int(samples[index]["label"]) for index in range(len(samples))] == ids
        assert split.num_labels == len(names)


def test_unknown_validation_label(cache: Path, tmp_path: Path) -> None:
    train, other = tmp_path / "train.jsonl", tmp_path / "dev.jsonl"
    train.write_text("".join(json.dumps({"text": f"t {k}", "label": k}) + "\n" for k in ("ham", "spam")))
    other.write_text('{"text": "a", "label": "ham"}\n{"text": "b", "label": "spm"}\n')
    with pytest.raises(UsageError) as caught:
        run(recipe("classification", train={"files": str(train)}, validation={"files": str(other)}), cache)
    assert caught.value.message == "unknown label 'spm'"
    assert caught.value.where == f"{other}:2"
    assert "did you mean 'spam'? the labels are 'ham', 'spam'" in (caught.value.hint or "")
    skipping = {"files": str(other), "on_error": "skip"}
    data = run(recipe("classification", train={"files": str(train)}, validation=skipping), cache)
    assert data.validation is not None
    assert data.validation.num_documents == data.validation.num_skipped == 1


def test_labels_that_a_dataset_does_not_declare(cache: Path, tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["ham", "spam"])})
    rows = {"text": [f"t {number}" for number in range(5)], "label": [0, 1, 1, -1, 0]}  # -1: not labelled
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    source = {"dataset": str(tmp_path / "set")}
    with pytest.raises(UsageError) as caught:
        run(recipe("classification", train=source), cache)
    assert (caught.value.message, caught.value.where) == ("unknown label '-1'", f"{tmp_path}/set[train]:4")
    data = run(recipe("classification", train={**source, "on_error": "skip"}), cache)
    assert data.train is not None
    assert (data.label_names, data.train.label_counts, data.train.num_skipped) == (["ham", "spam"], [2, 2], 1)


@pytest.mark.parametrize(
    ("task", "short", "long"),
    [
        ("classification", {"text": "a b", "label": "x"}, {"text": "a b " * 40, "label": "y"}),
        ("translation", {"source": "a b", "target": "c"}, {"source": "a", "target": "c d " * 40}),
        (
            "token-classification",
            {"tokens": ["a", "b"], "ner_tags": ["O", "B-X"]},
            {"tokens": ["a"] * 60, "ner_tags": ["O"] * 59 + ["B-Y"]},
        ),
    ],
)
def test_samples_that_are_too_long(
    task: str, short: dict[str, Any], long: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    rows = [short, {**short, "label": "y"} if "label" in short else short, long, short]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def prepared(on_too_long: str) -> PreparedSplit:
        source = {"files": str(path), "on_too_long": on_too_long}
        return train_split(recipe(task, train=source, sequence_len=24), cache)

    with pytest.raises(UsageError, match="longer than 24 tokens") as caught:
        prepared("stop")
    assert caught.value.where == f"{path}:3"
    skipped, cut = prepared("skip"), prepared("cut")
    assert (skipped.num_samples, skipped.num_skipped, skipped.num_truncated) == (3, 1, 0)
    assert skipped.skipped_examples[0].startswith(f"{path}:3: longer than 24 tokens")
    assert (cut.num_samples, cut.num_skipped, cut.num_truncated) == (4, 0, 1)
    assert cut.truncated_examples == [f"{path}:3"]
    longest = max(
        len(sample[name]) for sample in map(open_split(cut).__getitem__, range(4)) for name in sample if name != "label"
    )
    assert longest == 24


def test_one_class_is_no_classification(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n' * 3)
    with pytest.raises(UsageError) as caught:
        run(recipe("classification", train={"files": str(path)}), cache)
    assert "all documents have the label 'x'" in caught.value.message


def test_translation_pairs(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    pairs = [("the house", "das Haus"), ("a tree and another tree and a third", "ein Baum")]
    path.write_text("".join(json.dumps({"en": en, "de": de}) + "\n" for en, de in pairs))
    source = {"files": str(path), "source": "en", "target": "de"}
    made = recipe("translation", train=source, sequence_len=20, target_sequence_len=8, source_prefix="to German: ")
    data = run(made, cache)
    assert data.train is not None
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_dir)
    samples = open_split(data.train)
    for index, (en, de) in enumerate(pairs):
        source_ids = tokenizer("to German: " + en, truncation=True, max_length=20)["input_ids"]
        assert samples[index]["input_ids"].tolist() == source_ids
        assert samples[index]["labels"].tolist() == tokenizer(de, truncation=True, max_length=8)["input_ids"]
        assert source_ids[-1] == tokenizer.eos_token_id


def test_malformed_lines_stop_or_are_counted(cache: Path, tmp_path: Path) -> None:
    good = json.dumps({"text": stdlib_texts()[0]}) + "\n"
    path = tmp_path / "a.jsonl"
    path.write_text(good + "{\n" + good + '{"text": ""}\n')
    with pytest.raises(UsageError) as caught:
        run(recipe(train={"files": str(path)}), cache)
    assert caught.value.where == f"{path}:2:2"
    split = train_split(recipe(train={"files": str(path), "on_error": "skip"}), cache)
    assert split.num_skipped == 2
    assert split.num_documents == 2
    assert [example.split(": ")[0] for example in split.skipped_examples] == [f"{path}:2:2", f"{path}:4"]


def test_nothing_left_or_too_little(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{\n[]\n")
    tokenizer = run(recipe(), cache).tokenizer_dir
    with pytest.raises(UsageError) as caught:
        run(recipe(tokenizer=tokenizer, train={"files": str(path), "on_error": "skip"}), cache)
    assert caught.value.message == "no document is left: 2 were skipped"
    assert f"{path}:1:2" in (caught.value.hint or "")
    path.write_text("")
    with pytest.raises(UsageError) as caught:
        run(recipe(tokenizer=tokenizer, train={"files": str(path)}), cache)
    assert caught.value.message.startswith("there is no document in 1 files")
    path.write_text('{"text": "a b c"}\n')
    with pytest.raises(UsageError) as caught:
        run(recipe(tokenizer=tokenizer, train={"files": str(path)}), cache)
    assert caught.value.where == "data.sequence_len"
    assert "fewer than one sample of 64" in caught.value.message
    with pytest.raises(UsageError) as caught:
        run(recipe(tokenizer=tokenizer, validation={"fraction": 1e-9}), cache)
    assert caught.value.where == "data.validation.fraction"


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        ({"train": None}, "data", "the recipe has no data"),
        ({"train": {}}, "data.train", "no data is given"),
        ({"train": {"files": "none/*.txt"}}, "data.train.files", "no files match"),
        ({"train": None, "validation": {"fraction": 0.1}}, "data.validation.fraction", "there are none"),
        ({"train": {"synthetic": True}}, "tokenizer", "cannot be trained on random ids"),
        ({"tokenizer": "./nowhere"}, "tokenizer", "there is no folder ./nowhere"),
        ({"tokenizer": str(STDLIB / "json")}, "tokenizer", "cannot be loaded"),
        ({"train": {"dataset": "../nowhere"}}, "data.train.dataset", "there is no folder ../nowhere"),
        ({"task": "chat"}, str(STDLIB / "csv.py"), "no fields messages"),
        ({"task": "token-classification"}, str(STDLIB / "csv.py"), "no fields tokens, ner_tags"),
        ({"task": "classification"}, str(STDLIB / "csv.py"), "no fields text, label"),
    ],
)
def test_recipes_that_cannot_be_prepared(cache: Path, change: dict[str, Any], where: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(recipe(**change), cache)
    assert caught.value.where == where
    assert message in caught.value.message


def test_a_recipe_without_tokenizer(cache: Path) -> None:
    made = recipe()
    made.tokenizer = None
    with pytest.raises(UsageError) as caught:
        run(made, cache)
    assert caught.value.where == "tokenizer"
    made.data.train.files, made.data.train.synthetic = None, True  # type: ignore[union-attr]
    data = run(made, cache)
    assert data.vocab_size == 500
    assert data.train is not None
    samples = open_split(data.train)
    assert samples[7]["input_ids"].tolist() == open_split(data.train)[7]["input_ids"].tolist()
    assert samples[7]["input_ids"].tolist() != samples[8]["input_ids"].tolist()
    drawn = np.concatenate([samples[index]["input_ids"] for index in range(200)])
    assert (drawn.min(), drawn.max()) == (0, 499)


def test_a_causal_tokenizer_cannot_mask(cache: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run(recipe("masked-lm", tokenizer=run(recipe(), cache).tokenizer_dir), cache)
    assert "no mask token" in caught.value.message


def test_progress_ends_at_the_whole(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(stdlib_texts()[0])
    seen: list[tuple[str, int, int | None]] = []
    made = recipe(train={"files": str(path)})
    prepare(made, tmp_path, cache, lambda doing, done, total: seen.append((doing, done, total)))
    size = path.stat().st_size
    assert ("training the tokenizer", size, size) in seen
    assert seen[-1] == ("tokenising train data", size, size)


def test_two_processes_make_an_entry_once(tmp_path: Path) -> None:
    entry, made = tmp_path / "entry", []
    inside = threading.Event()

    def fill(folder: Path) -> None:
        inside.set()
        made.append(folder)
        (folder / "a").write_text("whole")

    threads = [threading.Thread(target=cached_folder, args=(entry, fill)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (entry / "a").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entry", "entry.lock"]


def test_a_failed_or_killed_preparation_leaves_no_entry(tmp_path: Path) -> None:
    entry = tmp_path / "entry"
    leftover = tmp_path / "entry.tmp-killed"
    leftover.mkdir()
    (leftover / "a").write_text("half")

    def fail(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise UsageError("bad line", where="a:3")

    with pytest.raises(UsageError):
        cached_folder(entry, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["entry.lock"]
    assert cached_folder(entry, lambda folder: (folder / "a").touch()) == entry
    assert (entry / "a").exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder))

    with pytest.raises(PreflightError) as caught:
        cached_folder(tmp_path / "entry", full)
    assert caught.value.where == str(tmp_path)
    assert "LLMPIPE_CACHE" in (caught.value.hint or "")
