"""`llmpipe plan`: the profile from real modules, the JSON answer, refusals; all from a config alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RECIPE = """
name: planned
model:
  config: {model_type: llama, hidden_size: 4096, intermediate_size: 11008, num_hidden_layers: 32,
           num_attention_heads: 32, num_key_value_heads: 32, vocab_size: 32000, max_position_embeddings: 4096}
  dtype: bf16
data: {sequence_len: 2048}
train: {max_steps: 1000, global_batch_size: 64}
"""
CLUSTER = "{nodes: 2, devices_per_node: 8, device: a100-40gb, intra_node_gbps: 2400, inter_node_gbps: 100}\n"
KEYS = {
    "pipeline", "tensor", "data", "micro_batch_size", "num_micro_batches", "schedule", "zero_stage",
    "activation_checkpointing", "partition", "split_layers", "memory_bytes", "bubble_fraction", "step_seconds",
    "tokens_per_second", "tflops_per_device", "model_tflops_per_device", "fits", "why_not",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "c.yaml").write_text(CLUSTER)
    return tmp_path


def plan(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from llmpipe_cli.cli.app import main; main()"
    command = [sys.executable, "-c", code, "plan", "r.yaml", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_answer_and_scaling_curve(folder: Path) -> None:
    done = plan(folder, "--cluster", "c.yaml", "--json", "--nodes", "1,2,4", "--png", "curve.png")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert all(set(layout) >= KEYS for layout in answer["layouts"])
    best = answer["layouts"][answer["chosen"]]
    assert best["fits"]
    assert best["why_not"] is None
    assert all(row["why_not"] for row in answer["layouts"] if row is not best)
    fitting = [row for row in answer["layouts"] if row["fits"]]
    assert best["step_seconds"] <= 1.01 * min(row["step_seconds"] for row in fitting)
    # 6.74e9 parameters (Touvron et al. 2023, table 2); a step's model operations are about 6 a parameter and token
    assert answer["num_parameters"] == pytest.approx(6.738e9, rel=1e-3)
    tokens = 64 * 2048
    for row in fitting:
        devices = row["pipeline"] * row["tensor"] * row["data"]
        assert sum(row["partition"]) == 34 or row["split_layers"]
        assert len(row["memory_bytes"]) == row["pipeline"]
        assert row["tokens_per_second"] == pytest.approx(tokens / row["step_seconds"])
        operations = row["model_tflops_per_device"] * 1e12 * devices * row["step_seconds"] / tokens
        attention = 12 * 32 * 4096 * 2048  # Narayanan et al. 2021: 12 layers x hidden x sequence
        assert operations == pytest.approx(6 * (6.738e9 - 32000 * 4096) + attention, rel=1e-3)
        assert row["model_tflops_per_device"] < 312 * 0.8
        assert row["tflops_per_device"] >= row["model_tflops_per_device"]
    speeds = [point["tokens_per_second"] for point in answer["nodes"]]
    assert speeds[0] < speeds[1] < speeds[2] < 4 * speeds[0] * 1.05
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert answer["training"]["days"] == pytest.approx(1000 * best["step_seconds"] / 86400)


def test_a_pinned_layout_that_does_not_fit_is_reported_and_refused(folder: Path) -> None:
    pins = ["pipeline=1", "tensor=1", "data=16", "zero_stage=1", "schedule=1f1b", "activation_checkpointing=none"]
    sets = [part for pin in pins for part in ("--set", f"parallel.{pin}")]
    done = plan(folder, "--cluster", "c.yaml", "--json", *sets, "--set", "train.micro_batch_size=4")
    assert done.returncode == 3
    answer = json.loads(done.stdout)
    assert answer["chosen"] is None
    (only,) = answer["layouts"]
    assert not only["fits"]
    assert "stage 0 needs" in only["why_not"]
    # weights, fp32 gradients, and a sixteenth of masters and moments: 2 + 4 + 12 / 16 bytes a parameter at least
    assert only["memory_bytes"][0] > 6.75 * 6.738e9
    assert "this would fit" in done.stderr


def test_impossible_requests_are_usage_errors(folder: Path) -> None:
    done = plan(folder, "--cluster", "c.yaml", "--set", "parallel.pipeline=64")
    assert done.returncode == 2
    assert "64 stages" in done.stderr
    assert "with another parallel.pipeline this would fit: pipeline 16" in done.stderr
    done = plan(folder, "--cluster", "c.yaml", "--devices", "4")
    assert done.returncode == 2
    assert "--devices is about this machine" in done.stderr
    (folder / "c.yaml").write_text("{nodes: 2, device: a100}")
    done = plan(folder, "--cluster", "c.yaml")
    assert done.returncode == 2
    assert "a100-40gb" in done.stderr
    assert "Traceback" not in done.stderr


def test_more_nodes_where_these_do_not_suffice(folder: Path) -> None:
    (folder / "c.yaml").write_text("{nodes: 1, devices_per_node: 2, device: l4}\n")
    done = plan(folder, "--cluster", "c.yaml", "--nodes", "2,4")
    assert done.returncode == 0, done.stderr
    curve = done.stdout[done.stdout.index("nodes  devices") :].splitlines()
    assert "nothing fits" in curve[1]
    assert curve[2].split()[-1] == "100%"
    done = plan(folder, "--cluster", "c.yaml", "--nodes", "2")
    assert done.returncode == 3
    assert "on 4 such nodes this would fit" in done.stderr
