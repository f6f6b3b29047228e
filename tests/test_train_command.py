"""The commands as users type them, over real ranks: train, stop, resume on another layout, evaluate, generate.

Those that end as they began, when all is well, are run in this process (tests/commands.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Commands
from rank_pool import RankPool

from llmpipe_cli.engine.manifest import verify
from llmpipe_cli.recipe.load import load_recipe
from llmpipe_cli.report.history import load_history
from llmpipe_cli.run import RunDirectory, list_runs, read_json, read_metrics

ROOT = Path(__file__).parent.parent
RECIPE = """\
name: tiny
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
           num_key_value_heads: 2, vocab_size: 300, max_position_embeddings: 32}
tokenizer: {train: {vocab_size: 300}}
data:
  train: {files: "corpus/*.txt"}
  validation: {fraction: 0.2}
  sequence_len: 32
train: {max_steps: 6, global_batch_size: 4, micro_batch_size: 1, learning_rate: 1.0e-2, lr_scheduler_type: constant}
checkpoint: {every_steps: 2}
evaluation: {every_steps: 3}
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a recipe, a small corpus and its own cache; the tests below use it in turn."""
    path = tmp_path_factory.mktemp("work")
    (path / "tiny.yaml").write_text(RECIPE)
    (path / "corpus").mkdir()
    for number in range(20):
        text = " ".join(f"the {(number * word) % 17}th fox of the corpus jumps over dog {word}." for word in range(40))
        (path / "corpus" / f"{number}.txt").write_text(text)
    return path


@pytest.fixture(scope="module")
def inside(folder: Path) -> Iterator[Commands]:
    """Commands in this process, in the same folder."""
    with RankPool(2) as pool:
        yield Commands(folder, pool)


def llmpipe(folder: Path, *arguments: str, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
    process = subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, cwd=folder, env=environment(folder)
    )
    assert process.returncode == exit_code, process.stderr
    assert "Traceback" not in process.stderr
    return process


def llmpipe_json(folder: Path, *arguments: str, exit_code: int = 0) -> dict[str, Any]:
    document = json.loads(llmpipe(folder, *arguments, "--json", exit_code=exit_code).stdout)
    assert isinstance(document, dict)
    return document


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "llmpipe_cli", *arguments]


def environment(folder: Path) -> dict[str, str]:
    added = {"LLMPIPE_CACHE": str(folder / "cache"), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **added, "OMP_NUM_THREADS": "1"}


def test_dry_run_starts_nothing(folder: Path) -> None:
    document = Commands(folder, None).json("train", "tiny.yaml", "--dry-run", "--env", "MY_API_KEY=secret")
    assert document["layout"]["pipeline"] == 2
    assert document["layout"]["num_micro_batches"] == 4
    node = document["commands"][0]
    assert "--nproc-per-node=2" in node["argv"]
    assert node["environment"]["MY_API_KEY"] == "********"
    assert document["deepspeed_config"]["train_batch_size"] == 4
    assert not (folder / "runs").exists()


def test_train_leaves_a_whole_run_directory(folder: Path) -> None:
    document = llmpipe_json(folder, "train", "tiny.yaml")
    run = RunDirectory(Path(document["run"]))
    assert (document["state"], document["exit_code"], document["step"]) == ("done", 0, 6)
    assert Path(document["checkpoint"]) == run.checkpoint(6)
    assert run.steps_saved() == [2, 4, 6]
    assert Path(document["plot"]).read_bytes().startswith(b"\x89PNG")
    steps = [line for line in read_metrics(run.metrics) if "event" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["loss"] == document["loss"] < steps[0]["loss"]
    assert len(steps[-1]["stages"]) == 2
    assert run.recipe.read_text() == RECIPE
    locked = load_recipe(run.recipe_lock).recipe
    assert locked.train.micro_batch_size == 1
    assert "torch.distributed.run" in run.launch_script.read_text()
    assert [path.name for path in run.log_files()] == ["rank-00000.log", "rank-00001.log"]


def test_resume_on_another_layout_goes_on_with_the_same_curve(folder: Path, inside: Commands) -> None:
    whole = list_runs(folder / "runs")[0]
    checkpoint = str(whole.checkpoint(2))
    document = inside.json("train", "tiny.yaml", "--resume", checkpoint, "--set", "parallel.pipeline=1")
    resumed = RunDirectory(Path(document["run"]))
    assert resumed != whole
    history, undisturbed = load_history(resumed), load_history(whole)
    assert [part.layout for part in history.parts] == ["2 stages", "1 device"]
    assert [step for step, _ in history.train] == [1, 2, 3, 4, 5, 6]
    for (_, mine), (_, theirs) in zip(history.train, undisturbed.train, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    report = inside.json("runs", "report", resumed.name, "--compare", whole.name, "-o", "compare.png")
    assert report["comparisons"][0]["num_steps"] == 6
    assert report["comparisons"][0]["max_relative_difference"] < 1e-5
    assert (folder / "compare.png").is_file()


def test_resume_of_a_finished_training_starts_no_rank(folder: Path) -> None:
    commands, before = Commands(folder, None), list_runs(folder / "runs")
    document = commands.json("train", "tiny.yaml", "--resume", "auto")
    assert (document["state"], document["exit_code"], document["step"]) == ("done", 0, 6)
    assert Path(document["checkpoint"]).name == "step-00000006"
    checkpoint = str(before[0].checkpoint(4))
    printed = commands.run("train", "tiny.yaml", "--resume", checkpoint, "--stop-at", "3", exit_code=75)
    assert "nothing is left to train: the checkpoint is after step 4 of 6" in printed.stderr
    assert list_runs(folder / "runs") == before


def test_sigterm_saves_and_stops(folder: Path) -> None:
    process = subprocess.Popen(
        command("train", "tiny.yaml", "--set", "train.max_steps=5000", "--set", "name=long"),
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 300
    while not any(run.recipe_name == "long" and run.steps_saved() for run in list_runs(folder / "runs")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    assert "stopped on request; go on with `--resume auto`" in err
    stopped = RunDirectory.find("long", folder / "runs")
    assert stopped.status()["state"] == "stopped"
    last = [line for line in read_metrics(stopped.metrics) if "event" not in line][-1]
    assert stopped.steps_saved()[-1] == last["step"], "the step it was stopped at is saved"


def test_killed_rank_and_two_ctrl_c_leave_checkpoints_to_go_on_from(folder: Path) -> None:
    """A rank that dies in mid-step is named; the next run goes on from what was saved, and leaves it whole."""
    stopped = RunDirectory.find("long", folder / "runs")
    killed, process = resume_long(folder)
    os.kill(read_json(killed.rank_record(1))["worker_pid"], signal.SIGKILL)
    died = time.time()
    _, err = process.communicate(timeout=60)
    assert read_json(killed.status_file)["time"] - died < 10, "the promised bound"
    assert process.returncode == 4
    assert "the rank was killed by signal 9 (SIGKILL)" in err
    assert f"rank 1 (host {os.uname().nodename}, stage 1)" in err

    interrupted, process = resume_long(folder)
    os.kill(read_json(interrupted.rank_record(0))["worker_pid"], signal.SIGSTOP)  # saving must not be quicker
    process.send_signal(signal.SIGINT)
    wait_for(interrupted.stop_file.exists)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    for before, after in ((stopped, killed), (killed, interrupted)):
        resumed = [line["step"] for line in read_metrics(after.metrics) if line.get("event") == "resume"]
        assert resumed == [before.steps_saved()[-1]]
    verify(interrupted.checkpoint(interrupted.steps_saved()[-1]))
    # Seconds are predicted with the table's rates at first, then with what earlier runs of the model took here.
    first, last = (read_json(run.path / "forecast.json") for run in (list_runs(folder / "runs")[0], interrupted))
    assert "rates of the table" in first["presumed"]
    assert last["presumed"] == ""


def resume_long(folder: Path) -> tuple[RunDirectory, subprocess.Popen[str]]:
    """The long training, gone on with and saved once more."""
    before = {run.path for run in list_runs(folder / "runs")}
    process = subprocess.Popen(
        command("train", "tiny.yaml", "--set", "train.max_steps=5000", "--set", "name=long", "--resume", "auto"),
        cwd=folder, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    found: list[RunDirectory] = []

    def saved() -> bool:
        assert process.poll() is None, process.communicate()[1]
        found[:] = [run for run in list_runs(folder / "runs") if run.path not in before and run.steps_saved()]
        return bool(found)

    wait_for(saved)
    return found[0], process


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.1)


def test_changed_text_keeps_the_tokenizer_of_the_checkpoint(folder: Path, inside: Commands) -> None:
    run = list_runs(folder / "runs")[0]
    evaluations = [line for line in read_metrics(run.metrics) if line.get("event") == "evaluation"]
    extra = folder / "corpus" / "extra.txt"
    extra.write_text("quizzical " * 3000)
    try:
        process = inside.run("evaluate", "tiny.yaml", "--checkpoint", run.name, "--json")
    finally:
        extra.unlink()
    assert "its own tokenizer is kept" in process.stderr
    # With a tokenizer trained on the changed text the loss would be that of an untrained model, log 300.
    assert json.loads(process.stdout)["metrics"]["loss"] == pytest.approx(evaluations[-1]["metrics"]["loss"], rel=0.1)


def test_generate_goes_on_from_prompts(folder: Path) -> None:
    (folder / "prompts.jsonl").write_text('{"prompt": "the fox"}\n\n{"prompt": "over dog"}\n')
    document = llmpipe_json(folder, "generate", "tiny", "--prompts", "prompts.jsonl", "--max-new-tokens", "4")
    assert [result["prompt"] for result in document["generations"]] == ["the fox", "over dog"]
    assert all(result["text"] for result in document["generations"])


def test_runs_are_listed(folder: Path, inside: Commands) -> None:
    rows = inside.json("runs", "ls")["runs"]
    states = [row["state"] for row in rows if row["job"] == "train"]
    assert states == ["done", "done", "stopped", "failed", "failed"]
    assert {row["job"] for row in rows} == {"train", "evaluate", "generate"}
    first = list_runs(folder / "runs")[0]
    text = inside.run("runs", "logs", first.name, "--rank", "0").stdout
    assert text == first.rank_log(0).read_text() != ""
    inside.run("runs", "show", "tiny", "--svg", "view.svg")
    assert (folder / "view.svg").read_text().startswith("<svg")


def test_mistakes_in_data_are_told_before_any_rank_starts(folder: Path, inside: Commands) -> None:
    before = len(list_runs(folder / "runs"))
    process = inside.run("train", "tiny.yaml", "--set", "data.train.files=none/*.txt", exit_code=2)
    assert "none/*.txt" in process.stderr
    process = inside.run("train", "tiny.yaml", "--set", "parallel.pipeline=9", exit_code=2)
    assert "9 stages, but the model can be cut into" in process.stderr
    assert "at --set parallel.pipeline=9 (parallel.pipeline)" in process.stderr
    assert len(list_runs(folder / "runs")) == before
