"""Prints the command of each node, for people who start them by hand or with another tool, and watches the job.

The nodes have to see the run directory. Secrets are not printed: each node's shell has to have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmpipe_cli.cluster.devices import Devices, local_devices
from llmpipe_cli.cluster.hostfile import Host
from llmpipe_cli.cluster.launchers.base import Launcher, LaunchSpec, NodeCommand, launch_script
from llmpipe_cli.cluster.launchers.placement import ON_THE_NODE, node_environment, ranks_by_host
from llmpipe_cli.cluster.launchers.watched import WatchedJob
from llmpipe_cli.cluster.torchrun import Meeting, torchrun_argv
from llmpipe_cli.run import write_text

_PORT = 29400


class TorchrunLauncher(Launcher):
    """Commands for the nodes of a hostfile.

    Args:
        hosts: the nodes; the first one's name has to be known on the others.
        port: where they meet.
        say: shows the commands.
    """

    name = "torchrun"

    def __init__(self, hosts: Sequence[Host], *, port: int | None, say: Callable[[str], None]) -> None:
        self._hosts, self._port, self._say = hosts, port or _PORT, say

    def devices(self, requested: int | None) -> Devices:
        own = local_devices()
        by_node = tuple(host.slots for host in self._hosts)
        return Devices(own.kind, requested or sum(by_node), own.name, own.memory_bytes, by_node=by_node)

    def commands(self, spec: LaunchSpec) -> list[NodeCommand]:
        hosts = ranks_by_host(self._hosts, spec.num_ranks)
        meeting = Meeting(hosts[0][0].name, self._port)
        commands = []
        for index, (host, ranks) in enumerate(hosts):
            argv = torchrun_argv(len(ranks), num_nodes=len(hosts), node_rank=index, meeting=meeting)
            environment = node_environment(spec, host, len(ranks)).items()
            given = {key: value for key, value in environment if value != ON_THE_NODE}
            commands.append(NodeCommand(host.name, tuple(argv), given))
        return commands

    def start(self, spec: LaunchSpec) -> WatchedJob:
        commands = self.commands(spec)
        write_text(spec.run.launch_script, launch_script(commands))
        for command in commands:
            self._say(f"# on {command.host}\n{command.script()}\n")
        return WatchedJob(spec)
