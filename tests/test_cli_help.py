"""Help answers at once: nothing heavy is imported for it. And what the command line promises about its errors."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Commands
from typer.testing import CliRunner

from llmpipe_cli.cli.app import app
from llmpipe_cli.errors import LlmpipeError
from llmpipe_cli.run import RunDirectory, list_runs

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "numpy", "matplotlib", "tokenizers", "ruamel.yaml")
COMMANDS = [
    [],
    ["train"],
    ["pretrain"],
    ["finetune"],
    ["evaluate"],
    ["generate"],
    ["chat"],
    ["bench"],
    ["sweep"],
    ["compress"],
    ["merge"],
    ["doctor"],
    ["plan"],
    ["data"],
    ["data", "prepare"],
    ["data", "show"],
    ["recipes"],
    ["recipes", "validate"],
    ["runs"],
    ["runs", "ls"],
    ["runs", "show"],
    ["runs", "logs"],
    ["runs", "report"],
    ["runs", "timeline"],
    ["runs", "cancel"],
]

ALL_HELP = """
import json, sys
from llmpipe_cli.cli.app import app
loaded = {}
for command in json.loads(sys.argv[1]):
    try:
        app([*command, "--help"])
    except SystemExit as ended:
        assert not ended.code, (command, ended.code)
    loaded[" ".join(command)] = sorted(set(json.loads(sys.argv[2])) & set(sys.modules))
print("LOADED" + json.dumps(loaded))
"""


def llmpipe(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from llmpipe_cli.cli.app import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=cwd
    )


def test_help_of_every_command_imports_nothing_heavy() -> None:
    process = subprocess.run(
        [sys.executable, "-c", ALL_HELP, json.dumps(COMMANDS), json.dumps(HEAVY)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    loaded = json.loads(process.stdout.rpartition("LOADED")[2])
    assert loaded == {" ".join(command): [] for command in COMMANDS}
    assert "Train language models with pipeline parallelism" in process.stdout
    assert "--grace-seconds" in process.stdout


def test_main_help_does_not_import_pydantic() -> None:
    code = "import sys; from llmpipe_cli.cli.app import app; app(['--help'], standalone_mode=False); "
    code += "sys.exit('pydantic' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert process.returncode == 0
    assert "finetune" in process.stdout


def test_version() -> None:
    from llmpipe_cli import __version__

    process = llmpipe("--version")
    assert (process.returncode, process.stdout) == (0, f"llmpipe {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["train", "missing.yaml"], 2, ["missing.yaml"]),
        (["train", "r.yaml", "--set", "train.max_stepz=3"], 2, ["max_stepz", "max_steps"]),
        (["train", "r.yaml", "--launcher", "ssh"], 2, ["needs to know the nodes", "--hostfile FILE"]),
        (["train", "r.yaml", "--hostfile", "r.yaml"], 2, ["r.yaml:1", "is not a port"]),
        (["train", "r.yaml", "--launcher", "bogus"], 2, ["'bogus' is not a launcher"]),
        (["train", "r.yaml", "--env", "NOT_SET_ANYWHERE"], 2, ["NOT_SET_ANYWHERE is not set in this shell"]),
        (["train", "r.yaml", "--resume", "nowhere"], 6, ["nowhere", "there is no checkpoint"]),
        (["train", "r.yaml", "--resume", "."], 6, ["there is no whole checkpoint"]),
        (["train", "r.yaml", "--devices", "0"], 2, ["--devices 0"]),
        (["train", "r.yaml", "--bogus"], 2, ["No such option"]),
        (["evaluate", "r.yaml"], 6, ["there is no checkpoint of 'tiny'", "train first"]),
        (["generate", ".", "-p", "x"], 2, ["there is no config.json in this folder"]),
        (["generate", "./nothing", "-p", "x"], 6, ["./nothing"]),
        (["generate", "gpt2"], 2, ["there is nothing to go on from"]),
        (["runs", "show", "nothing"], 2, ["there is no run 'nothing' in runs"]),
        (["runs", "logs"], 2, ["there is no run 'latest'"]),
    ],
)
def test_mistakes_end_with_their_exit_code_and_a_hint(
    arguments: list[str], exit_code: int, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(
        "name: tiny\n"
        "model: {config: {model_type: llama, hidden_size: 32, num_hidden_layers: 2}}\n"
        "data: {train: {synthetic: true}, validation: {synthetic: true}, sequence_len: 16}\n"
        "train: {max_steps: 2}\n"
    )
    process = llmpipe(*arguments, cwd=tmp_path)
    assert process.returncode == exit_code, process.stderr
    assert process.stdout == ""
    assert "Traceback" not in process.stderr
    for word in words:
        assert word in process.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "where", "words"),
    [
        (["train", "r.yaml", "--include", "node-1"], "--include node-1", "reads no hostfile"),
        (["train", "r.yaml", "--launcher", "slurm", "--hostfile", "h"], "--hostfile h", "reads no hostfile"),
        (["evaluate", "r.yaml", "--limit", "3"], "--limit 3", "for the harness"),
        (["evaluate", "r.yaml", "--folds", "2", "--harness", "arc_easy"], None, "exclude each other"),
        (["compress", "m", "out", "--quantize", "int8", "--set", "name=x"], "--set name=x", "there is none"),
        (["bench", "r.yaml", "--png", "nowhere/b.png"], "nowhere/b.png", "folder does not exist"),
        (["runs", "timeline", "--png", "step.jpeg2"], "step.jpeg2", "no picture's name"),
        (["runs", "timeline", "--trace", "."], ".", "is a folder"),
        (["generate", ".", "-p", "x", "-o", "nowhere/out.jsonl"], "nowhere/out.jsonl", "folder does not exist"),
        (["generate", ".", "-p", "\udcff"], r"'\udcff'", "not Unicode text"),
        (["generate", ".", "--prompts", "p.jsonl"], "p.jsonl:1", "not a JSON object with a text"),
        # The run has no checkpoint: it is looked for where the recipe keeps its runs, and not at the hub.
        (["finetune", "r.yaml", "--from", "tiny"], None, "there is no checkpoint in"),
    ],
)
def test_flags_without_an_effect_and_wrong_places_are_told_first(
    arguments: list[str], where: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    RunDirectory.create("elsewhere", "tiny")
    Path("p.jsonl").write_text('{"prompt": "\\ud800"}\n')
    Path("r.yaml").write_text(
        "name: tiny\noutput_dir: elsewhere\nmodel: {config: {model_type: llama}}\n"
        "data: {train: {synthetic: true}, validation: {synthetic: true}, sequence_len: 16}\ntrain: {max_steps: 2}\n"
    )
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, LlmpipeError), error
    assert words in error.message
    assert where is None or error.where == where
    assert len(list_runs("elsewhere")) == 1


def test_json_errors_are_one_document(tmp_path: Path) -> None:
    process = llmpipe("runs", "show", "nothing", "--json", cwd=tmp_path)
    assert process.returncode == 2
    document = json.loads(process.stdout)
    assert document["error"]["exit_code"] == 2
    assert document["error"]["message"] == "there is no run 'nothing' in runs"
    assert "error: there is no run" in process.stderr


def test_a_disk_that_takes_no_files_is_no_fault_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_folder: Path) -> list[RunDirectory]:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/plan.json")

    monkeypatch.setattr("llmpipe_cli.cli.runs.list_runs", refuse)
    printed = Commands(tmp_path, None).run("runs", "ls", "--json", exit_code=2)
    assert json.loads(printed.stdout)["error"]["message"] == "a file cannot be written: No space left on device"
    assert "at runs/plan.json" in printed.stderr


def test_a_fault_of_the_program_is_one_line_and_a_file(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from llmpipe_cli.cli import app, runs; "
        "runs.list_runs = lambda folder: 1 / 0; sys.argv = ['llmpipe', 'runs', 'ls']; app.main()"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"TMPDIR": str(tmp_path)},
    )
    assert process.returncode == 1
    first, second = process.stderr.splitlines()
    assert first == "this is a fault in llmpipe: ZeroDivisionError: division by zero"
    assert "division by zero" in Path(second.rpartition(" ")[2]).read_text()
