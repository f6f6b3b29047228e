"""Run directories: never reused, found again, and honest about how their run stands."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llmpipe_cli.cli.evaluate import _harness_model
from llmpipe_cli.cli.jobs import read_environment, refuse_other_training
from llmpipe_cli.cli.models import find_checkpoint, find_model, find_resume, naming
from llmpipe_cli.cli.runs import cancel
from llmpipe_cli.cli.runs import logs as follow
from llmpipe_cli.cluster.devices import local_devices, num_cores
from llmpipe_cli.cluster.launchers.base import is_secret
from llmpipe_cli.engine.manifest import file_entry, point, write_manifest
from llmpipe_cli.errors import CheckpointError, UsageError
from llmpipe_cli.recipe.load import load_recipe
from llmpipe_cli.run import MetricsReader, RunDirectory, list_runs, read_metrics_summary, write_json


def test_create_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda _format: "20260102-030405")
    runs = [RunDirectory.create(tmp_path / "runs", "demo") for _ in range(3)]
    assert [run.name for run in runs] == ["demo-20260102-030405", "demo-20260102-030405-2", "demo-20260102-030405-3"]
    assert {run.recipe_name for run in runs} == {"demo"}
    assert [run.name for run in list_runs(tmp_path / "runs")] == [run.name for run in runs]
    assert runs[0].path.is_absolute()


def test_output_dir_that_cannot_hold_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as raised:
        RunDirectory.create(tmp_path / "file", "demo")
    assert raised.value.hint == "set `output_dir` to a folder that can be written"


def test_find(tmp_path: Path) -> None:
    made = [RunDirectory.create(tmp_path, name) for name in ("one", "two", "one", "one-two")]
    assert RunDirectory.find("one", tmp_path) == made[2]
    assert RunDirectory.find("two", tmp_path) == made[1]
    assert RunDirectory.find(made[0].name, tmp_path) == made[0]
    assert RunDirectory.find(str(made[0].path)) == made[0]
    with pytest.raises(UsageError) as raised:
        RunDirectory.find("three", tmp_path)
    assert "one-two" in (raised.value.hint or "")


def test_status(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "demo")
    assert run.status()["state"] == "lost"
    run.write_controller()
    assert run.status()["state"] == "running"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_json(run.controller_file, {"pid": gone.pid, "host": socket.gethostname(), "ticks": "1"})
    assert run.status()["state"] == "lost"
    # A process that got the same number later is not the controller.
    write_json(run.controller_file, {"pid": os.getpid(), "host": socket.gethostname(), "ticks": "1"})
    assert run.status()["state"] == "lost"
    run.write_status("failed", 4, message="why")
    assert (run.status()["state"], run.status()["exit_code"], run.status()["message"]) == ("failed", 4, "why")


RECIPE = """\
name: demo
task: causal-lm
model: {config: {model_type: llama, hidden_size: 32}}
train: {max_steps: 4}
"""


def trained(folder: Path) -> Path:
    """The checkpoint of a run as `RECIPE` describes it."""
    run = RunDirectory.create(folder, "demo")
    model = {"config": {"model_type": "llama", "hidden_size": 32}}
    plan = {"recipe": {"model": model, "train": {"optimizer": "adamw"}}, "model_config_fields": {"vocab_size": 300}}
    write_json(run.plan, plan)
    return run.checkpoint(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.config.hidden_size=64", "the checkpoint was trained with hidden_size 32, the recipe says 64"),
        ("model.config.vocab_size=301", "the checkpoint was trained with vocab_size 300, the recipe says 301"),
        ("train.optimizer=sgd", "the checkpoint was trained with optimizer adamw, the recipe says sgd"),
    ],
)
def test_going_on_cannot_change_what_the_checkpoint_decides(tmp_path: Path, change: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    checkpoint = trained(tmp_path / "runs")
    refuse_other_training(load_recipe(tmp_path / "recipe.yaml"), checkpoint)
    refuse_other_training(load_recipe(tmp_path / "recipe.yaml", [change]), tmp_path / "moved" / "step-00000002")
    with pytest.raises(UsageError) as raised:
        refuse_other_training(load_recipe(tmp_path / "recipe.yaml", [change]), checkpoint)
    assert (raised.value.message, raised.value.where) == (message, f"--set {change}")


def test_a_name_that_is_no_hub_id_may_have_been_meant_as_a_run(tmp_path: Path) -> None:
    for place in ("model.from", "recipe.yaml:3:8 (model.from)", "recipe.yaml:1:1 (tokenizer)"):
        with pytest.raises(UsageError) as raised, naming("dmeo", tmp_path):
            raise UsageError("the config of dmeo cannot be read", where=place)
        assert raised.value.where == "dmeo"
        assert raised.value.hint == f"there is no run 'dmeo' in {tmp_path} either"
    with pytest.raises(UsageError) as raised, naming("dmeo", tmp_path):
        raise UsageError("too few", where="recipe.yaml:3:8 (train.max_steps)")
    assert raised.value.where == "recipe.yaml:3:8 (train.max_steps)"


def test_the_harness_needs_no_data_in_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "config.json").write_text("{}")
    model, recipe, _ = _harness_model(tmp_path / "recipe.yaml", str(tmp_path), [])
    assert (model, recipe.data.validation) == (tmp_path, None)


def test_cancel_asks_a_running_job_to_stop(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "demo")
    with pytest.raises(UsageError) as raised:
        cancel("demo", tmp_path)
    assert raised.value.message == "the run is not running: it is lost"
    run.write_controller()
    cancel("demo", tmp_path)
    assert run.stop_file.is_file()


def test_followed_logs_are_whole_lines_to_the_very_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory.create(tmp_path, "demo")
    run.write_controller()
    log = run.rank_log(0)
    log.write_text("one\ntw")
    news = ["o\nthree\n", "fo", "ur"]

    def grow(_seconds: float) -> None:
        with log.open("a") as file:
            file.write(news.pop(0))
        if not news:
            run.write_status("done", 0)

    monkeypatch.setattr("time.sleep", grow)
    follow("demo", follow=True, output_dir=tmp_path)
    assert capsys.readouterr().out == "one\ntwo\nthree\nfour\n"


def test_metrics_are_read_line_by_line_while_they_grow(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = MetricsReader(path)
    assert reader.read() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert reader.read() == [{"step": 1}, {"step": 2}]
    assert reader.read() == []
    with path.open("a") as file:
        file.write('ep": 3}\nnot json\n[1]\n{"loss": NaN}\n')
    lines = reader.read()
    assert lines[0] == {"step": 3}
    assert len(lines) == 2


def test_summary_of_long_metrics_keeps_events_and_last_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"event": "start"}, *[{"step": step} for step in range(1, 1001)]]
    lines.insert(500, {"event": "evaluation", "step": 499})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 10')
    summary = read_metrics_summary(path, 3)
    assert summary == [
        {"event": "start"},
        {"event": "evaluation", "step": 499},
        {"step": 998},
        {"step": 999},
        {"step": 1000},
    ]
    assert read_metrics_summary(tmp_path / "none") == []


def save(run: RunDirectory, step: int) -> Path:
    """A checkpoint as training leaves it, with a config for weights."""
    path = run.checkpoint(step)
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"step": step}))
    write_manifest(path, step, {"config.json": file_entry(path / "config.json")})
    point(run.checkpoints / "latest", path.name)
    return path


def train_run(folder: Path, name: str = "demo") -> RunDirectory:
    run = RunDirectory.create(folder, name)
    write_json(run.plan, {"job": "train"})
    return run


def test_resume_auto_takes_the_newest_run_that_has_a_checkpoint(tmp_path: Path) -> None:
    assert find_resume("auto", "demo", tmp_path / "none") is None
    run = train_run(tmp_path)
    assert find_resume("auto", "demo", tmp_path) is None
    save(run, 10)
    newest = save(run, 20)
    train_run(tmp_path)
    save(train_run(tmp_path, "other"), 30)
    evaluation = RunDirectory.create(tmp_path, "demo")
    write_json(evaluation.plan, {"job": "evaluate"})
    save(evaluation, 40)
    assert find_resume("auto", "demo", tmp_path) == newest
    assert find_resume(str(run.checkpoint(10)), "demo", tmp_path) == run.checkpoint(10)
    assert find_resume(run.name, "demo", tmp_path) == newest
    train_run(tmp_path, "other")
    assert Path(find_model("other", tmp_path)).name == "step-00000030"
    with pytest.raises(CheckpointError):
        find_model(train_run(tmp_path, "other").name, tmp_path)


def test_broken_latest_falls_back_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train_run(tmp_path)
    older = save(run, 10)
    newest = save(run, 20)
    (run.checkpoints / "latest").unlink()
    assert find_resume("auto", "demo", tmp_path) == newest
    point(run.checkpoints / "latest", "step-00000099")
    assert find_checkpoint(str(run.path), tmp_path) == newest
    (newest / "config.json").write_text(json.dumps({"step": 21}))
    assert find_checkpoint(run.name, tmp_path) == older
    words = capsys.readouterr().err
    assert "is missing or broken; going on from the newest whole checkpoint, step-00000020" in words
    assert "going on from an earlier checkpoint" in words


def test_flipped_bit_in_a_named_checkpoint(tmp_path: Path) -> None:
    path = save(train_run(tmp_path), 10)
    (path / "config.json").write_text(json.dumps({"step": 11}))
    for find in (find_checkpoint, find_model):
        with pytest.raises(CheckpointError) as raised:
            find(str(path), tmp_path)
        assert raised.value.where == str(path / "config.json")


@pytest.mark.parametrize("what", ["nowhere", ".", "/nowhere/at/all"])
def test_no_silent_restart(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        find_resume(what, "demo", tmp_path)


def test_models_by_name(tmp_path: Path) -> None:
    assert find_model("gpt2", tmp_path) == "gpt2"
    assert find_model("org/model", tmp_path) == "org/model"
    with pytest.raises(CheckpointError):
        find_model("runs/nothing", Path("runs"))  # in the folder of the runs, and so no hub id
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path), tmp_path) == tmp_path
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError):
        find_model(str(tmp_path / "empty"), tmp_path)


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "X_APIKEY"]
)
def test_secret_names(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "HF_HOME", "NCCL_DEBUG", "MASTER_PORT", "KEYBOARD"])
def test_other_names(name: str) -> None:
    assert not is_secret(name)


def test_environment_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_SHELL", "a=b")
    monkeypatch.delenv("UNSET", raising=False)
    assert read_environment(["FROM_SHELL", "X=1=2", "EMPTY="]) == {"FROM_SHELL": "a=b", "X": "1=2", "EMPTY": ""}
    for bad in ("=x", "UNSET", ""):
        with pytest.raises(UsageError):
            read_environment([bad])


def test_devices_of_a_machine_without_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert (local_devices().kind, local_devices().count) == ("cpu", min(2, num_cores()))
    many = local_devices(num_cores() + 1)
    assert many.count == num_cores() + 1
    assert many.warning is not None
    with pytest.raises(UsageError):
        local_devices(0)
