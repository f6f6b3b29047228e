"""Fine-tuning as users type it, over real ranks: from a run with LoRA, then evaluate, generate, merge and train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_train_command import RECIPE, llmpipe, llmpipe_json

from llmpipe_cli.run import RunDirectory, list_runs

pytestmark = pytest.mark.slow

LORA = """\
name: adapted
lora: {r: 4, alpha: 8, target_modules: all-linear}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a pretrained run and a recipe that adapts it."""
    path = tmp_path_factory.mktemp("work")
    (path / "tiny.yaml").write_text(RECIPE)
    (path / "adapted.yaml").write_text(LORA + RECIPE.partition("\n")[2])
    (path / "corpus").mkdir()
    for number in range(20):
        text = " ".join(f"the {(number * word) % 17}th fox jumps over dog {word}." for word in range(40))
        (path / "corpus" / f"{number}.txt").write_text(text)
    llmpipe(path, "train", "tiny.yaml")
    return path


def test_lora_from_a_run(folder: Path) -> None:
    document = llmpipe_json(folder, "finetune", "adapted.yaml", "--from", "tiny")
    checkpoint = Path(document["checkpoint"])
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not list(checkpoint.glob("model*.safetensors"))
    base = RunDirectory.find("tiny", folder / "runs").checkpoint(6)
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    plan = RunDirectory(Path(document["run"])).read_plan()
    assert plan["weights"] == str(base)

    resumed = llmpipe_json(
        folder, "finetune", "adapted.yaml", "--from", "tiny", "--resume", f"{checkpoint.parent}/step-00000004",
        "--set", "parallel.pipeline=1",
    )  # fmt: skip
    assert resumed["step"] == 6
    assert resumed["loss"] == pytest.approx(document["loss"], rel=1e-5)


def test_adapters_are_evaluated_merged_and_asked(folder: Path) -> None:
    evaluated = llmpipe_json(folder, "evaluate", "adapted.yaml")
    adapter = Path(evaluated["checkpoint"])
    assert adapter.parent.parent == list_runs(folder / "runs")[2].path
    llmpipe(folder, "merge", "adapted", "merged")
    whole = llmpipe_json(folder, "evaluate", "tiny.yaml", "--checkpoint", "merged")
    assert whole["metrics"] == pytest.approx(evaluated["metrics"], rel=1e-5)
    texts = [
        llmpipe_json(folder, "generate", model, "-p", "the fox", "--max-new-tokens", "8")["generations"][0]["text"]
        for model in ("adapted", "merged")
    ]
    assert texts[0] == texts[1] != ""


def test_mistakes(folder: Path) -> None:
    before = len(list_runs(folder / "runs"))
    error = llmpipe(folder, "train", "adapted.yaml", exit_code=2).stderr
    assert "LoRA adapts a pretrained model" in error
    assert "llmpipe finetune RECIPE --from NAME" in error
    llmpipe(folder, "recipes", "validate", "adapted.yaml")
    error = llmpipe(folder, "finetune", "tiny.yaml", "--from", "adapted", exit_code=2).stderr
    assert "the recipe has no lora section" in error
    assert "llmpipe merge" in error
    wrong = ["--set", "lora.target_modules=[q_porj]"]
    error = llmpipe(folder, "finetune", "adapted.yaml", "--from", "tiny", *wrong, exit_code=2).stderr
    assert "did you mean q_proj?" in error
    wrong = ["--set", "train.freeze=[model.layer.0]"]
    error = llmpipe(folder, "finetune", "tiny.yaml", "--from", "tiny", *wrong, exit_code=2).stderr
    assert "did you mean model.layers.0?" in error
    assert "not empty" in llmpipe(folder, "merge", "adapted", "merged", exit_code=2).stderr
    assert len(list_runs(folder / "runs")) == before
