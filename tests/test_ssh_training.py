"""Training over two nodes with a link between them: the same losses as on one machine, with and without shared files.

The nodes are network namespaces with sshd (tests/nodes.py); everything else is what a user types.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nodes import SHARED, UNSHARED, Nodes, running_nodes, why_not

from llmpipe_cli.engine.manifest import verify
from llmpipe_cli.run import RunDirectory, read_json, read_metrics

ROOT = Path(__file__).parent.parent
REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

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
train: {max_steps: 4, global_batch_size: 8, micro_batch_size: 1, learning_rate: 1.0e-2, lr_scheduler_type: constant}
checkpoint: {every_steps: 2, keep: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a recipe, a small corpus and its own cache."""
    path = tmp_path_factory.mktemp("work")
    (path / "tiny.yaml").write_text(RECIPE)
    (path / "corpus").mkdir()
    for number in range(20):
        text = " ".join(f"the {(number * word) % 17}th fox of the corpus jumps over dog {word}." for word in range(40))
        (path / "corpus" / f"{number}.txt").write_text(text)
    return path


@pytest.fixture(scope="module")
def nodes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with running_nodes(folder, tmp_path_factory.mktemp("tools")) as started:
        yield started


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[float]:
    """The losses of one process on this machine."""
    return losses(train(folder, "tiny.yaml", "--set", "parallel.pipeline=1"))


def train(folder: Path, *arguments: str, exit_code: int = 0) -> RunDirectory:
    command = [sys.executable, "-m", "llmpipe_cli", "train", *arguments, "--json"]
    added = {"LLMPIPE_CACHE": str(folder / "cache"), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **added, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert process.returncode == exit_code, process.stderr
    document: dict[str, Any] = json.loads(process.stdout)
    return RunDirectory(Path(document["run"]))


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
