"""Real jobs under torchrun on this machine: how they end, what they say, and that nothing stays behind.

The ranks run tests/sample_worker.py, which imports no torch; everything else is what a user's job goes through. `warm`
jobs are forks of a process that was started ahead (cluster/warm.py).
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

import pytest

from llmpipe_cli.cluster.launchers.base import MASK, LaunchSpec
from llmpipe_cli.cluster.launchers.local import LocalJob, LocalLauncher
from llmpipe_cli.cluster.outcome import Outcome
from llmpipe_cli.cluster.processes import is_running
from llmpipe_cli.errors import NodeError, RankError
from llmpipe_cli.run import RunDirectory, read_json

TESTS = Path(__file__).parent
WEIRD = "a b;$(touch pwned) `id` $$ ${HOME} %h 'q' \"d\" \\ \n*é\udcff"

Behaviours = dict[int, str]
Start = Callable[..., LocalJob]
both = pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])


@pytest.fixture(autouse=True)
def _worker_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{TESTS.parent}{os.pathsep}{TESTS}")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs", "sample")


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts jobs; whatever is left of them is killed in the end."""
    jobs: list[LocalJob] = []

    def start_job(
        run: RunDirectory, behaviours: Behaviours, grace: float = 60.0, warm: bool = False, **environment: str
    ) -> LocalJob:
        launcher, variables = LocalLauncher(), {"SAMPLE_WORKER": json.dumps(behaviours), **environment}
        with pytest.MonkeyPatch.context() as patch:
            if warm:
                patch.setenv("SAMPLE_WORKER", variables.pop("SAMPLE_WORKER"))
                launcher.warm_up()
            spec = LaunchSpec(run, (0, 1), "cpu", grace, variables, worker="sample_worker")
            jobs.append(launcher.start(spec))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.kill()


def test_done(run: RunDirectory, start: Start) -> None:
    outcome = finish(start(run, {0: "done", 1: "done"}))
    assert outcome == Outcome(0)
    assert run.rank_log(0).read_text() == "rank 0 of 2 does: done\n"
    assert run.rank_log(1).read_text() == "rank 1 of 2 does: done\n"


@both
def test_first_failure_is_told_not_its_followers(run: RunDirectory, start: Start, warm: bool) -> None:
    """Rank 0 loses its partner and says so before rank 1 has written why it failed."""
    outcome = finish(start(run, {0: "early follower", 1: "raise"}, warm=warm))
    assert (outcome.exit_code, outcome.rank) == (4, 1)
    assert isinstance(outcome.error, RankError)
    assert outcome.error.message == "ValueError: the data of rank 1 is bad"
    assert outcome.error.where == f"rank 1 (host {os.uname().nodename}, stage 1)"
    assert outcome.traceback is not None
    assert 'sample_worker.py", line' in outcome.traceback


@both
def test_rank_killed_and_partner_that_ignores_sigterm(run: RunDirectory, start: Start, warm: bool) -> None:
    job = start(run, {0: "ignore"}, warm=warm)
    victim = worker_pids(run)[1]
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    outcome = finish(job)
    assert time.monotonic() - killed < 10, "the promised bound"
    assert (outcome.exit_code, outcome.rank) == (4, 1)
    assert outcome.error is not None
    assert outcome.error.message == "the rank was killed by signal 9 (SIGKILL)"
    assert outcome.error.where == f"rank 1 (host {os.uname().nodename}, stage 1)"
    assert not alive(run)


def test_killed_guardian_and_early_death(run: RunDirectory, start: Start, tmp_path: Path) -> None:
    """Two jobs at once: in one a guardian is killed, in the other a rank dies before it has done anything."""
    other = RunDirectory.create(tmp_path / "runs", "other")
    first, second = start(run, {0: "ignore"}, warm=True), start(other, {1: "die at once"}, warm=True)
    outcome = finish(second)
    assert time.time() - (other.logs / "seen-1.json").stat().st_mtime < 15, "the promised bound"
    assert (outcome.exit_code, outcome.rank) == (4, 1)
    assert outcome.error is not None
    assert outcome.error.message == "the rank ended with code 11 without saying why"
    assert outcome.traceback == "rank 1 of 2 does: die at once"
    worker_pids(run)
    os.kill(read_json(run.rank_record(0))["pid"], signal.SIGKILL)
    outcome = finish(first)
    assert (outcome.exit_code, outcome.rank) == (4, 0)
    assert not alive(run)
    assert not alive(other)


@both
def test_agent_killed(run: RunDirectory, start: Start, warm: bool) -> None:
    job = start(run, {0: "ignore", 1: "child"}, warm=warm)
    worker_pids(run)
    os.kill(job.agent_pid, signal.SIGKILL)
    outcome = finish(job)
    assert outcome.exit_code == 5
    assert isinstance(outcome.error, NodeError)
    assert not alive(run)


@both
def test_stop_saves_on_all_ranks(run: RunDirectory, start: Start, warm: bool) -> None:
    """Rank 1 needs longer to save than rank 0; torchrun must not end it because rank 0 ended with 75."""
    job = start(run, {}, warm=warm)
    worker_pids(run)
    job.request_stop()
    assert finish(job) == Outcome(75)
    assert sorted(path.name for path in run.logs.glob("saved-*")) == ["saved-0", "saved-1"]


def test_one_grace_period_and_bystander(run: RunDirectory, start: Start, tmp_path: Path) -> None:
    """Ranks that never stop are killed after the grace period, and another job with the same command goes on."""
    bystander = RunDirectory.create(tmp_path / "runs", "bystander")
    other, job = start(bystander, {}), start(run, {0: "ignore", 1: "child"}, 1.0)
    pids = worker_pids(bystander)
    worker_pids(run)
    job.request_stop()
    outcome = finish(job)
    assert outcome.exit_code == 4
    assert outcome.error is not None
    assert "did not save and end within 1 s" in outcome.error.message
    assert not alive(run)
    assert other.poll() is None
    assert all(is_running(pid) for pid in pids)
    other.request_stop()
    assert finish(other) == Outcome(75)


def test_arguments_and_environment_byte_for_byte(start: Start, tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / WEIRD, "sample")
    assert finish(start(run, {0: "done", 1: "done"}, WEIRD=WEIRD)) == Outcome(0)
    for rank in (0, 1):
        text = (run.logs / f"seen-{rank}.json").read_text(encoding="utf-8", errors="surrogateescape")
        seen = json.loads(text)
        assert seen["argv"] == [str(run.path)]
        assert seen["weird"] == WEIRD
    assert not list(tmp_path.rglob("pwned"))
    quoted = run.launch_script.read_text(encoding="utf-8", errors="surrogateescape").replace("exec ", ": ")
    probe = quoted + 'printf %s "$WEIRD"'
    shell = subprocess.run(["sh"], input=os.fsencode(probe), capture_output=True, check=True, cwd=tmp_path)
    assert shell.stdout == os.fsencode(WEIRD)


def test_secrets_are_written_nowhere(run: RunDirectory, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_inherited")
    job = start(run, {}, WANDB_API_KEY="wandb_given")
    pids = [job.agent_pid, *worker_pids(run)]
    for pid in pids:
        assert b"wandb_given" in Path(f"/proc/{pid}/environ").read_bytes()
        assert b"wandb_given" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    job.request_stop()
    assert finish(job) == Outcome(75)
    for path in run.path.rglob("*"):
        if path.is_file():
            assert b"wandb_given" not in path.read_bytes(), path
            assert b"hf_inherited" not in path.read_bytes(), path
    spec = LaunchSpec(run, (0,), "cpu", environment={"WANDB_API_KEY": "wandb_given", "HF_HOME": "/models"})
    shown = LocalLauncher().commands(spec)[0].shown_environment()
    assert shown["WANDB_API_KEY"] == MASK
    assert shown["HF_HOME"] == "/models"
    assert shown["TOKENIZERS_PARALLELISM"] == "false"


@pytest.mark.parametrize(
    ("signals", "behaviours", "exit_code", "state"),
    [
        ([signal.SIGTERM], {}, 75, "stopped"),
        ([signal.SIGINT], {}, 75, "stopped"),
        ([signal.SIGINT, signal.SIGINT], {0: "ignore", 1: "ignore"}, 130, "failed"),
    ],
)
def test_signals_to_the_controller(
    run: RunDirectory, signals: list[int], behaviours: Behaviours, exit_code: int, state: str
) -> None:
    controller = start_controller(run, behaviours)
    worker_pids(run)
    for number in signals:
        controller.send_signal(number)
        wait_until(run.stop_file.exists)
        time.sleep(0.3)
    _, err = controller.communicate(timeout=240)
    assert controller.returncode == exit_code
    assert run.status()["state"] == state
    assert "stopping: the ranks finish their step and save" in err
    assert not alive(run)


def test_controller_killed(run: RunDirectory) -> None:
    """Nothing of the job is left, not even a grandchild in a session of its own."""
    controller = start_controller(run, {0: "ignore", 1: "child"})
    pids = worker_pids(run)
    grandchild = run.logs / "grandchild.pid"
    wait_until(grandchild.exists)
    wait_until(lambda: grandchild.read_text() != "")
    pids.append(int(grandchild.read_text()))
    assert all(is_running(pid) for pid in pids)
    assert run.status()["state"] == "running"
    controller.kill()
    controller.wait()
    wait_until(lambda: not any(is_running(pid) for pid in pids) and not alive(run), 30)
    assert run.status()["state"] == "lost"


def start_controller(run: RunDirectory, behaviours: Behaviours) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TESTS / "sample_controller.py"), str(run.path), "2", "60"],
        env=os.environ | {"SAMPLE_WORKER": json.dumps(behaviours)},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(job: LocalJob, seconds: float = 240.0) -> Outcome:
    """The outcome of a job that is about to end."""
    end = time.monotonic() + seconds
    while (outcome := job.poll()) is None:
        assert time.monotonic() < end, "the job does not end"
        time.sleep(0.05)
    return outcome


def worker_pids(run: RunDirectory) -> list[int]:
    """Process ids of both workers, once they have begun their work."""
    seen = [run.logs / f"seen-{rank}.json" for rank in (0, 1)]
    wait_until(lambda: all(read_json(path) is not None for path in seen))
    return [read_json(path)["pid"] for path in seen]


def alive(run: RunDirectory) -> list[int]:
    """The ranks' processes, and all that carry the run directory in their environment or command line."""
    records = [read_json(run.rank_record(rank)) or {} for rank in (0, 1)]
    ranks = {record.get(key) for record in records for key in ("pid", "worker_pid")}
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
        except OSError:
            continue
        of_the_run = os.fsencode(run.path) in text or (text and int(entry.name) in ranks)
        if of_the_run and is_running(int(entry.name)):
            found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)
