"""Launchers that only write down what others start: Kubernetes manifests and torchrun commands."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from llmpipe_cli.cli.launchers import ClusterFlags, make_launcher
from llmpipe_cli.cluster.hostfile import Host
from llmpipe_cli.cluster.launchers.base import LaunchSpec
from llmpipe_cli.cluster.launchers.kubernetes import KubernetesLauncher, KubernetesOptions
from llmpipe_cli.cluster.launchers.torchrun import TorchrunLauncher
from llmpipe_cli.cluster.outcome import Outcome
from llmpipe_cli.errors import UsageError
from llmpipe_cli.run import RunDirectory

TESTS = Path(__file__).parent


def strict(schema: Any) -> Any:
    """The schema with fields refused that it does not name; Kubernetes would drop them without a word."""
    if isinstance(schema, dict):
        closed = {key: strict(value) for key, value in schema.items()}
        return closed | ({"additionalProperties": False} if isinstance(schema.get("properties"), dict) else {})
    return [strict(one) for one in schema] if isinstance(schema, list) else schema


def test_manifest_is_valid_and_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_inherited")
    said: list[str] = []
    run = RunDirectory.create(tmp_path, "My_Run")
    options = KubernetesOptions("registry/llmpipe:1", "runs-claim", str(tmp_path), nodes=2, gpus_per_node=4)
    spec = LaunchSpec(run, (0,) * 4 + (1,) * 4, "cuda", environment={"ODD": "a b$(HOME)\n\"'%h", "MY_API_KEY": "key"})
    launcher = KubernetesLauncher(options, said.append)
    manifest = launcher.manifest(spec)
    schema = json.loads((TESTS / "data" / "trainjob.schema.json").read_text())
    assert manifest["apiVersion"] == schema["apiVersion"]
    validator = jsonschema.Draft202012Validator(strict(schema["spec"]))
    validator.validate(manifest["spec"])
    wrong = json.loads(json.dumps(manifest["spec"]).replace("numNodes", "numNode"))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(wrong)
    trainer = manifest["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    assert {"name": "ODD", "value": "a b$$(HOME)\n\"'%h"} in trainer["env"]
    assert {"name": "LLMPIPE_RUN_DIR", "value": str(run.path)} in trainer["env"]
    assert "hf_inherited" not in json.dumps(manifest)
    (patch,) = manifest["spec"]["runtimePatches"]
    (pod,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    volumes = pod["template"]["spec"]["template"]["spec"]["volumes"]
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory"}} in volumes
    assert "key" not in [entry.get("value") for entry in trainer["env"]]
    assert any("HF_TOKEN is a secret and left out" in text for text in said)
    named = KubernetesLauncher(KubernetesOptions("i", "c", str(tmp_path), 2, 4, secret="tokens"), said.append)
    reference = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "tokens", "key": "HF_TOKEN"}}}
    assert reference in named.manifest(spec)["spec"]["trainer"]["env"]
    validator.validate(named.manifest(spec)["spec"])
    elsewhere = KubernetesLauncher(KubernetesOptions("i", "c", "/another/place", 2, 4), said.append)
    with pytest.raises(UsageError, match="is not on the volume"):
        elsewhere.manifest(spec)


def test_torchrun_commands_started_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each printed command, typed into a shell of its own, makes one job."""
    monkeypatch.setenv("PYTHONPATH", f"{TESTS.parent}{os.pathsep}{TESTS}")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    run = RunDirectory.create(tmp_path / "a b;$(touch pwned)", "sample")
    said: list[str] = []
    hosts = [Host("127.0.0.1", (0,)), Host("localhost", (0,))]
    behaviours = {"SAMPLE_WORKER": json.dumps({0: "done", 1: "done"})}
    job = TorchrunLauncher(hosts, port=None, say=said.append).start(
        LaunchSpec(run, (0, 1), "cpu", environment=behaviours, worker="sample_worker")
    )
    shells = [subprocess.Popen(["sh", "-c", text], cwd=tmp_path, stderr=subprocess.DEVNULL) for text in said]
    assert len(shells) == 2
    end = time.monotonic() + 240
    while (outcome := job.poll()) is None:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert outcome == Outcome(0)
    assert [shell.wait(60) for shell in shells] == [0, 0]
    assert run.rank_log(1).read_text() == "rank 1 of 2 does: done\n"
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("slurm", ["nodez=2"], "'nodez=2' is not understood"),
        ("slurm", ["nodes=two"], "'two' is not a number"),
        ("slurm", ["nodes=0"], "nodes has to be more than 0"),
        ("kubernetes", ["image=x"], "needs claim, mount"),
        ("deepspeed", [], "needs to know the nodes"),
        ("bogus", [], "'bogus' is not a launcher"),
    ],
)
def test_mistakes_in_the_flags(name: str, options: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_launcher(name, ClusterFlags(options=options))
