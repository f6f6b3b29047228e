"""Training over two nodes with a link between them: the same losses as on one machine, with and without shared files.

The nodes are network namespaces with sshd (tests/nodes.py); everything else is what a user types.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nodes import SHARED, UNSHARED, Nodes, running_nodes, why_not

from llmpipe_cli.engine.manifest import verify
from llmpipe_cli.run import RunDirectory, read_json, read_metrics

ROOT = Path(__file__).parent.parent
REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

RECIPE = f"""\
extends: {ROOT}/recipes/demo.yaml
name: tiny
data: {{train: {{files: '{{stdlib}}/[a-c]*.py'}}, sequence_len: 32}}
train: {{max_steps: 4, global_batch_size: 8, micro_batch_size: 1}}
evaluation: {{every_steps: null}}
checkpoint: {{every_steps: 2, keep: 1}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the demo recipe, cut to a few short steps, and its own cache."""
    path = tmp_path_factory.mktemp("work")
    (path / "tiny.yaml").write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def nodes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with running_nodes(folder, tmp_path_factory.mktemp("tools")) as started:
        yield started


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[float]:
    """The losses of one process on this machine."""
    return losses(train(folder, "tiny.yaml", "--set", "parallel.pipeline=1"))


def train(folder: Path, *arguments: str) -> RunDirectory:
    return RunDirectory(Path(llmpipe(folder, "train", *arguments, "--json")["run"]))


def llmpipe(folder: Path, *arguments: str) -> Any:
    """Run a command as users do; its JSON document, if it prints one."""
    command = [sys.executable, "-m", "llmpipe_cli", *arguments]
    added = {"LLMPIPE_CACHE": str(folder / "cache"), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **added, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout) if "--json" in arguments else None


def losses(run: RunDirectory) -> list[float]:
    return [line["loss"] for line in read_metrics(run.metrics) if "event" not in line]


@pytest.mark.parametrize(
    ("launcher", "slots", "port", "layout"),
    [
        (["ssh"], (1, 1), SHARED, (2, 1)),
        (["ssh"], (2, 2), UNSHARED, (2, 2)),
        (["deepspeed"], (2, 2), UNSHARED, (2, 2)),
        (["deepspeed", "runner=openmpi"], (1, 1), SHARED, (2, 1)),
        (["mpi"], (1, 1), UNSHARED, (2, 1)),
    ],
    ids=["ssh", "ssh-unshared", "deepspeed-unshared", "deepspeed-openmpi", "mpi-unshared"],
)
def test_losses_equal_those_of_one_process(
    nodes: Nodes,
    folder: Path,
    expected: list[float],
    launcher: list[str],
    slots: tuple[int, int],
    port: int,
    layout: tuple[int, int],
) -> None:
    """Two stages, or two stages x two replicas; on shared files, or where each node has files of its own."""
    tool = {"ssh": "ssh", "mpi": "mpirun"}.get(launcher[0], "ompi_info" if len(launcher) > 1 else "pdsh")
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    hosts = nodes.hostfile(folder / "hosts", slots, port)
    options = [f"ssh-config={nodes.ssh_config}", *launcher[1:]]
    run = train(
        folder, "tiny.yaml", "--hostfile", str(hosts), "--launcher", launcher[0],
        *(word for option in options for word in ("--launcher-option", option)),
        "--set", f"parallel.pipeline={layout[0]}", "--set", f"parallel.data={layout[1]}",
    )  # fmt: skip
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert {read_json(run.rank_record(rank))["host"] for rank in range(sum(slots))} == {"node-a", "node-b"}
    verify(run.checkpoint(4))
    assert run.steps_saved() == [4]
    assert len(run.log_files()) == sum(slots)
    assert not nodes.processes(0)
    assert not nodes.processes(1)


def test_detached_run_is_cancelled_from_another_terminal_and_resumed(nodes: Nodes, folder: Path) -> None:
    """On nodes without shared files: the second one gets the checkpoint from the controller."""
    hosts = nodes.hostfile(folder / "hosts", (1, 1), UNSHARED)
    config = f"ssh-config={nodes.ssh_config}"
    run = train(
        folder, "tiny.yaml", "--hostfile", str(hosts), "--launcher-option", config, "--detach",
        "--set", "train.max_steps=4000", "--set", "checkpoint.every_steps=4000",
    )  # fmt: skip
    wait_for(lambda: len(losses(run)) >= 2)
    assert runs(folder, "ls", "--json")["runs"][-1]["state"] == "running"
    runs(folder, "cancel", run.name)
    wait_for(run.status_file.exists)
    shown = runs(folder, "show", run.name, "--json")
    assert (shown["state"], shown["exit_code"]) == ("stopped", 75)
    assert shown["step"] == len(losses(run)) >= 2
    assert run.steps_saved() == [shown["step"]]
    verify(run.checkpoint(shown["step"]))
    resumed = train(
        folder, "tiny.yaml", "--hostfile", str(hosts), "--launcher-option", config, "--resume", "auto",
        "--set", f"train.max_steps={shown['step'] + 2}",
    )  # fmt: skip
    lines = read_metrics(resumed.metrics)
    assert [line["step"] for line in lines if line.get("event") == "resume"] == [shown["step"]]
    assert [line["step"] for line in lines if "event" not in line] == [shown["step"] + 1, shown["step"] + 2]
    assert not nodes.processes(0)
    assert not nodes.processes(1)


def test_dry_run_shows_each_node_and_reaches_none(folder: Path) -> None:
    (folder / "nowhere").write_text("node-1.invalid slots=2\nroot@node-2.invalid:2222 slots=2\n")
    document = llmpipe(
        folder, "train", "tiny.yaml", "--hostfile", "nowhere", "--include", "node-1.invalid@node-2.invalid:1",
        "--dry-run", "--json", "--env", "MY_API_KEY=secret",
    )  # fmt: skip
    first, second = document["commands"]
    assert (first["host"], second["host"]) == ("node-1.invalid", "node-2.invalid")
    assert "--nproc-per-node=2" in first["argv"]
    assert {"--nproc-per-node=1", "--node-rank=1", "--nnodes=2"} <= set(second["argv"])
    assert second["via"][:2] == ["ssh", "-T"]
    assert second["via"][-5:-1] == ["-p", "2222", "--", "root@node-2.invalid"]
    assert second["environment"]["MY_API_KEY"] == "********"
    assert "secret" not in json.dumps(document["commands"])
    assert document["layout"]["pipeline"] == 3
    assert document["deepspeed_config"]["train_batch_size"] == 8


def runs(folder: Path, *arguments: str) -> Any:
    return llmpipe(folder, "runs", *arguments)


def wait_for(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.1)
