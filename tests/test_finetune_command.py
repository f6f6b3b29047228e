"""Fine-tuning as users type it, over real ranks: from a run with LoRA, then evaluate, generate, merge and train on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Commands
from rank_pool import RankPool
from test_train_command import RECIPE

from llmpipe_cli.run import RunDirectory, list_runs

LORA = """\
name: adapted
lora: {r: 4, alpha: 8, target_modules: all-linear}
"""


@pytest.fixture(scope="module")
def llmpipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Commands in a working directory with a pretrained run and a recipe that adapts it."""
    path = tmp_path_factory.mktemp("work")
    (path / "tiny.yaml").write_text(RECIPE)
    (path / "adapted.yaml").write_text(LORA + RECIPE.partition("\n")[2])
    (path / "corpus").mkdir()
    for number in range(20):
        text = " ".join(f"the {(number * word) % 17}th fox jumps over dog {word}." for word in range(40))
        (path / "corpus" / f"{number}.txt").write_text(text)
    with RankPool(2) as pool:
        commands = Commands(path, pool)
        commands.run("train", "tiny.yaml")
        yield commands


def test_lora_from_a_run(llmpipe: Commands) -> None:
    document = llmpipe.json("finetune", "adapted.yaml", "--from", "tiny")
    checkpoint = Path(document["checkpoint"])
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not list(checkpoint.glob("model*.safetensors"))
    base = RunDirectory.find("tiny", llmpipe.folder / "runs").checkpoint(6)
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    plan = RunDirectory(Path(document["run"])).read_plan()
    assert plan["weights"] == str(base)

    resumed = llmpipe.json(
        "finetune", "adapted.yaml", "--from", "tiny", "--resume", f"{checkpoint.parent}/step-00000004",
        "--set", "parallel.pipeline=1",
    )  # fmt: skip
    assert resumed["step"] == 6
    assert resumed["loss"] == pytest.approx(document["loss"], rel=1e-5)


def test_adapters_are_evaluated_merged_and_asked(llmpipe: Commands) -> None:
    evaluated = llmpipe.json("evaluate", "adapted.yaml")
    adapter = Path(evaluated["checkpoint"])
    assert adapter.parent.parent == list_runs(llmpipe.folder / "runs")[2].path
    llmpipe.run("merge", "adapted", "merged")
    whole = llmpipe.json("evaluate", "tiny.yaml", "--checkpoint", "merged")
    assert whole["metrics"] == pytest.approx(evaluated["metrics"], rel=1e-5)
    texts = [
        llmpipe.json("generate", model, "-p", "the fox", "--max-new-tokens", "8")["generations"][0]["text"]
        for model in ("adapted", "merged")
    ]
    assert texts[0] == texts[1] != ""


def test_mistakes(llmpipe: Commands) -> None:
    before = len(list_runs(llmpipe.folder / "runs"))
    error = llmpipe.run("train", "adapted.yaml", exit_code=2).stderr
    assert "LoRA adapts a pretrained model" in error
    assert "llmpipe finetune RECIPE --from NAME" in error
    llmpipe.run("recipes", "validate", "adapted.yaml")
    error = llmpipe.run("finetune", "tiny.yaml", "--from", "adapted", exit_code=2).stderr
    assert "the recipe has no lora section" in error
    assert "llmpipe merge" in error
    wrong = ["--set", "lora.target_modules=[q_porj]"]
    error = llmpipe.run("finetune", "adapted.yaml", "--from", "tiny", *wrong, exit_code=2).stderr
    assert "did you mean q_proj?" in error
    wrong = ["--set", "train.freeze=[model.layer.0]"]
    error = llmpipe.run("finetune", "tiny.yaml", "--from", "tiny", *wrong, exit_code=2).stderr
    assert "did you mean model.layers.0?" in error
    assert "not empty" in llmpipe.run("merge", "adapted", "merged", exit_code=2).stderr
    assert len(list_runs(llmpipe.folder / "runs")) == before
