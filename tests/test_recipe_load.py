"""Loading recipes: values, places, other names, `extends`, `--set`, lock files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llmpipe_cli.errors import LlmpipeError, RecipeError, UsageError
from llmpipe_cli.recipe.builtin import builtin_recipes
from llmpipe_cli.recipe.load import load_recipe
from llmpipe_cli.recipe.lock import installed_versions, lock_text, write_lock
from llmpipe_cli.recipe.schema import Recipe, TrainedTokenizer

BASE = """\
# A comment.
name: base
model:
  config: {model_type: llama, hidden_size: 64}   # another
  dtype: bf16
tokenizer: {train: {vocab_size: 300}}
data:
  train: {files: [a.txt, b.txt]}
  sequence_len: 128
train:
  max_steps: 1_000
  learning_rate: 3e-4
  weight_decay: 1
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with `base.yaml`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def problems(path: str, *overrides: str, job: str | None = None) -> list[UsageError]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, job=job)
    return caught.value.problems


def test_values_and_defaults(folder: Path) -> None:
    recipe = load_recipe("base.yaml").recipe
    assert recipe.model.config == {"model_type": "llama", "hidden_size": 64}
    assert recipe.tokenizer == TrainedTokenizer.model_validate({"train": {"vocab_size": 300}})
    assert recipe.train.max_steps == 1000
    assert recipe.train.learning_rate == 3e-4
    assert recipe.train.weight_decay == 1.0
    assert recipe.parallel.pipeline == "auto"
    assert recipe.checkpoint.every_steps is None
    assert load_recipe(folder / "base.yaml").base_dir == folder
    assert load_recipe("base.yaml").text == BASE


def test_places(folder: Path) -> None:
    loaded = load_recipe("base.yaml", ["train.seed=5", "model.config.num_hidden_layers=2"])
    assert loaded.where("name") == "base.yaml:2:7"
    assert loaded.where("model") == "base.yaml:3:1"
    assert loaded.where("model.config") == "base.yaml:4:11"
    assert loaded.where("model.config.hidden_size") == "base.yaml:4:44"
    assert loaded.where("model.config.num_hidden_layers") == "--set model.config.num_hidden_layers=2"
    assert loaded.where("data.train.files[1]") == "base.yaml:8:26"
    assert loaded.where("data.train.files.1") == "base.yaml:8:26"
    assert loaded.where("train.seed") == "--set train.seed=5"
    assert loaded.where("train.momentum") == "base.yaml:10:1", "not written: its section"
    assert loaded.where("parallel.pipeline") == "base.yaml:2:1", "no section either: the recipe"
    error = loaded.error("data.sequence_len", "too long", "shorten it")
    assert (error.where, error.message, error.hint) == ("base.yaml:9:17", "too long", "shorten it")


def test_other_names_are_accepted_with_a_warning(folder: Path) -> None:
    (folder / "r.yaml").write_text(
        "name: x\nmodel: {name_or_path: gpt2}\n"
        "data: {max_seq_length: 64, train: {file: a}, val: {dataset: b}}\n"
        "train: {epochs: 2, lr: 1e-3, per_device_train_batch_size: 2, clip_grad: 0.5}\n"
        "parallel: {pp: 2}\ncheckpoint: {save_steps: 5, save_total_limit: 2}\neval: {eval_steps: 7}\n"
    )
    loaded = load_recipe("r.yaml", ["parallel.dp=2"])
    recipe = loaded.recipe
    assert recipe.model.from_ == "gpt2"
    assert recipe.data.sequence_len == 64
    assert recipe.data.train is not None
    assert recipe.data.train.files == "a"
    assert recipe.data.validation is not None
    assert recipe.data.validation.dataset == "b"
    assert (recipe.train.num_train_epochs, recipe.train.learning_rate) == (2, 1e-3)
    assert (recipe.train.micro_batch_size, recipe.train.max_grad_norm) == (2, 0.5)
    assert (recipe.parallel.pipeline, recipe.parallel.data) == (2, 2)
    assert (recipe.checkpoint.every_steps, recipe.checkpoint.keep, recipe.evaluation.every_steps) == (5, 2, 7)
    assert len(loaded.warnings) == 14
    first, last = loaded.warnings[0], loaded.warnings[-1]
    assert (first.where, first.hint) == ("r.yaml:2:9", "write `from`")
    assert first.message == "`name_or_path` is called `from` here"
    assert last.where == "--set parallel.dp=2"
    assert loaded.where("train.learning_rate") == "r.yaml:4:24"


def test_options_without_effect_are_warnings(folder: Path) -> None:
    warnings = load_recipe("base.yaml", ["train.momentum=0.9", "train.decay_ratio=0.2"]).warnings
    assert [(notice.where, notice.message.split()[0]) for notice in warnings] == [
        ("--set train.momentum=0.9", "`momentum`"),
        ("--set train.decay_ratio=0.2", "`decay_ratio`"),
    ]


# ------------------------------------------------------------------------------------------------ extends


def test_extends_merges_and_places_name_the_file(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "middle.yaml").write_text(
        "extends: ../base.yaml\ntrain: {max_steps: 20, warmup_steps: 5}\ndata: {train: {files: c.txt}}\n"
    )
    (folder / "sub" / "top.yaml").write_text(
        "extends: middle.yaml\nname: top\ntrain: {warmup_steps: null}\nmodel: {config: {hidden_size: 32}}\n"
    )
    loaded = load_recipe("sub/top.yaml", ["train.weight_decay=0.5"])
    recipe = loaded.recipe
    assert recipe.name == "top"
    assert recipe.train.max_steps == 20
    assert recipe.train.warmup_steps is None, "null removes"
    assert recipe.train.learning_rate == 3e-4
    assert recipe.train.weight_decay == 0.5
    assert recipe.model.config == {"model_type": "llama", "hidden_size": 32}
    assert recipe.data.train is not None
    assert recipe.data.train.files == "c.txt", "lists and scalars are replaced, not merged"
    assert loaded.where("train.max_steps") == "sub/middle.yaml:2:20"
    assert loaded.where("train.learning_rate") == "base.yaml:12:18"
    assert loaded.where("model.config.hidden_size") == "sub/top.yaml:4:31"
    assert loaded.base_dir.name == "sub"


def test_extends_switches_from_config_to_pretrained(folder: Path) -> None:
    (folder / "top.yaml").write_text("extends: base.yaml\nmodel: {from: gpt2}\ntokenizer: null\n")
    assert [problem.where for problem in problems("top.yaml")] == ["top.yaml:2:15"]
    (folder / "top.yaml").write_text("extends: base.yaml\nmodel: {from: gpt2, config: null}\ntokenizer: null\n")
    recipe = load_recipe("top.yaml").recipe
    assert (recipe.model.config, recipe.model.from_, recipe.tokenizer) == (None, "gpt2", None)


def test_extends_a_ready_recipe(folder: Path) -> None:
    (folder / "mine.yaml").write_text("extends: demo\nname: mine\n")
    assert load_recipe("mine.yaml").recipe == load_recipe("demo").recipe.model_copy(update={"name": "mine"})


def test_mistakes_of_several_files_come_in_reading_order(folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE + "  optimizr: sgd\n")
    (folder / "top.yaml").write_text("extends: base.yaml\ntrain: {lerning_rate: 1}\n")
    found = problems("top.yaml", "train.sead=3")
    assert [problem.where for problem in found] == ["top.yaml:2:9", "base.yaml:14:3", "--set train.sead=3"]


@pytest.mark.parametrize(
    ("files", "place", "message", "hint"),
    [
        ({"a": "extends: other.yaml\nname: a"}, "a.yaml:1:10", "does not exist: other.yaml", "relative to the file"),
        ({"a": "extends: bose.yaml\nname: a"}, "a.yaml:1:10", "does not exist: bose.yaml", "did you mean base.yaml?"),
        ({"a": "name: a\nextends: a.yaml"}, "a.yaml:2:10", "goes in a circle: a.yaml -> a.yaml", "remove one"),
        (
            {"a": "extends: b.yaml", "b": "extends: c.yaml", "c": "extends: a.yaml"},
            "c.yaml:1:10",
            "goes in a circle: a.yaml -> b.yaml -> c.yaml -> a.yaml",
            "remove one",
        ),
        ({"a": "extends: [b.yaml]"}, "a.yaml:1:10", "expects one file name, found a list", "extends: base.yaml"),
        ({"a": "extends: b.yaml", "b": "train: [x"}, "b.yaml:1:10", "not YAML", "bracket"),
    ],
)
def test_extends_mistakes(folder: Path, files: dict[str, str], place: str, message: str, hint: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    found = problems("a.yaml")
    assert any(
        problem.where == place and message in problem.message and hint in (problem.hint or "") for problem in found
    )
    assert not any("needs the field" in problem.message for problem in found), "the file not found may have it"


def test_a_long_chain_is_refused(folder: Path) -> None:
    for index in range(20):
        (folder / f"r{index}.yaml").write_text(f"extends: r{index + 1}.yaml\n")
    assert any("goes over more than 8 files" in problem.message for problem in problems("r0.yaml"))


# ------------------------------------------------------------------------------------------------ --set


@pytest.mark.parametrize(
    ("override", "dotted", "value"),
    [
        ("train.max_steps=5", "train.max_steps", 5),
        ("train.max_steps = 5", "train.max_steps", 5),
        ("train.learning_rate=1e-5", "train.learning_rate", 1e-5),
        ("train.lr=1e-5", "train.learning_rate", 1e-5),
        ("data.packing=false", "data.packing", False),
        ("data.train.files=*.jsonl", "data.train.files", "*.jsonl"),
        ("data.train.files=[x, y]", "data.train.files", ["x", "y"]),
        ("data.train.files.0=z", "data.train.files", ["z", "b.txt"]),
        ("data.train.files[1]=z", "data.train.files", ["a.txt", "z"]),
        ("data.train.files.2=z", "data.train.files", ["a.txt", "b.txt", "z"]),
        ("data.train.files.0=null", "data.train.files", ["b.txt"]),
        ("output_dir=a: b #c", "output_dir", "a: b #c"),
        ("output_dir=$(rm -rf x); `y` %h", "output_dir", "$(rm -rf x); `y` %h"),
        ("output_dir=two\nlines", "output_dir", "two\nlines"),
        ('output_dir="5"', "output_dir", "5"),
        ("output_dir=a=b", "output_dir", "a=b"),
        ("model.config={model_type: gpt2, hidden_size: null}", "model.config", {"model_type": "gpt2"}),
        (
            "model.config.rope.theta=1e4",
            "model.config",
            {"model_type": "llama", "hidden_size": 64, "rope": {"theta": 1e4}},
        ),
        ("train.weight_decay=null", "train.weight_decay", 0.0),
        ("train.weight_decay=", "train.weight_decay", 0.0),
        ("data.validation.fraction=0.1", "data.validation.fraction", 0.1),
        ("parallel.partition=[2, 3]", "parallel.partition", [2, 3]),
    ],
)
def test_override(folder: Path, override: str, dotted: str, value: object) -> None:
    found: object = load_recipe("base.yaml", [override]).recipe
    for name in dotted.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_overrides_apply_in_order(folder: Path) -> None:
    loaded = load_recipe(
        "base.yaml", ["train.seed=1", "train.seed=2", "data.train={dataset: a}", "data.train.files=null"]
    )
    assert loaded.recipe.train.seed == 2
    assert loaded.where("train.seed") == "--set train.seed=2"
    assert loaded.recipe.data.train is not None
    assert (loaded.recipe.data.train.dataset, loaded.recipe.data.train.files) == ("a", None)


def test_override_does_not_change_other_uses_of_an_anchor(folder: Path) -> None:
    (folder / "r.yaml").write_text(
        "name: x\nmodel: {from: a}\ntrain: {max_steps: 1}\ndata: {train: &source {files: [a]}, validation: *source}\n"
    )
    data = load_recipe("r.yaml", ["data.validation.files.0=b"]).recipe.data
    assert data.train is not None
    assert data.validation is not None
    assert (data.train.files, data.validation.files) == (["a"], ["b"])


def test_anchors_and_merge_keys(folder: Path) -> None:
    (folder / "r.yaml").write_text(
        "name: x\nmodel: {from: a}\ntrain: {max_steps: 1}\n"
        "data:\n  train: &t {files: a, max_documents: 3}\n  validation: {<<: *t, files: b}\n"
    )
    validation = load_recipe("r.yaml").recipe.data.validation
    assert validation is not None
    assert (validation.files, validation.max_documents) == ("b", 3)


# ------------------------------------------------------------------------------------------------ jobs, lock


def test_what_a_job_needs(folder: Path) -> None:
    (folder / "plan.yaml").write_text("name: x\nmodel: {config: {model_type: llama}}\n")
    assert load_recipe("plan.yaml").recipe.data.train is None, "can be planned"
    messages = [problem.message for problem in problems("plan.yaml", job="train")]
    assert "there is no training data" in messages
    assert any("`max_steps` or `num_train_epochs`" in message for message in messages)
    assert "there is no validation data to evaluate on" in [p.message for p in problems("plan.yaml", job="evaluate")]
    found = problems("base.yaml", "tokenizer=null", job="train")
    assert [(p.where, p.message) for p in found] == [("base.yaml:2:1", "a model from scratch needs a `tokenizer`")]
    load_recipe("base.yaml", ["tokenizer=null", "data.train={synthetic: true}", "data.train.files=null"], job="train")


def test_one_mistake_gives_one_problem(folder: Path) -> None:
    found = problems("base.yaml", "train.max_steps=ten")
    assert [problem.where for problem in found] == ["--set train.max_steps=ten"], "not also 'how long to train'"


def test_lock_is_a_recipe(folder: Path) -> None:
    loaded = load_recipe("base.yaml", ["parallel.partition=[2, 1]", "model.config.pad_token_id=3"])
    write_lock(folder / "recipe.lock.yaml", loaded.recipe, {"train": {"fingerprint": "0123e4", "num_tokens": 5}})
    again = load_recipe("recipe.lock.yaml")
    assert again.recipe == loaded.recipe
    assert again.warnings == []
    assert again.lock is not None
    assert again.lock["data"] == {"train": {"fingerprint": "0123e4", "num_tokens": 5}}
    assert again.lock["versions"] == installed_versions()
    assert again.lock["versions"]["llmpipe"] == "0.1.0"
    assert load_recipe("recipe.lock.yaml", ["train.max_steps=7"]).recipe.train.max_steps == 7
    assert "lock" in lock_text(loaded.recipe)


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_locks_of_all_tasks_load(folder: Path, name: str) -> None:
    recipe = load_recipe(name).recipe
    write_lock(folder / "recipe.lock.yaml", recipe)
    again = load_recipe("recipe.lock.yaml")
    assert again.recipe == recipe
    assert again.warnings == []


def test_lock_keeps_difficult_texts(folder: Path) -> None:
    texts = [
        "1e5",
        "0x1F",
        "yes",
        "null",
        "",
        " x ",
        "a: b",
        "#c",
        "1_000",
        "é\n\t'\"",
        "- a",
        "[",
        "2020-01-01",
        "\x1b[0m",
    ]
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "model": {"config": {"model_type": "a", "texts": texts, "none": None, "floats": [1e-8, 1.0, 1e22]}},
            "data": {"source_prefix": "translate: "},
            "task": "translation",
        }
    )
    write_lock(folder / "recipe.lock.yaml", recipe)
    assert load_recipe("recipe.lock.yaml").recipe == recipe


def test_mutated_recipes_load_or_are_refused(folder: Path) -> None:
    """Whatever a recipe's text becomes, loading it ends with a recipe or with an error that names the file."""
    rng = random.Random(7)
    text = builtin_recipes()["demo"].read_text()
    pieces = [
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "\n",
        " ",
        "&a ",
        "*a",
        "!!x ",
        "#",
        "'",
        '"',
        "|",
        ">",
        "-",
        "? ",
        "<<: ",
        "é",
        "\t",
    ]
    refused: list[LlmpipeError] = []
    for _ in range(150):
        mutated = text
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(mutated))
            stop = start + rng.choice([0, 0, 1, 5, 40])
            mutated = mutated[:start] + rng.choice(pieces) * rng.randint(0, 2) + mutated[stop:]
        (folder / "m.yaml").write_text(mutated)
        try:
            load_recipe("m.yaml")
        except LlmpipeError as error:
            refused.append(error)
    assert 20 < len(refused) < 150
    assert all(error.exit_code == 2 and (error.where or "").startswith("m.yaml") for error in refused)
