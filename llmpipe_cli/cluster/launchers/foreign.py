"""Has DeepSpeed's launcher (over pdsh or Open MPI) or mpirun start the ranks, for sites that need one of them.

Nodes are reached, compared, supplied and watched as by the ssh launcher; the other launcher only starts processes. So
none of its weaknesses reaches the user: it carries one harmless argument and no variable, starts in ``/`` with a clean
environment, its exit code is not trusted (the ranks' own records are), and it is only ever ended by SIGKILL, because
its own way of cleaning up is a search by name that can hit another job. What it leaves on the nodes the agents kill.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from llmpipe_cli.cluster.connection import NodeConnection, SshOptions
from llmpipe_cli.cluster.devices import Devices
from llmpipe_cli.cluster.foreign import make_token
from llmpipe_cli.cluster.hostfile import Host
from llmpipe_cli.cluster.launchers.base import LaunchSpec, NodeCommand
from llmpipe_cli.cluster.launchers.placement import node_environment, ranks_by_host
from llmpipe_cli.cluster.launchers.ssh import SshJob, SshLauncher
from llmpipe_cli.cluster.outcome import Outcome, ended_ranks, last_lines
from llmpipe_cli.cluster.torchrun import Meeting
from llmpipe_cli.errors import NodeError, PreflightError, UsageError

# What each way of starting needs here.
WAYS = {"pdsh": "pdsh", "openmpi": "ompi_info", "mpirun": "mpirun"}
_HARMLESS = re.compile(r"[\w/.:+@-]*")
_SETTLE_SECONDS = 3.0


class ForeignLauncher(SshLauncher):
    """All ranks of a hostfile's nodes, started by another launcher.

    Args:
        hosts: the nodes.
        options: how they are reached.
        way: pdsh or openmpi (through ``deepspeed``), or mpirun.
        port: where the nodes meet; None takes a free one.
        say: shows warnings and what takes long.
    """

    def __init__(
        self, hosts: Sequence[Host], options: SshOptions, way: str, *, port: int | None, say: Callable[[str], None]
    ) -> None:
        super().__init__(hosts, options, port=port, say=say)
        self.name = "mpi" if way == "mpirun" else "deepspeed"
        self._way = way
        if way == "pdsh" and any(":" in host.name for host in hosts):
            raise UsageError("pdsh does not take IPv6 addresses", hint="use names, or --launcher ssh")

    def devices(self, requested: int | None) -> Devices:
        if shutil.which(WAYS[self._way]) is None:
            raise PreflightError(f"{WAYS[self._way]} is not found", hint="install it, or use --launcher ssh")
        if not _HARMLESS.fullmatch(os.environ.get("PYTHONPATH", "")) or not _HARMLESS.fullmatch(sys.executable):
            raise PreflightError(
                "PYTHONPATH or the interpreter's path has characters that a remote shell would act on",
                hint="use --launcher ssh",
            )
        return super().devices(requested)

    def _commands(self, spec: LaunchSpec, meeting: Meeting) -> list[NodeCommand]:
        hosts = ranks_by_host(self._hosts, spec.num_ranks)
        argv = runner_argv(self._way, hosts, meeting, make_token(spec.run.path, "MARK", meeting), Path("FOLDER"))
        return [NodeCommand(host.name, tuple(argv), node_environment(spec, host, len(ranks))) for host, ranks in hosts]

    def _make_job(
        self, spec: LaunchSpec, nodes: list[NodeConnection], meeting: Meeting, commands: list[NodeCommand]
    ) -> SshJob:
        return ForeignJob(spec, nodes, meeting, commands, self._options, self._way)


class ForeignJob(SshJob):
    """A job whose ranks another launcher has started."""

    def __init__(
        self,
        spec: LaunchSpec,
        nodes: list[NodeConnection],
        meeting: Meeting,
        commands: Sequence[NodeCommand],
        options: SshOptions,
        way: str,
    ) -> None:
        super().__init__(spec, nodes, meeting, commands, options.silence_seconds)
        self._way, self._settled_at = way, 0.0
        for node in nodes:
            node.answer("started")
        # A folder whose name is harmless, whatever the run directory is called.
        self._folder = Path(tempfile.mkdtemp(prefix="llmpipe-", dir="/tmp"))
        hosts = ranks_by_host([node.host for node in nodes], spec.num_ranks)
        (self._folder / "hosts").write_text("".join(f"{host.name} slots={len(ranks)}\n" for host, ranks in hosts))
        (self._folder / "ssh_config").write_text(_ssh_config([host for host, _ in hosts], options))
        argv = runner_argv(way, hosts, meeting, make_token(spec.run.path, self.mark, meeting), self._folder)
        with spec.run.launcher_log.open("ab") as log:
            self._runner = subprocess.Popen(
                argv, env=_runner_environment(self._folder), cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def node_argv(self, command: NodeCommand) -> list[str] | None:
        return None

    def node_mark(self, index: int) -> str:
        return self.mark

    def poll(self) -> Outcome | None:
        outcome = super().poll()
        if outcome is None:
            self._end_when_done()
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._runner.pid, signal.SIGKILL)
        self._runner.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        if isinstance(outcome.error, NodeError) and "torchrun" in outcome.error.message:
            error = NodeError(
                f"{self._way} ended before its ranks were done",
                hint=f"see {self._spec.run.launcher_log}; {outcome.error.hint}",
            )
            return Outcome(error.exit_code, error, None, last_lines(self._spec.run.launcher_log))
        return outcome

    def _end_when_done(self) -> None:
        """The agents do not know when the ranks are done: tell them when all have ended, or the runner has."""
        all_ended = len(ended_ranks(self._spec.run, self._spec.num_ranks)) == self._spec.num_ranks
        if all_ended or self._runner.poll() is not None:
            now = time.monotonic()
            self._settled_at = self._settled_at or now + (0.0 if all_ended else _SETTLE_SECONDS)
            if now >= self._settled_at and not self._killing:
                self._tell_to_kill()


def runner_argv(way: str, hosts: Sequence[tuple[Host, range]], meeting: Meeting, token: str, folder: Path) -> list[str]:
    """The command that starts the ranks.

    Args:
        way: pdsh, openmpi or mpirun.
        hosts: nodes and their ranks.
        meeting: where the ranks meet.
        token: argument of `cluster.foreign`.
        folder: where the hostfile lies.
    """
    module = "llmpipe_cli.cluster.foreign"
    if way == "mpirun":
        argv = ["mpirun", "-n", str(sum(len(ranks) for _, ranks in hosts)), "--hostfile", str(folder / "hosts")]
        argv += ["--bind-to", "none", "-x", "PYTHONPATH"]
        return [*argv, sys.executable, "-P", "-m", module, token]
    argv = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={folder / 'hosts'}", f"--launcher={way}"]
    argv += ["--force_multi", "--no_ssh_check", "--no_local_rank", f"--master_addr={meeting.address}"]
    return [*argv, f"--master_port={meeting.port}", "--module", module, token]


def _runner_environment(folder: Path) -> dict[str, str]:
    """What the runner sees: nothing that it could pass on, and where ssh's settings are."""
    kept = {key: os.environ[key] for key in ("HOME", "PATH", "USER", "LD_LIBRARY_PATH") if key in os.environ}
    return kept | {
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "DS_ACCELERATOR": "cpu",  # the runner itself computes nothing
        "DS_ENV_FILE": str(folder / "none"),
        "PDSH_SSH_ARGS_APPEND": f"-F {folder / 'ssh_config'}",
        "OMPI_MCA_plm_rsh_args": f"-F {folder / 'ssh_config'}",
        "OMPI_MCA_plm_rsh_agent": "ssh",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def _ssh_config(hosts: Sequence[Host], options: SshOptions) -> str:
    """Settings for the runner's ssh: each host's login and port, and then what ssh would have read."""
    lines = []
    for host in hosts:
        lines += [f"Host {host.name}"]
        lines += [f"  User {host.user}"] if host.user else []
        lines += [f"  Port {host.port}"] if host.port else []
    lines += ["Host *", "  BatchMode yes", f"  ConnectTimeout {options.connect_timeout_seconds}"]
    files = [options.config] if options.config else [Path("~/.ssh/config").expanduser(), Path("/etc/ssh/ssh_config")]
    lines += [f'Match all\nInclude "{file}"' for file in files]
    return "\n".join(lines) + "\n"
