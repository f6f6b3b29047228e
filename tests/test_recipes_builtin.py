"""The ready recipes, and the `llmpipe recipes` commands around them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmpipe_cli.recipe.builtin import builtin_folder, builtin_recipes
from llmpipe_cli.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]


def llmpipe(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", "from llmpipe_cli.cli.app import main; main()", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_ready_recipe_is_valid_and_described(name: str) -> None:
    loaded = load_recipe(name, job="train")
    assert loaded.recipe.name == name, "a run is found by the name of its recipe"
    assert loaded.warnings == []
    load_recipe(name, job="evaluate")
    first = loaded.text.splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith(".")
    assert len(first) <= 120
    assert f"| `{name}` | {loaded.recipe.task} | {first[2:]} |" in (ROOT / "docs" / "tasks.md").read_text()


def test_the_demo_needs_no_network() -> None:
    recipe = load_recipe("demo").recipe
    assert recipe.model.from_ is None
    assert recipe.data.train is not None
    assert recipe.data.train.files == "{stdlib}/**/*.py"
    assert not isinstance(recipe.tokenizer, str)


def test_ls(tmp_path: Path) -> None:
    result = llmpipe("recipes", "ls", folder=tmp_path)
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == sorted(builtin_recipes())
    assert "two stages on two CPU cores" in result.stdout
    rows = json.loads(llmpipe("recipes", "ls", "--json", folder=tmp_path).stdout)
    assert {row["name"]: row["task"] for row in rows}["bert-agnews"] == "classification"


def test_cp_never_overwrites(tmp_path: Path) -> None:
    assert llmpipe("recipes", "cp", "demo", folder=tmp_path).returncode == 0
    source = builtin_recipes()["demo"].read_text()
    assert (tmp_path / "demo.yaml").read_text() == source
    (tmp_path / "demo.yaml").write_text("mine")
    result = llmpipe("recipes", "cp", "demo", folder=tmp_path)
    assert result.returncode == 2
    assert "not overwritten" in result.stderr
    assert (tmp_path / "demo.yaml").read_text() == "mine"
    (tmp_path / "sub").mkdir()
    assert llmpipe("recipes", "cp", "demo", "sub", folder=tmp_path).returncode == 0
    assert (tmp_path / "sub" / "demo.yaml").read_text() == source
    assert llmpipe("recipes", "cp", "demo", "none/x.yaml", folder=tmp_path).returncode == 2


def test_show_prints_the_file(tmp_path: Path) -> None:
    result = llmpipe("recipes", "show", "demo", folder=tmp_path)
    assert result.stdout == builtin_recipes()["demo"].read_text()


def test_validate_takes_names_files_and_changes_without_torch(tmp_path: Path) -> None:
    result = llmpipe("recipes", "validate", "demo", "--set", "train.max_steps=7", folder=tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith("demo: OK\n")
    assert "7 steps" in result.stdout
    program = (
        "import sys; sys.argv = ['llmpipe', 'recipes', 'validate', 'demo']\n"
        "from llmpipe_cli.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_validate_names_a_model_type_that_transformers_lacks(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: r\nmodel:\n  config: {model_type: lama}\n")
    result = llmpipe("recipes", "validate", "r.yaml", folder=tmp_path)
    assert result.returncode == 2
    assert "knows no model type 'lama'" in result.stderr
    assert "r.yaml:3:24" in result.stderr
    assert "llama" in result.stderr


def test_validate_json(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: x\nmodel: {from: gpt2}\ntrain: {lr: 1e-3}\n")
    document = json.loads(llmpipe("recipes", "validate", "r.yaml", "--json", folder=tmp_path).stdout)
    assert document["valid"] is True
    assert [warning["where"] for warning in document["warnings"]] == ["r.yaml:3:9"]


def test_schema_describes_every_field(tmp_path: Path) -> None:
    schema = json.loads(llmpipe("recipes", "schema", folder=tmp_path).stdout)
    assert schema["properties"]["extends"]["type"] == "string"
    assert "from" in schema["$defs"]["ModelSection"]["properties"]
    assert schema["$defs"]["TrainSection"]["properties"]["max_steps"]["description"].startswith("Optimizer steps")
    sections = {"Recipe": schema, **schema["$defs"]}
    fields = [(name, field, about) for name, one in sections.items() for field, about in one["properties"].items()]
    assert [(name, field) for name, field, about in fields if not about.get("description")] == []
    assert schema["additionalProperties"] is False


def test_missing_folder_is_an_error() -> None:
    assert builtin_folder("recipes").is_dir()
    with pytest.raises(Exception, match="this installation has no nothing"):
        builtin_folder("nothing")
