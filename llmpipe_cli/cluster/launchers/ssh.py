"""Runs ranks on the nodes of a hostfile: one ssh connection a node, with an agent at its other end (`cluster.agent`).

`devices` reaches all nodes at once and compares them (`cluster.preflight`), before data is prepared and a plan is made;
`start` ships what a node does not see, then has every agent start torchrun. From then on the controller watches: files
that the agents copy into its run directory, or that all see there, tell how the ranks are; the connections tell how
the nodes are. Whatever happens, all nodes are told to kill their ranks before the job counts as ended, and an agent
that loses its controller does so by itself.
"""

from __future__ import annotations

import os
import queue
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmpipe_cli.cluster import preflight
from llmpipe_cli.cluster.connection import NodeConnection, SshOptions, close_all, connect_all, on_all, ssh_argv
from llmpipe_cli.cluster.devices import Devices, local_devices
from llmpipe_cli.cluster.hostfile import Host, refuse_aliases
from llmpipe_cli.cluster.launchers.base import Job, Launcher, LaunchSpec, NodeCommand, launch_script
from llmpipe_cli.cluster.launchers.deadline import Deadline
from llmpipe_cli.cluster.launchers.placement import ON_THE_NODE, node_environment, ranks_by_host
from llmpipe_cli.cluster.mirror import Inbox
from llmpipe_cli.cluster.outcome import Outcome, has_failed, judge
from llmpipe_cli.cluster.shipping import digest, folder_messages
from llmpipe_cli.cluster.torchrun import Meeting, torchrun_argv
from llmpipe_cli.errors import EXIT_INTERRUPTED, LlmpipeError, NodeError, PreflightError, UsageError
from llmpipe_cli.run import write_text

# Nodes get this long to confirm that their ranks are dead; killing takes its time when a rank holds much memory.
_END_SECONDS = 15.0
_SHIP_SECONDS = 3600.0

Say = Callable[[str], None]


class SshLauncher(Launcher):
    """All ranks of a hostfile's nodes.

    Args:
        hosts: the nodes, in the order of ranks.
        options: how they are reached.
        port: where the nodes meet; None takes a free one.
        say: shows warnings and what takes long.
    """

    name = "ssh"

    def __init__(
        self,
        hosts: Sequence[Host],
        options: SshOptions,
        *,
        port: int | None = None,
        say: Say = lambda text: None,
    ) -> None:
        self._hosts, self._options, self._port, self._say = hosts, options, port, say
        self._connections: list[NodeConnection] = []
        self._facts: list[dict[str, Any]] = []

    def devices(self, requested: int | None) -> Devices:
        self._hosts = _first_slots(self._hosts, requested)
        if not self._connections:
            self.check().raise_problems()
        return preflight.common_devices(self._hosts, self._facts)

    def use(self, hosts: Sequence[Host]) -> None:
        """Take other devices of the same nodes, which may be connected already."""
        self._hosts = hosts
        if self._connections:
            for connection, host in zip(self._connections, hosts, strict=True):
                connection.host = host

    def planned_devices(self, requested: int | None) -> Devices:
        """The devices as the hostfile says, without reaching a node: they are taken to be of this machine's kind."""
        self._hosts = _first_slots(self._hosts, requested)
        own = local_devices()
        by_node = tuple(host.slots for host in self._hosts)
        return Devices(own.kind, sum(by_node), own.name, own.memory_bytes, by_node=by_node)

    def check(self) -> preflight.Report:
        """Reach all nodes and compare them; the connections stay open when there is no problem."""
        refuse_aliases(self._hosts)
        self.close()
        accelerator = {key: os.environ[key] for key in ("DS_ACCELERATOR",) if key in os.environ}
        sent = time.time()
        self._connections, self._facts, unreachable = connect_all(
            self._hosts,
            self._options,
            {
                "op": "facts",
                "cwd": str(Path.cwd()),
                "output_dir": str(Path.cwd()),
                "cache_dir": os.environ.get("LLMPIPE_CACHE") or str(Path("~/.cache/llmpipe").expanduser()),
                "environment": accelerator,
            },
        )
        skews = [preflight.clock_offset(facts, sent, facts["heard"]) if facts else 0.0 for facts in self._facts]
        report = preflight.judge_facts(self._hosts, self._facts, skews)
        report.problems.sort(key=lambda problem: problem.exit_code)  # the hostfile's own mistakes first
        # Before all: when a node is missing, how many others have been compared by then is chance.
        report.problems[:0] = unreachable
        for warning in report.warnings:
            self._say(f"warning: {warning}")
        if report.problems:
            close_all(self._connections, at_once=bool(unreachable))
            self._connections = []
        return report

    def commands(self, spec: LaunchSpec) -> list[NodeCommand]:
        return self._commands(spec, Meeting(self._hosts[0].name, self._port or 0))

    def start(self, spec: LaunchSpec) -> SshJob:
        if not self._connections:
            self.devices(None)
        hosts = ranks_by_host(self._hosts, spec.num_ranks)
        used, spare = self._connections[: len(hosts)], self._connections[len(hosts) :]
        if spare:
            self._say(f"warning: {', '.join(str(node.host) for node in spare)} not used: {spec.num_ranks} ranks in all")
            close_all(spare)
        self._connections = []
        try:
            meeting, slow = preflight.find_meeting(used, self._facts[0], self._port)
            for warning in slow:
                self._say(f"warning: {warning}")
            self._ship(used, spec.inputs)
            commands = self._commands(spec, meeting)
            write_text(spec.run.launch_script, launch_script(commands))
            return self._make_job(spec, used, meeting, commands)
        except BaseException:
            close_all(used)
            raise

    def close(self) -> None:
        close_all(self._connections)
        self._connections = []

    def _make_job(
        self, spec: LaunchSpec, nodes: list[NodeConnection], meeting: Meeting, commands: list[NodeCommand]
    ) -> SshJob:
        return SshJob(spec, nodes, meeting, commands, self._options.silence_seconds)

    def _commands(self, spec: LaunchSpec, meeting: Meeting) -> list[NodeCommand]:
        hosts = ranks_by_host(self._hosts, spec.num_ranks)
        commands = []
        for index, (host, ranks) in enumerate(hosts):
            argv = torchrun_argv(len(ranks), num_nodes=len(hosts), node_rank=index, meeting=meeting)
            via = ssh_argv(host, self._options)
            commands.append(NodeCommand(host.name, tuple(argv), node_environment(spec, host, len(ranks)), tuple(via)))
        return commands

    def _ship(self, nodes: Sequence[NodeConnection], inputs: Sequence[Path]) -> None:
        """Bring folders to the nodes that do not see them.

        Raises:
            PreflightError: a node has another folder under the same path, or cannot take it.
        """
        digests = {str(folder): found for folder in inputs if (found := digest(folder)) is not None}
        if not digests:
            return

        def ship(node: NodeConnection) -> None:
            answer = node.ask({"op": "missing", "folders": digests}, "missing", _SHIP_SECONDS)
            if answer["different"]:
                raise PreflightError(
                    f"{node.host} has other files in {answer['different'][0]} than this machine",
                    where=str(node.host),
                    hint="remove that folder there, or make it the same",
                )
            for folder in answer["folders"]:
                self._say(f"copying {folder} to {node.host}")
                for message in folder_messages(Path(folder), digests[folder]):
                    node.send(message)
                if not node.answer("received", _SHIP_SECONDS)["whole"]:
                    raise PreflightError(f"{folder} did not arrive whole", where=str(node.host), hint="try again")

        on_all(nodes, ship)


class SshJob(Job):
    """A job on several nodes."""

    def __init__(
        self,
        spec: LaunchSpec,
        nodes: list[NodeConnection],
        meeting: Meeting,
        commands: Sequence[NodeCommand],
        silence_seconds: float,
    ) -> None:
        self._spec, self._silence_seconds = spec, silence_seconds
        self.mark = secrets.token_hex(16)
        token = secrets.token_hex(16)
        write_text(spec.run.control / "token", token)
        hosts = ranks_by_host([node.host for node in nodes], spec.num_ranks)
        self._nodes = [_Node(node, ranks) for node, (_, ranks) in zip(nodes, hosts, strict=True)]
        self._inbox = Inbox(spec.run)
        self._outcome: Outcome | None = None
        self._deadline = Deadline(spec.grace_seconds)
        self._kill_requested = self._killing = False
        self._problem: LlmpipeError | None = None
        self._vanished: list[int] = []
        for index, (node, command) in enumerate(zip(self._nodes, commands, strict=True)):
            node.connection.last_heard = time.monotonic()
            node.connection.send(
                {
                    "op": "run",
                    "run": str(spec.run.path),
                    "token": token,
                    "mark": self.node_mark(index),
                    "plan": spec.run.plan.read_text(encoding="utf-8") if spec.run.plan.exists() else "{}",
                    "argv": self.node_argv(command),
                    "environment": {key: value for key, value in command.environment.items() if value != ON_THE_NODE},
                    "ranks": list(node.ranks),
                    "node": command.host,
                    "address": meeting.address,
                    "silence_seconds": silence_seconds,
                    "launcher_log": f"launcher-{index:03d}.log",
                }
            )

    def node_argv(self, command: NodeCommand) -> list[str] | None:
        """What the agent starts; None when ranks are started in another way."""
        return list(command.argv)

    def node_mark(self, index: int) -> str:
        """What one node's processes are marked with; nodes may be containers that see each other's processes."""
        return f"{self.mark}-{index}"

    def poll(self) -> Outcome | None:
        if self._outcome is None:
            self._take_messages()
            self._watch()
            if self._deadline.is_over and not self._killing:
                self._tell_to_kill()
            if all(node.ended or node.lost is not None for node in self._nodes):
                self._outcome = self._finish()
        return self._outcome

    def request_stop(self) -> None:
        self._spec.run.request_stop()
        self._tell({"op": "stop"})
        self._deadline.stop()

    def kill(self) -> None:
        self._kill_requested = True
        self._tell_to_kill()
        end = time.monotonic() + _END_SECONDS
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        close_all([node.connection for node in self._nodes])

    def _take_messages(self) -> None:
        now = time.monotonic()
        # An agent that kills is silent meanwhile.
        limit = max(self._silence_seconds, _END_SECONDS) if self._killing else self._silence_seconds
        for node in self._nodes:
            node.connection.beat()
            while True:
                try:
                    message = node.connection.events.get_nowait()
                except queue.Empty:
                    break
                self._take(node, message)
            if node.lost is None and not node.ended:
                if (reason := node.connection.lost) is not None and node.connection.events.empty():
                    node.lost = reason
                elif now - node.connection.last_heard > limit:
                    node.lost = f"it has not been heard for {limit:g} s"

    def _take(self, node: _Node, message: dict[str, Any]) -> None:
        kind = message["is"]
        if kind == "ended":
            node.ended, node.code = True, message["code"]
            self._vanished += message["vanished"]
        elif kind == "vanished":
            self._vanished += message["ranks"]
        elif kind == "problem":
            node.lost = message["message"]
        else:
            try:
                self._inbox.take(message)
            except LlmpipeError as error:
                self._problem = self._problem or error
                self._tell_to_kill()

    def _watch(self) -> None:
        """Start the clock when something has failed, so that the rest cannot hold up the end."""
        if self._deadline.failed or self._killing:
            return
        failed = self._vanished or any(node.lost is not None or node.code for node in self._nodes)
        if failed or has_failed(self._spec.run, self._spec.num_ranks):
            self._deadline.fail()

    def _tell(self, message: dict[str, Any]) -> None:
        for node in self._nodes:
            if node.lost is None:
                node.connection.send(message)

    def _tell_to_kill(self) -> None:
        self._killing = True
        self._tell({"op": "kill"})

    def _finish(self) -> Outcome:
        close_all([node.connection for node in self._nodes if node.lost is None])
        for node in self._nodes:
            if node.lost is not None:
                node.connection.close(at_once=True)
        if self._kill_requested:
            return Outcome(EXIT_INTERRUPTED)
        if self._problem is not None:
            return Outcome(self._problem.exit_code, self._problem)
        lost = next((node for node in self._nodes if node.lost is not None), None)
        codes = [node.code for node in self._nodes if node.code]
        outcome = judge(self._spec.run, self._spec.stages, codes[0] if codes else None, self._vanished)
        followed = outcome.error is None or outcome.followed or isinstance(outcome.error, NodeError)
        if lost is not None and followed and outcome.exit_code not in (0, 75):
            return self._lost_node(lost)
        if self._killing and outcome.rank is None:
            return self._deadline.unsaved() or outcome
        return outcome

    def _lost_node(self, node: _Node) -> Outcome:
        host = node.connection.host
        error = NodeError(
            f"the node {host} was lost: {node.lost}",
            where=f"{host} (ranks {', '.join(map(str, node.ranks))})",
            hint="`llmpipe doctor --hostfile ...` shows which nodes answer; `--resume auto` goes on without it",
        )
        return Outcome(error.exit_code, error, None, node.connection.said or None)


class _Node:
    """What the controller knows of a node of a running job."""

    def __init__(self, connection: NodeConnection, ranks: range) -> None:
        self.connection, self.ranks = connection, ranks
        self.ended = False
        self.code: int | None = None
        self.lost: str | None = None


def _first_slots(hosts: Sequence[Host], requested: int | None) -> list[Host]:
    """The hosts with `requested` devices in all."""
    if requested is None:
        return list(hosts)
    if requested < 1:
        raise UsageError(f"--devices {requested} is not a number of devices", hint="give 1 or more")
    chosen = ranks_by_host(hosts, requested)
    return [replace(host, devices=host.devices[: len(ranks)]) for host, ranks in chosen]
