"""`llmpipe doctor` on two nodes with a real link, and on one that delays and loses packets."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nodes import UNSHARED, Nodes, running_nodes, why_not

from llmpipe_cli.cluster.network import read_figures, remarks, summarise

ROOT = Path(__file__).parent.parent
REASON = why_not()
needs_nodes = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with running_nodes(tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("tools")) as started:
        yield started


def doctor(nodes: Nodes, hosts: Path, *arguments: str, exit_code: int = 0) -> Any:
    command = [sys.executable, "-m", "llmpipe_cli", "doctor", "--hostfile", str(hosts), *arguments]
    command += ["--launcher-option", f"ssh-config={nodes.ssh_config}"]
    added = {"LLMPIPE_CACHE": str(nodes.folder / "cache"), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=nodes.folder, env={**os.environ, **added}
    )
    assert process.returncode == exit_code, process.stderr
    return json.loads(process.stdout) if "--json" in arguments else process


@needs_nodes
@pytest.mark.slow
def test_bandwidth_and_latency_of_a_real_link(nodes: Nodes, tmp_path: Path) -> None:
    hosts = nodes.hostfile(tmp_path / "hosts", (3, 2), UNSHARED)
    found = doctor(nodes, hosts, "--json")
    assert [(row["host"], row["slots"]) for row in found["nodes"]] == [("node-a", 3), ("node-b", 2)]
    figures = found["network"]
    assert [pair["same_node"] for pair in figures["pairs"]] == [True, False, True]
    assert figures["pairs"][1]["from"] == nodes.addresses[0]
    assert figures["inter_node_gbps"] == figures["pairs"][1]["gbps"]
    assert 0.1 < figures["inter_node_gbps"] < 1000
    assert 1e-6 < figures["latency_seconds"] < 0.1
    assert read_figures(nodes.addresses, nodes.folder / "cache")["pairs"] == figures["pairs"]

    # The same link, held down to 200 Mbit/s.
    nodes.inside(0, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "200mbit", "burst", "64kb",
                 "latency", "400ms")  # fmt: skip
    try:
        shown = doctor(nodes, nodes.hostfile(tmp_path / "hosts", (1, 1), UNSHARED))
        slow = read_figures(nodes.addresses, nodes.folder / "cache")
        assert slow is not None
        assert slow["inter_node_gbps"] == pytest.approx(0.2, rel=0.25)
        assert "Gbit/s only" in shown.stderr
        assert nodes.addresses[1] in shown.stdout
    finally:
        nodes.inside(0, "tc", "qdisc", "del", "dev", "eth0", "root")


@needs_nodes
@pytest.mark.slow
def test_delay_and_loss_are_told(nodes: Nodes, tmp_path: Path) -> None:
    """5 ms and 2 % of all packets, with netem where the kernel has it."""
    netem = ["tc", "qdisc", "add", "dev", "eth0", "root", "netem", "delay", "5ms", "loss", "2%"]
    with contextlib.ExitStack() as stack:
        try:
            nodes.inside(0, *netem)
            stack.callback(nodes.inside, 0, "tc", "qdisc", "del", "dev", "eth0", "root")
            hosts = nodes.hostfile(tmp_path / "hosts", (1, 1), UNSHARED)
        except subprocess.CalledProcessError:
            addresses = stack.enter_context(nodes.lossy_link(0.0025, 0.02))
            hosts = tmp_path / "hosts"
            hosts.write_text("".join(f"{address}:{UNSHARED}\n" for address in addresses))
        shown = doctor(nodes, hosts)
        assert "ms one way" in shown.stderr
        assert "the network loses packets" in shown.stderr


def test_remarks() -> None:
    """Only what is wrong is told."""
    ranks = [{"host": "a", "sent": 10000, "sent_again": 1}, {"host": "b", "sent": 10000, "sent_again": 300}]
    pair = {"from": 0, "to": 1, "gbps": 9.4, "latency_seconds": 5e-5}
    figures = summarise([pair], ranks, {"bytes": 1, "seconds": 1.0})
    assert figures["intra_node_gbps"] is None
    assert remarks(figures) == ["b had to send 3.0% of its packets again: the network loses packets"]
    far = summarise([pair | {"latency_seconds": 5e-3}], [ranks[0], ranks[0] | {"host": "b"}], {"bytes": 1})
    assert remarks(far) == ["the link a - b takes 5.0 ms one way: every micro-batch waits for it at each stage"]
