"""Whether the nodes of a hostfile can run a job together, judged from their facts before anything starts.

A problem ends the command with exit code 3 (a node named twice: 2, it is the hostfile's mistake); a warning is only
shown. Every problem names the node and what to do.
"""

from __future__ import annotations

import ipaddress
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmpipe_cli.cluster.connection import NodeConnection, on_all
from llmpipe_cli.cluster.devices import Devices
from llmpipe_cli.cluster.facts import versions
from llmpipe_cli.cluster.hostfile import Host
from llmpipe_cli.cluster.torchrun import Meeting
from llmpipe_cli.errors import LlmpipeError, PreflightError, UsageError

_MAX_SKEW_SECONDS = 2.0
_LITTLE_DISK_BYTES = 2 << 30
_SLOW_SECONDS = 0.002


@dataclass
class Report:
    """What the checks found.

    Args:
        problems: what keeps the job from starting.
        warnings: what the user should know.
        rows: the facts of each node, for a table.
    """

    problems: list[LlmpipeError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def raise_problems(self) -> None:
        """Raise one error that tells all problems."""
        if not self.problems:
            return
        first = self.problems[0]
        if len(self.problems) > 1:
            others = "".join(f"\n  also {problem.where}: {problem.message}" for problem in self.problems[1:])
            raise type(first)(first.message + others, where=first.where, hint=first.hint)
        raise first


def judge_facts(hosts: Sequence[Host], answers: Sequence[dict[str, Any]], heard_seconds: Sequence[float]) -> Report:
    """Compare the nodes with this machine and with each other.

    Args:
        hosts: the nodes.
        answers: their facts (`cluster.facts.node_facts`); empty for a node that gave none.
        heard_seconds: the difference of each node's clock to this machine's.
    """
    report = Report()
    own = versions()
    seen: dict[str, Host] = {}
    kinds = {answer["devices"]["kind"] for answer in answers if answer and "kind" in answer["devices"]}
    for host, facts, skew in zip(hosts, answers, heard_seconds, strict=True):
        if not facts:
            report.rows.append({"node": host.name, "slots": host.slots, "reachable": False})
            continue
        report.rows.append(_row(host, facts, skew))
        other = seen.setdefault(facts["identity"], host)
        if other is not host:
            report.problems.append(
                UsageError(
                    f"{host.name} is the same machine as {other.name} at {other.place}",
                    where=host.place or host.name,
                    hint="give each node one line, with all its slots",
                )
            )
        report.problems += _compare_versions(host, facts, own)
        _judge_devices(host, facts["devices"], kinds, report)
        if abs(skew) > _MAX_SKEW_SECONDS:
            report.warnings.append(f"the clock of {host.name} is {skew:+.1f} s off this machine's: use NTP or chrony")
        for folder, free in facts["free_bytes"].items():
            if free is not None and free < _LITTLE_DISK_BYTES:
                report.warnings.append(f"{host.name} has only {free / 1e9:.1f} GB left in {folder}")
    return report


def common_devices(hosts: Sequence[Host], answers: Sequence[dict[str, Any]]) -> Devices:
    """The devices of all nodes together; the smallest memory counts."""
    found = [answer["devices"] for answer in answers]
    smallest = min(found, key=lambda device: device["memory_bytes"])
    by_node = tuple(host.slots for host in hosts)
    return Devices(smallest["kind"], sum(by_node), smallest["name"], smallest["memory_bytes"], by_node=by_node)


def find_meeting(
    connections: Sequence[NodeConnection], first_facts: dict[str, Any], port: int | None
) -> tuple[Meeting, list[str]]:
    """An address and a free port of the first node that all others reach.

    Args:
        connections: one a node, in the order of ranks.
        first_facts: facts of the first node.
        port: the port to use; None takes a free one.

    Returns:
        The meeting point, and warnings about slow links.

    Raises:
        PreflightError: the port is in use, or a node does not reach the first one.
    """
    first, others = connections[0], list(connections[1:])
    try:
        port = int(first.ask({"op": "listen", "port": port or 0}, "listening")["port"])
    except PreflightError as error:
        raise PreflightError(
            f"port {port} of {first.host} cannot be used: {error.message}",
            where=str(first.host),
            hint="leave master-port away to take a free one",
        ) from error
    problems: list[str] = []
    for address in _candidates(first_facts, alone=not others):
        question = {"op": "reach", "address": address, "port": port}
        answers = on_all(others, lambda connection, q=question: connection.ask(q, "reached"))  # type: ignore[misc]
        failed = [
            f"{connection.host} does not reach {first.host} at {address} port {port}: {answer['problem']}"
            for connection, answer in zip(others, answers, strict=True)
            if "problem" in answer
        ]
        if not failed:
            slow = [
                f"the link from {connection.host} to {first.host} is slow: {answer['seconds'] * 1000:.1f} ms to connect"
                for connection, answer in zip(others, answers, strict=True)
                if answer["seconds"] > _SLOW_SECONDS
            ]
            return Meeting(address, port), slow
        problems = problems or failed
    raise PreflightError(
        problems[0] if problems else f"{first.host} has no address that other nodes could reach",
        where=str(others[0].host) if others else str(first.host),
        hint="nodes have to reach each other on all ports above 1024; look at their firewalls",
    )


def clock_offset(facts: dict[str, Any], sent: float, heard: float | None = None) -> float:
    """How far the node's clock is ahead of this machine's, in seconds; the answer's way counts half.

    Args:
        facts: the node's answer.
        sent: when the question was sent.
        heard: when the answer came; None is now.
    """
    heard = time.time() if heard is None else heard
    node: float = facts["time"]
    # Inside the time of the question nothing can be told.
    return node - heard if node > heard else node - sent if node < sent else 0.0


def _candidates(facts: dict[str, Any], *, alone: bool) -> list[str]:
    """Addresses of the first node, the one that ssh came in on first; loopback only when there is no other node."""
    found = [facts["server_address"]] if facts["server_address"] else []
    for addresses in facts["addresses"].values():
        found += [address for address in addresses if address not in found]
    if alone:
        return found
    usable = []
    for address in found:
        parsed = ipaddress.ip_address(address.partition("%")[0])
        if not parsed.is_loopback and not parsed.is_link_local:
            usable.append(address)
    return usable


def _compare_versions(host: Host, facts: dict[str, Any], own: dict[str, str]) -> list[LlmpipeError]:
    pairs = {"Python": (facts["python"], platform.python_version())}
    pairs |= {package: (facts["versions"].get(package, "missing"), version) for package, version in own.items()}
    return [
        PreflightError(
            f"{host.name} has {package} {there}, this machine has {here}",
            where=host.name,
            hint="install the same versions on every node (constraints.txt has the tested ones)",
        )
        for package, (there, here) in pairs.items()
        if there != here
    ]


def _judge_devices(host: Host, devices: dict[str, Any], kinds: set[str], report: Report) -> None:
    if "problem" in devices:
        report.problems.append(PreflightError(devices["problem"], where=host.name))
        return
    if len(kinds) > 1:
        report.problems.append(
            PreflightError(
                f"{host.name} has {devices['kind']} devices, other nodes have another kind",
                where=host.name,
                hint="use nodes of one kind, or DS_ACCELERATOR=cpu",
            )
        )
    highest = max(host.devices) + 1
    if devices["kind"] == "cpu":
        if devices.get("warning"):
            report.warnings.append(f"{host.name}: {devices['warning']}")
        if host.slots > devices["cores"]:
            report.warnings.append(f"{host.slots} ranks share {devices['cores']} cores on {host.name}")
    elif highest > devices["count"]:
        report.problems.append(
            PreflightError(
                f"{host.name} has {devices['count']} devices ({devices['name']}), the hostfile asks for {highest}",
                where=host.place or host.name,
                hint=f"write slots={devices['count']}",
            )
        )


def _row(host: Host, facts: dict[str, Any], skew: float) -> dict[str, Any]:
    free = [value for value in facts["free_bytes"].values() if value is not None]
    return {
        "node": host.name,
        "slots": host.slots,
        "reachable": True,
        "host": facts["host"],
        "python": facts["python"],
        **facts["versions"],
        "devices": facts["devices"],
        "free_bytes": min(free, default=None),
        "clock_skew_seconds": skew,
    }
