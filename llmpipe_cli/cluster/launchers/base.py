"""What every launcher offers: show the commands, start the ranks, watch them, stop them.

A launcher turns a `LaunchSpec` into one `NodeCommand` a node. `start` gives a `Job`; the controller polls it, so that
one loop can also draw the progress and listen to signals.
"""

from __future__ import annotations

import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmpipe_cli.cluster.devices import Devices
from llmpipe_cli.cluster.outcome import Outcome
from llmpipe_cli.cluster.rank import DEFAULT_WORKER
from llmpipe_cli.run import RunDirectory

_SECRET = re.compile(r"TOKEN(?!IZERS?_)|SECRET|PASSW|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL|_AUTH", re.IGNORECASE)
MASK = "********"


@dataclass(frozen=True)
class LaunchSpec:
    """One job to start.

    Args:
        run: its run directory; plan.json is written there before the start.
        stages: pipeline stage of each rank; its length is the number of ranks.
        device: cpu or cuda.
        grace_seconds: how long the ranks may take to save and end after a stop is asked for.
        environment: variables to add for the ranks (``--env KEY=VALUE``).
        worker: module each rank runs with the run directory as its only argument.
        inputs: folders that the ranks read; brought to nodes that do not see them.
    """

    run: RunDirectory
    stages: tuple[int, ...]
    device: str
    grace_seconds: float = 120.0
    environment: Mapping[str, str] = field(default_factory=dict)
    worker: str = DEFAULT_WORKER
    inputs: tuple[Path, ...] = ()

    @property
    def num_ranks(self) -> int:
        return len(self.stages)


@dataclass(frozen=True)
class NodeCommand:
    """What is started on one node.

    Args:
        host: the node's name.
        argv: the command line.
        environment: variables set besides the inherited ones.
        via: the command on this machine that reaches the node; empty when it is this machine.
    """

    host: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    via: tuple[str, ...] = ()

    def shown_environment(self) -> dict[str, str]:
        """`environment` with the values of secrets masked."""
        return {key: MASK if is_secret(key) else value for key, value in self.environment.items()}

    def script(self) -> str:
        """The command as lines of a shell script; secrets are expected in the environment of whoever runs it."""
        lines = [
            f"# {key} is taken from the environment" if is_secret(key) else f"export {key}={shlex.quote(value)}"
            for key, value in self.environment.items()
        ]
        return "\n".join([*lines, f"exec {shlex.join(self.argv)}"])


class Job(ABC):
    """A started job. All calls return at once."""

    note = ""
    """What the user should know about how the job stands, such as its place in a queue; it may change."""

    @abstractmethod
    def poll(self) -> Outcome | None:
        """The outcome once all processes are gone, None while they run."""

    @abstractmethod
    def request_stop(self) -> None:
        """Ask the ranks to save and end; after the grace period they are killed."""

    @abstractmethod
    def kill(self) -> None:
        """End all processes now."""


class Launcher(ABC):
    """Starts jobs in one way."""

    name: str

    @abstractmethod
    def devices(self, requested: int | None) -> Devices:
        """The devices to plan for, all nodes together; a launcher of several nodes reaches and checks them here.

        Args:
            requested: ``--devices``; None takes all.

        Raises:
            PreflightError: a node cannot be used.
            UsageError: `requested` or the choice of nodes makes no sense.
        """

    def warm_up(self) -> None:  # noqa: B027 (most launchers have nothing to do)
        """A job will be started soon on `devices`: begin with what can be done before its plan is known."""

    def planned_devices(self, requested: int | None) -> Devices:
        """The devices to plan for as far as they are known without reaching a node; see `devices`."""
        return self.devices(requested)

    @abstractmethod
    def commands(self, spec: LaunchSpec) -> list[NodeCommand]:
        """Exactly what `start` would run, one command a node."""

    @abstractmethod
    def start(self, spec: LaunchSpec) -> Job:
        """Start all ranks; call it from the main thread.

        Raises:
            NodeError: the processes could not be started.
        """

    def manifest(self, spec: LaunchSpec) -> dict[str, Any] | None:
        """What is handed to a cluster's own manager, if that is how the launcher works."""
        return None

    def close(self) -> None:  # noqa: B027 (most launchers hold nothing)
        """Let go of nodes that were reached and not used."""


def is_secret(variable: str) -> bool:
    """Whether a variable's name says that its value must not be shown."""
    return bool(_SECRET.search(variable))


def launch_script(commands: list[NodeCommand]) -> str:
    """The text of launch.sh: what was started on each node, secrets left out."""
    parts = ["#!/bin/sh", "# What was started; secrets come from the environment."]
    for command in commands:
        parts += [f"# on {command.host}", command.script()]
    return "\n".join(parts) + "\n"
