"""Hangs end with exit code 4 and the place: a stopped process, a rank that does not come out of its work."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmpipe_cli.cluster.processes import is_running
from llmpipe_cli.run import RunDirectory, list_runs, read_json

RECIPE = """
name: hang
model:
  config: {model_type: llama, vocab_size: 100, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
           num_attention_heads: 2}
data: {train: {synthetic: true}, sequence_len: 16}
train: {max_steps: 100000, global_batch_size: 8, micro_batch_size: 1, hang_timeout_seconds: 4}
parallel: {pipeline: 2, schedule: 1f1b}
"""


_STEPS = 60  # after these the ranks have heard of each other


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named(tmp_path: Path, stopped: int) -> None:
    (tmp_path / "hang.yaml").write_text(RECIPE)
    process = subprocess.Popen(
        [sys.executable, "-m", "llmpipe_cli", "train", "hang.yaml", "--json"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = _wait_for_steps(tmp_path / "runs", process)
    record = read_json(run.rank_record(stopped))
    assert record is not None
    os.kill(record["worker_pid"], signal.SIGSTOP)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 4, err
    place = f"rank {stopped} (host {socket.gethostname()}, stage {stopped})"
    assert place in err
    assert "has been silent for 4 s; it was last seen at step" in err
    other = 1 - stopped
    # in an instruction, or where ranks meet between the last of them and the next step
    doing = r"[FBI] of micro-batch \d+|send|reduce|norm|optimizer|exchange"
    assert re.search(rf"rank {other} \(stage {other}\) waits at step \d+, ({doing})", err), err
    assert not is_running(record["worker_pid"])


STUCK = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from llmpipe_cli.engine.recorder import Recorder
from llmpipe_cli.run import RunDirectory
from llmpipe_cli.worker.watchdog import Watchdog

store = dist.TCPStore("127.0.0.1", 0, is_master=True)
import os
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
recorder = Recorder()
Watchdog(RunDirectory(Path(sys.argv[1])), rank=0, world_size=1, stage=2, recorder=recorder, step=lambda: 7,
         limit_seconds=4.0).start()

def endless_work():
    time.sleep(100)

recorder.begin("B", 3)
if sys.argv[2] == "works":
    recorder.arrived()
endless_work()
"""


@pytest.mark.parametrize(
    ("state", "expected", "has_stack"),
    [
        ("works", "has been at step 7, B of micro-batch 3 for more than 4 s", True),
        ("waits", "every rank has waited for 4 s; rank 0 (stage 2) waits at step 7, B of micro-batch 3", False),
    ],
)
def test_work_that_does_not_end(tmp_path: Path, state: str, expected: str, has_stack: bool) -> None:
    run = RunDirectory(tmp_path)
    run.rank_error(0).parent.mkdir(parents=True)
    process = subprocess.run([sys.executable, "-c", STUCK, tmp_path, state], check=False, capture_output=True)
    assert process.returncode == 4, process.stderr.decode()
    error = json.loads(run.rank_error(0).read_text())
    assert error["message"] == expected
    assert error["where"] == f"rank 0 (host {socket.gethostname()}, stage 2)"
    assert ("endless_work" in (error["traceback"] or "")) == has_stack


def _wait_for_steps(runs: Path, process: subprocess.Popen[str]) -> RunDirectory:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()[1]
        for run in list_runs(runs):
            if run.metrics.exists() and run.metrics.read_text().count('"loss"') >= _STEPS:
                return run
        time.sleep(0.1)
    raise AssertionError("no steps within five minutes")
