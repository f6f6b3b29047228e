"""Which ranks run on which node of a hostfile, and with which variables."""

from __future__ import annotations

import os
from collections.abc import Sequence

from llmpipe_cli.cluster.environment import travelling
from llmpipe_cli.cluster.hostfile import Host
from llmpipe_cli.cluster.launchers.base import LaunchSpec
from llmpipe_cli.cluster.torchrun import fixed_environment
from llmpipe_cli.errors import PreflightError

# In what `--dry-run` shows, for values that only the node can give.
ON_THE_NODE = "(chosen on the node)"


def ranks_by_host(hosts: Sequence[Host], num_ranks: int) -> list[tuple[Host, range]]:
    """The ranks of each node that has some, filled in the hosts' order.

    Raises:
        PreflightError: there are fewer slots than ranks.
    """
    result, first = [], 0
    for host in hosts:
        last = min(first + host.slots, num_ranks)
        if last > first:
            result.append((host, range(first, last)))
        first = last
    if first < num_ranks:
        raise PreflightError(
            f"the layout needs {num_ranks} ranks, and the hostfile has {first} slots",
            hint="add nodes or slots, or make parallel.pipeline or parallel.data smaller",
        )
    return result


def node_environment(spec: LaunchSpec, host: Host, num_local_ranks: int) -> dict[str, str]:
    """Variables for one node's ranks: the controller's that travel, ``--env``, and what the launcher sets."""
    chosen = {"TOKENIZERS_PARALLELISM": "false"}
    if "OMP_NUM_THREADS" not in os.environ:
        chosen["OMP_NUM_THREADS"] = ON_THE_NODE
    if spec.device == "cpu":
        chosen |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": ON_THE_NODE}
    else:
        chosen["NCCL_SOCKET_IFNAME"] = ON_THE_NODE
        if host.devices != tuple(range(num_local_ranks)):
            chosen["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, host.devices[:num_local_ranks]))
    fixed = fixed_environment(spec.run.path, spec.worker, spec.grace_seconds, spec.device)
    return chosen | travelling(os.environ) | dict(spec.environment) | fixed
