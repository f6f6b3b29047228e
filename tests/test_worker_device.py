"""On which device a rank computes, as far as a machine without accelerators can show it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from llmpipe_cli.cluster import devices, foreign
from llmpipe_cli.cluster.foreign import job_file, make_token
from llmpipe_cli.cluster.hostfile import Host
from llmpipe_cli.cluster.launchers.base import LaunchSpec
from llmpipe_cli.cluster.launchers.placement import node_environment
from llmpipe_cli.cluster.torchrun import DEVICE_VARIABLE, Meeting
from llmpipe_cli.errors import PreflightError
from llmpipe_cli.run import RunDirectory
from llmpipe_cli.worker.device import rank_device


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_ranks_know_what_they_were_planned_for(kind: str, tmp_path: Path) -> None:
    spec = LaunchSpec(RunDirectory(tmp_path), (0, 1), kind, environment={DEVICE_VARIABLE: "another"})
    environment = node_environment(spec, Host("a", (2, 3)), 2)
    assert environment[DEVICE_VARIABLE] == kind
    assert environment.get("CUDA_VISIBLE_DEVICES") == {"cpu": None, "cuda": "2,3"}[kind]


def test_no_rank_falls_back_to_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others would wait for it in vain, on another backend."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv(DEVICE_VARIABLE, "cuda")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(PreflightError, match=r"planned for accelerators, and torch .* finds none on this node"):
        rank_device()
    monkeypatch.setenv(DEVICE_VARIABLE, "cpu")
    assert rank_device() == torch.device("cpu")


def test_a_driver_that_torch_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(devices, "has_driver", lambda: True)
    found = devices.local_devices(1)
    assert (found.kind, found.count) == ("cpu", 1)
    assert found.warning is not None
    assert "torch finds no device" in found.warning
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert devices.local_devices(1).warning is None


@pytest.mark.parametrize("given", [{}, {"DS_ACCELERATOR": "cpu"}])
def test_ranks_do_not_inherit_what_their_runner_was_told(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mpirun and deepspeed run without accelerators, and start ranks on their own node as children."""
    run = RunDirectory(tmp_path)
    run.control.mkdir()
    job_file(run, "mark").write_text(json.dumps(given))
    started: dict[str, str] = {}
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(sys, "argv", ["", make_token(run.path, "mark", Meeting("a", 1))])
    monkeypatch.setattr(os, "execve", lambda path, argv, environment: started.update(environment))
    foreign.main()
    assert started.get("DS_ACCELERATOR") == given.get("DS_ACCELERATOR")
    assert started["MASTER_ADDR"] == "a"
