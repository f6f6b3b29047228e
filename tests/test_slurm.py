"""Training under a real Slurm with two nodes: waiting, preemption, requeueing, faults (tests/slurm_cluster.py)."""

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
from slurm_cluster import running_slurm, why_not

from llmpipe_cli.engine.manifest import verify
from llmpipe_cli.run import RunDirectory, list_runs, read_json, read_metrics

ROOT = Path(__file__).parent.parent
REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with running_slurm(tmp_path_factory.mktemp("slurm")) as variables:
        yield variables


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with spaces in its name and the demo recipe, cut to a few short steps."""
    path = tmp_path_factory.mktemp("a work %j dir")
    (path / "few.yaml").write_text(
        f"extends: {ROOT}/recipes/demo.yaml\nname: few\n"
        "data: {train: {files: '{stdlib}/[a-c]*.py'}, sequence_len: 32}\n"
        "train: {max_steps: 40, global_batch_size: 4, micro_batch_size: 1, learning_rate: 3.0e-4}\n"
        "evaluation: {every_steps: null}\ncheckpoint: {every_steps: 1000}\n"
    )
    return path


def environment(folder: Path, slurm: dict[str, str]) -> dict[str, str]:
    added = {"LLMPIPE_CACHE": str(folder / "cache"), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **added, **slurm, "OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "llmpipe_cli", *arguments]


def test_preempted_job_goes_on_at_the_same_step(folder: Path, slurm: dict[str, str]) -> None:
    """`scancel --signal=USR1` saves and requeues; the losses are those of one process that was never disturbed."""
    variables = environment(folder, slurm)
    train = subprocess.Popen(
        command("train", "few.yaml", "--json", "--launcher", "slurm", "--launcher-option", "nodes=2"),
        cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run = wait_for(lambda: next(iter(list_runs(folder / "runs")), None))
    job = wait_for(lambda: (read_json(run.control / "slurm-job.json") or {}).get("job_id"))
    wait_for(lambda: len(steps(run)) >= 3, train)
    held = read_json(run.rank_record(0))["worker_pid"]
    os.kill(held, signal.SIGSTOP)  # the few steps that are left must not be done before the request comes
    subprocess.run(["scancel", "--signal=USR1", job], env=variables, check=True)
    wait_for(run.stop_file.exists, train)
    os.kill(held, signal.SIGCONT)
    # Slurm lets a requeued job rest for two minutes, which its owner may cut short.
    wait_for(lambda: "BeginTime" in scontrol(variables, "show", "job", job), train)
    scontrol(variables, "update", f"JobId={job}", "StartTime=now")
    out, err = train.communicate(timeout=240)
    assert train.returncode == 0, err + (run.logs / f"slurm-{job}.log").read_text()
    assert json.loads(out)["state"] == "done"
    assert [line["step"] for line in steps(run)] == list(range(1, 41))
    resumed = [line["step"] for line in read_metrics(run.metrics) if line.get("event") == "resume"]
    assert len(resumed) == 1
    assert 3 <= resumed[0] < 40
    assert run.steps_saved() == [*resumed, 40]
    verify(run.checkpoint(40))
    assert (run.logs / "attempt-0" / "rank-00001.log").exists()
    assert len({read_json(run.rank_record(rank))["pid"] for rank in (0, 1)}) == 2

    alone = subprocess.run(
        command("train", "few.yaml", "--json", "--set", "parallel.pipeline=1", "--set", "name=alone"),
        cwd=folder, env=variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = steps(RunDirectory(Path(json.loads(alone.stdout)["run"])))
    assert [line["loss"] for line in steps(run)] == pytest.approx([line["loss"] for line in expected], rel=1e-4)


def test_killed_rank_inside_an_allocation(folder: Path, slurm: dict[str, str]) -> None:
    """`salloc`, and in it the command: no job of its own; a killed rank is named."""
    variables = environment(folder, slurm)
    train = subprocess.Popen(
        ["salloc", "--quiet", "--nodes=2", *command("train", "few.yaml", "--launcher", "slurm", "--set", "name=inside",
         "--set", "train.max_steps=100000")],
        cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    found = wait_for(lambda: [run for run in list_runs(folder / "runs") if run.recipe_name == "inside"], train)
    wait_for(lambda: steps(found[0]), train)
    os.kill(read_json(found[0].rank_record(1))["worker_pid"], signal.SIGKILL)
    _, err = train.communicate(timeout=240)
    assert train.returncode == 4
    assert "the rank was killed by signal 9 (SIGKILL)" in err
    assert "rank 1 (host" in err
    assert not (found[0].control / "slurm-job.json").exists()


def test_waiting_job_is_detached_and_cancelled(folder: Path, slurm: dict[str, str]) -> None:
    variables = environment(folder, slurm)
    holder = subprocess.run(
        ["sbatch", "--parsable", "--nodes=2", "--output=/dev/null", "--wrap", "sleep 600"],
        cwd=folder, env=variables, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    started = subprocess.run(
        command("train", "few.yaml", "--json", "--detach", "--launcher", "slurm", "--launcher-option", "nodes=2",
                "--set", "name=waiting"),
        cwd=folder, env=variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    run = RunDirectory(Path(json.loads(started.stdout)["run"]))
    job = wait_for(lambda: (read_json(run.control / "slurm-job.json") or {}).get("job_id"))
    assert "JobState=PENDING" in scontrol(variables, "show", "job", job)
    subprocess.run(command("runs", "cancel", run.name), cwd=folder, env=variables, check=True)
    wait_for(run.status_file.exists)
    assert run.status()["state"] == "stopped"
    assert "JobState=CANCELLED" in scontrol(variables, "show", "job", job)
    subprocess.run(["scancel", holder], env=variables, check=True)


def scontrol(variables: dict[str, str], *arguments: str) -> str:
    process = subprocess.run(["scontrol", *arguments], env=variables, capture_output=True, text=True, check=True)
    return process.stdout


def steps(run: RunDirectory) -> list[dict[str, float]]:
    return [line for line in read_metrics(run.metrics) if "event" not in line]


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 300.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it does not happen"
        assert process is None or process.poll() is None, process and process.communicate()
        time.sleep(0.1)
    return found
