"""Runs ranks as a Kubeflow TrainJob: a manifest for the runtime ``torch-distributed``, applied with kubectl.

The run directory lies on a volume that the pods and this machine see under the same path. Kubeflow's runtime gives each
pod torchrun's PET_* variables, so the command needs no node numbers. Secrets never stand in the manifest: a variable
that is one is taken from a Kubernetes Secret by its own name.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmpipe_cli.cluster.devices import DeviceKind, Devices
from llmpipe_cli.cluster.hostfile import Host
from llmpipe_cli.cluster.launchers.base import Launcher, LaunchSpec, NodeCommand, is_secret, launch_script
from llmpipe_cli.cluster.launchers.placement import ON_THE_NODE, node_environment
from llmpipe_cli.cluster.launchers.watched import WatchedJob
from llmpipe_cli.errors import NodeError, PreflightError, UsageError
from llmpipe_cli.run import write_text

_COMMAND = ("python", "-m", "torch.distributed.run", "--max-restarts=0", "--monitor-interval=0.2", "-m",
            "llmpipe_cli.cluster.rank")  # fmt: skip
_CONTAINER = "node"
# Paths of this machine mean nothing in an image.
_STAY = {"PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "LLMPIPE_CACHE"}


@dataclass(frozen=True)
class KubernetesOptions:
    """What the manifest needs to know.

    Args:
        image: with llmpipe installed.
        claim: PersistentVolumeClaim of the shared volume.
        mount: where the volume is mounted, here and in the pods.
        nodes: pods.
        gpus_per_node: GPUs and ranks of each pod; None runs on processor cores.
        ranks_per_node: ranks of each pod without GPUs.
        namespace: Kubernetes namespace; None takes kubectl's own.
        secret: Secret with the variables that are secrets, by their names.
        runtime: name of the cluster's ClusterTrainingRuntime.
    """

    image: str
    claim: str
    mount: str
    nodes: int = 1
    gpus_per_node: int | None = None
    ranks_per_node: int = 1
    namespace: str | None = None
    secret: str | None = None
    runtime: str = "torch-distributed"


class KubernetesLauncher(Launcher):
    """All ranks as pods of one TrainJob."""

    name = "kubernetes"

    def __init__(self, options: KubernetesOptions, say: Callable[[str], None]) -> None:
        self._options, self._say = options, say
        self._ranks_per_node = options.gpus_per_node or options.ranks_per_node

    def devices(self, requested: int | None) -> Devices:
        if shutil.which("kubectl") is None:
            raise PreflightError("kubectl is not found", hint="--dry-run prints the manifest without it")
        return self.planned_devices(requested)

    def planned_devices(self, requested: int | None) -> Devices:
        count = self._options.nodes * self._ranks_per_node
        if requested not in (None, count):
            raise UsageError(f"--devices {requested} does not fit the {count} ranks of the pods", hint="leave it away")
        kind: DeviceKind = "cuda" if self._options.gpus_per_node else "cpu"
        return Devices(kind, count, name="", memory_bytes=0, by_node=(self._ranks_per_node,) * self._options.nodes)

    def commands(self, spec: LaunchSpec) -> list[NodeCommand]:
        host = Host("pod", tuple(range(self._ranks_per_node)))
        environment = node_environment(spec, host, self._ranks_per_node)
        given = {key: value for key, value in environment.items() if value != ON_THE_NODE and key not in _STAY}
        return [NodeCommand(f"{self._options.nodes} pods of {self._options.image}", _COMMAND, given)]

    def start(self, spec: LaunchSpec) -> WatchedJob:
        manifest = self.manifest(spec)
        path = spec.run.path / "trainjob.json"
        write_text(path, json.dumps(manifest, indent=2) + "\n")
        write_text(spec.run.launch_script, launch_script(self.commands(spec)))
        kubectl = ["kubectl", *([f"--namespace={self._options.namespace}"] if self._options.namespace else [])]
        done = subprocess.run([*kubectl, "apply", "-f", str(path)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NodeError(f"kubectl does not take the job: {done.stderr.strip()}", where=str(path))
        name = manifest["metadata"]["name"]
        self._say(f"TrainJob {name}")
        delete = [*kubectl, "delete", "trainjob", name, "--wait=false"]

        def remove() -> None:
            subprocess.run(delete, capture_output=True, check=False)

        return WatchedJob(spec, remove)

    def manifest(self, spec: LaunchSpec) -> dict[str, Any]:
        """The TrainJob.

        Raises:
            UsageError: ranks and pods do not fit, or the run directory is not on the volume.
        """
        options = self._options
        if spec.num_ranks != options.nodes * self._ranks_per_node:
            raise UsageError(
                f"the layout has {spec.num_ranks} ranks, and the job {options.nodes} pods x {self._ranks_per_node}",
                hint="set parallel.pipeline and parallel.data to match nodes and ranks",
            )
        if not spec.run.path.is_relative_to(options.mount):
            raise UsageError(
                f"the run directory {spec.run.path} is not on the volume at {options.mount}",
                where="output_dir",
                hint="set output_dir to a folder on the shared volume",
            )
        trainer: dict[str, Any] = {
            "image": options.image,
            "numNodes": options.nodes,
            "numProcPerNode": self._ranks_per_node,
            "command": list(_COMMAND),
            "env": [entry for pair in self.commands(spec)[0].environment.items() if (entry := self._variable(*pair))],
        }
        if options.gpus_per_node is not None:
            trainer["resourcesPerNode"] = {"limits": {"nvidia.com/gpu": options.gpus_per_node}}
        mounts = [{"name": "runs", "mountPath": options.mount}]
        volumes: list[dict[str, Any]] = [{"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}}]
        if options.gpus_per_node is not None:  # NCCL's ranks meet there, and a container has 64 MB of it
            mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
            volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
        container = {"name": _CONTAINER, "volumeMounts": mounts}
        pods = {"spec": {"volumes": volumes, "containers": [container]}}
        jobs = [{"name": _CONTAINER, "template": {"spec": {"template": pods}}}]
        return {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": {"name": _name(spec.run.name)},
            "spec": {
                "runtimeRef": {"name": options.runtime},
                "trainer": trainer,
                "runtimePatches": [
                    {
                        "manager": "llmpipe.dev/launcher",
                        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}},
                    }
                ],
            },
        }

    def _variable(self, key: str, value: str) -> dict[str, Any] | None:
        if is_secret(key):
            if self._options.secret is None:
                self._say(f"warning: {key} is a secret and left out; name a Secret with --launcher-option secret=NAME")
                return None
            return {"name": key, "valueFrom": {"secretKeyRef": {"name": self._options.secret, "key": key}}}
        # Kubernetes replaces $(NAME) in values; a doubled $ stands for itself.
        return {"name": key, "value": value.replace("$", "$$")}


def _name(run: str) -> str:
    """A run's name as Kubernetes allows names: at most 63 small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")[-63:].strip("-")
