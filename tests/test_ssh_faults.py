"""What can go wrong on several nodes, over real ssh: how jobs end, what they say, and that nothing stays on any node.

The ranks run tests/sample_worker.py, which imports no torch; everything else is what a user's job goes through.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from nodes import SHARED, UNSHARED, Nodes, running_nodes, why_not

from llmpipe_cli.cluster.connection import SshOptions
from llmpipe_cli.cluster.hostfile import Host, read_hostfile
from llmpipe_cli.cluster.launchers.base import LaunchSpec
from llmpipe_cli.cluster.launchers.ssh import SshJob, SshLauncher
from llmpipe_cli.cluster.outcome import Outcome
from llmpipe_cli.errors import NodeError, PreflightError, UsageError
from llmpipe_cli.run import RunDirectory, read_json

TESTS = Path(__file__).parent
REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
WEIRD = "a b;$(touch pwned) `id` $$ ${HOME} %h 'q' \"d\" \\ \n*é\udcff"

Start = Callable[..., SshJob]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def nodes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with running_nodes(folder, tmp_path_factory.mktemp("tools")) as started:
        yield started


@pytest.fixture(autouse=True)
def _worker_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{TESTS.parent}{os.pathsep}{TESTS}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def launcher(nodes: Nodes, tmp_path: Path) -> Callable[..., SshLauncher]:
    def make(port: int = SHARED, said: list[str] | None = None, **options: float) -> SshLauncher:
        hosts = read_hostfile(nodes.hostfile(tmp_path / "hosts", port=port))
        master = options.pop("master_port", None)
        ssh = SshOptions(config=nodes.ssh_config, **options)  # type: ignore[arg-type]
        return SshLauncher(hosts, ssh, port=master, say=(said if said is not None else []).append)  # type: ignore[arg-type]

    return make


@pytest.fixture
def start(launcher: Callable[..., SshLauncher], folder: Path) -> Iterator[Start]:
    """Starts jobs of two ranks, one a node; whatever is left of them is killed in the end."""
    jobs: list[SshJob] = []

    def start_job(
        behaviours: dict[int, str], port: int = SHARED, name: str = "sample", grace: float = 60.0,
        environment: dict[str, str] | None = None, **options: float,
    ) -> SshJob:  # fmt: skip
        run = RunDirectory.create(folder / name, "sample")
        variables = {"SAMPLE_WORKER": json.dumps(behaviours), **(environment or {})}
        spec = LaunchSpec(run, (0, 1), "cpu", grace, variables, worker="sample_worker")
        jobs.append(launcher(port, **options).start(spec))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.kill()


def run_of(job: SshJob) -> RunDirectory:
    return job._spec.run


def test_unshared_job_with_odd_names_is_a_bystander_of_a_job_that_dies(
    nodes: Nodes, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything reaches the workers byte for byte, secrets stay inside the connection; killing a rank of another job
    names it and ends that job alone; a stop then saves on both nodes."""
    monkeypatch.setenv("HF_TOKEN", "hf_inherited")
    odd = start({}, UNSHARED, WEIRD, environment={"WEIRD": WEIRD, "WANDB_API_KEY": "wandb_given"})
    run = run_of(odd)
    seen = [nodes.private[rank] / run.logs.relative_to(nodes.folder) / f"seen-{rank}.json" for rank in (0, 1)]
    wait_until(lambda: all(read_file(path) for path in seen), odd)
    pids = []
    for path in seen:
        facts = json.loads(read_file(path))
        assert facts["argv"] == [str(run.path)]
        assert facts["weird"] == WEIRD
        pids.append(facts["pid"])
        environment = Path(f"/proc/{facts['pid']}/environ").read_bytes()
        assert b"WANDB_API_KEY=wandb_given\0" in environment
        assert b"HF_TOKEN=hf_inherited\0" in environment
    assert not list(nodes.folder.rglob("pwned"))
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            text = read_bytes(entry / "cmdline")
            assert b"wandb_given" not in text
            assert b"hf_inherited" not in text

    job = start({0: "ignore"})
    victim = worker_pids(job)[1]
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    outcome = finish(job)
    assert time.monotonic() - killed < 10, "the promised bound"
    assert (outcome.exit_code, outcome.rank) == (4, 1)
    assert outcome.error is not None
    assert outcome.error.message == "the rank was killed by signal 9 (SIGKILL)"
    assert outcome.error.where == "rank 1 (host node-b, stage 1)"

    assert odd.poll() is None
    odd.request_stop()
    assert finish(odd) == Outcome(75)
    assert run.rank_log(1).read_text() == "rank 1 of 2 does: wait\n"
    for folder in (nodes.folder, *nodes.private):
        for path in folder.rglob("*"):
            if path.is_file():
                assert b"wandb_given" not in path.read_bytes(), path
                assert b"hf_inherited" not in path.read_bytes(), path
    nothing_left(nodes)


def test_first_failure_and_early_death(nodes: Nodes, start: Start) -> None:
    """Two jobs at once: the first traceback is told, not its follower's; a rank that dies at once ends its job."""
    first, second = start({0: "early follower", 1: "raise"}, UNSHARED), start({1: "die at once", 0: "ignore"})
    outcome = finish(second)
    assert (outcome.exit_code, outcome.rank) == (4, 1)
    died = (run_of(second).logs / "seen-1.json").stat().st_mtime
    assert time.time() - died < 15, "the promised bound"
    outcome = finish(first)
    assert (outcome.exit_code, outcome.rank) == (4, 1)
    assert outcome.error is not None
    assert outcome.error.message == "ValueError: the data of rank 1 is bad"
    assert outcome.error.where == "rank 1 (host node-b, stage 1)"
    assert outcome.traceback is not None
    assert 'sample_worker.py", line' in outcome.traceback
    nothing_left(nodes)


@pytest.mark.parametrize("victim", ["llmpipe_cli.cluster.agent", "torch.distributed.run"])
def test_agent_of_a_node_is_killed(nodes: Nodes, start: Start, victim: str) -> None:
    job = start({0: "ignore", 1: "ignore"})
    worker_pids(job)
    for pid in nodes.processes(1, victim):
        os.kill(pid, signal.SIGKILL)
    outcome = finish(job)
    assert outcome.exit_code == 5
    assert isinstance(outcome.error, NodeError)
    nothing_left(nodes)


def test_link_goes_down(nodes: Nodes, start: Start) -> None:
    job = start({0: "ignore", 1: "ignore"}, silence_seconds=4.0)
    worker_pids(job)
    nodes.link(1, "down")
    try:
        went = time.monotonic()
        outcome = finish(job)
        assert time.monotonic() - went < 15, "the silence that is allowed, and not the grace period"
        assert outcome.exit_code == 5
        assert outcome.error is not None
        assert f"the node {nodes.addresses[1]} was lost: it has not been heard for 4 s" in outcome.error.message
        nothing_left(nodes)
    finally:
        nodes.link(1, "up")


@pytest.mark.parametrize(
    ("signals", "behaviours", "exit_code"),
    [
        ([signal.SIGTERM], {}, 75),
        ([signal.SIGINT, signal.SIGINT], {0: "ignore", 1: "ignore"}, 130),
        ([signal.SIGKILL], {0: "ignore", 1: "child"}, -9),
    ],
)
def test_signals_to_the_controller(
    nodes: Nodes, folder: Path, tmp_path: Path, signals: list[int], behaviours: dict[int, str], exit_code: int
) -> None:
    run = RunDirectory.create(folder / "signals", "sample")
    hosts = nodes.hostfile(tmp_path / "hosts")
    controller = subprocess.Popen(
        [sys.executable, str(TESTS / "sample_controller.py"), str(run.path), "2", "60", str(hosts), nodes.ssh_config],
        env=os.environ | {"SAMPLE_WORKER": json.dumps(behaviours)},
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = [run.logs / f"seen-{rank}.json" for rank in (0, 1)]
    wait_until(lambda: all(read_json(path) for path in seen))
    for number in signals:
        controller.send_signal(number)
        if number != signal.SIGKILL:
            wait_until(run.stop_file.exists)
            time.sleep(0.3)
    controller.communicate(timeout=240)
    assert controller.returncode == exit_code
    if exit_code == 75:
        assert sorted(path.name for path in run.logs.glob("saved-*")) == ["saved-0", "saved-1"]
    nothing_left(nodes, 30)


def test_ranks_that_ignore_a_stop(nodes: Nodes, start: Start) -> None:
    job = start({0: "ignore", 1: "ignore"}, grace=1.0)
    worker_pids(job)
    asked = time.monotonic()
    job.request_stop()
    outcome = finish(job)
    assert time.monotonic() - asked < 15, "one grace period for all"
    assert outcome.exit_code == 4
    assert outcome.error is not None
    assert "did not save and end within 1 s" in outcome.error.message
    nothing_left(nodes)


def test_nodes_that_cannot_be_reached(nodes: Nodes, launcher: Callable[..., SshLauncher]) -> None:
    """No sshd on one: nothing starts. 62 addresses and two that swallow packets are judged in one time-out."""
    nodes.stop_server(1, SHARED)
    try:
        with pytest.raises(PreflightError, match=r"cannot be used: .*Connection refused") as caught:
            launcher().devices(None)
        assert caught.value.where is not None
        assert caught.value.where.endswith("hosts:2")
    finally:
        nodes.start_server(1, SHARED)
    subnet = nodes.addresses[0].rsplit(".", 1)[0]
    swallowed = [f"{subnet}.{number}" for number in (250, 251)]
    for address in swallowed:
        nodes.add_hole(address)
    many = nodes.add_addresses(62)
    hosts = [Host(address, (0,), port=SHARED, place=f"hosts:{n}") for n, address in enumerate(many[:40], 1)]
    hosts += [Host(address, (0,), place=f"hosts:{n}") for n, address in enumerate(swallowed, 41)]
    hosts += [Host(address, (0,), port=SHARED, place=f"hosts:{n}") for n, address in enumerate(many[40:], 43)]
    options = SshOptions(config=nodes.ssh_config, connect_timeout_seconds=4)
    began = time.monotonic()
    with pytest.raises(PreflightError) as told:
        SshLauncher(hosts, options).devices(None)
    assert time.monotonic() - began < 20, "not 64 time-outs, and not 2"
    assert told.value.exit_code == 3
    # The other 62 are two machines: as many of their other names as have answered by then are told after these.
    first, second, *_ = [line for line in told.value.message.splitlines() if "is the same machine as" not in line]
    places = {str(told.value.where), second.removeprefix("  also ").partition(": ")[0]}
    assert places == {"hosts:41", "hosts:42"}
    for address, message in zip(swallowed, sorted([first, second], key=lambda text: swallowed[1] in text), strict=True):
        assert f"{address} cannot be used" in message
        assert "timed out" in message
    assert len(told.value.message.split("cannot be used")) == 3
    nothing_left(nodes, 60)


def test_nodes_that_differ(nodes: Nodes, launcher: Callable[..., SshLauncher], start: Start, tmp_path: Path) -> None:
    """Another torch on one node; one machine under two names; a port in use."""
    installed = metadata.version("torch")
    original = Path(metadata.distribution("torch")._path) / "METADATA"  # type: ignore[attr-defined]
    other = tmp_path / "METADATA"
    other.write_text(original.read_text().replace(f"Version: {installed}", "Version: 2.11.0", 1))
    nodes.start_server(1, 2300, before=f"mount --bind {other} {original}")
    hosts = read_hostfile(nodes.hostfile(tmp_path / "hosts"))
    ssh = SshOptions(config=nodes.ssh_config)
    different = [hosts[0], Host(nodes.addresses[1], (0,), port=2300)]
    with pytest.raises(PreflightError, match=f"has torch 2.11.0, this machine has {installed}".replace("+", r"\+")):
        SshLauncher(different, ssh).devices(None)
    alias = Host(nodes.add_addresses(1)[0], (0,), port=SHARED, place="hosts:2")
    with pytest.raises(UsageError, match="is the same machine as") as caught:
        SshLauncher([hosts[0], alias], ssh).devices(None)
    assert caught.value.exit_code == 2
    holder = subprocess.Popen(
        ["ip", "netns", "exec", nodes.names[0], sys.executable, "-c",
         "import socket,time; s = socket.create_server(('', 29555)); print(1, flush=True); time.sleep(99)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        with pytest.raises(PreflightError, match=r"port 29555 .* cannot be used: .*in use"):
            start({}, master_port=29555)
    finally:
        holder.kill()
        holder.wait()
    said: list[str] = []
    crowded = [Host(nodes.addresses[0], tuple(range(99)), port=SHARED), hosts[1]]
    ready = SshLauncher(crowded, ssh, say=said.append)
    assert ready.devices(None).count == 100
    ready.close()
    assert any("99 ranks share" in text for text in said)
    nothing_left(nodes)


def finish(job: SshJob, seconds: float = 240.0) -> Outcome:
    """The outcome of a job that is about to end."""
    end = time.monotonic() + seconds
    while (outcome := job.poll()) is None:
        assert time.monotonic() < end, "the job does not end"
        time.sleep(0.05)
    return outcome


def worker_pids(job: SshJob) -> list[int]:
    """Process ids of both workers, once they have begun their work."""
    seen = [run_of(job).logs / f"seen-{rank}.json" for rank in (0, 1)]
    wait_until(lambda: all(read_json(path) is not None for path in seen), job)
    return [read_json(path)["pid"] for path in seen]


def nothing_left(nodes: Nodes, seconds: float = 10.0) -> None:
    wait_until(lambda: not nodes.processes(0) and not nodes.processes(1), seconds=seconds)


def wait_until(condition: Callable[[], bool], job: SshJob | None = None, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        assert job is None or job.poll() is None, job and job.poll()
        time.sleep(0.05)


def read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
