"""What a failing rank tells the controller."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from llmpipe_cli.run import RunDirectory
from llmpipe_cli.worker.failure import write_failure


def test_an_accelerator_without_memory(tmp_path: Path) -> None:
    """torch's message goes on about its allocator for a dozen lines."""
    run = RunDirectory(tmp_path)
    run.rank_error(3).parent.mkdir(parents=True)
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB. 1 GiB is free"
    assert write_failure(run, 3, torch.OutOfMemoryError(text)) == 4
    record = json.loads(run.rank_error(3).read_text())
    assert record["message"] == "CUDA out of memory. Tried to allocate 2.00 GiB"
    assert "train.micro_batch_size" in record["hint"]
    assert write_failure(run, 3, RuntimeError("CUDA error: an illegal memory access")) == 4
    assert json.loads(run.rank_error(3).read_text())["hint"] is None
