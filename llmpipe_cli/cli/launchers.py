"""From the flags about where ranks run to a launcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpipe_cli.cli import console
from llmpipe_cli.errors import UsageError

if TYPE_CHECKING:
    from llmpipe_cli.cluster.connection import SshOptions
    from llmpipe_cli.cluster.hostfile import Host
    from llmpipe_cli.cluster.launchers.base import Launcher

NAMES = ("local", "ssh", "deepspeed", "mpi", "slurm", "kubernetes", "torchrun")
_WITHOUT_HOSTFILE = ("local", "slurm", "kubernetes")
# Keys of --launcher-option, by launcher, with the type of their values.
_SSH_OPTIONS: dict[str, type] = {
    "connect-timeout": int,
    "node-timeout": float,
    "ssh-config": Path,
    "python": str,
    "master-port": int,
}
_SBATCH_OPTIONS = (
    "account", "comment", "constraint", "cpus-per-task", "dependency", "exclude", "exclusive", "gres", "mem",
    "nodelist", "partition", "qos", "reservation", "time",
)  # fmt: skip
_SLURM_OPTIONS: dict[str, type] = {
    "nodes": int,
    "gpus-per-node": int,
    "ranks-per-node": int,
    "signal-seconds": int,
    "attempts": int,
    **dict.fromkeys(_SBATCH_OPTIONS, str),
}
_OPTIONS: dict[str, dict[str, type]] = {
    "local": {},
    "ssh": _SSH_OPTIONS,
    "deepspeed": {"runner": str, **_SSH_OPTIONS},
    "mpi": _SSH_OPTIONS,
    "slurm": _SLURM_OPTIONS,
    "kubernetes": {
        "image": str,
        "claim": str,
        "mount": str,
        "nodes": int,
        "gpus-per-node": int,
        "ranks-per-node": int,
        "namespace": str,
        "secret": str,
        "runtime": str,
    },
    "torchrun": {"master-port": int},
}


@dataclass(frozen=True)
class ClusterFlags:
    """Flags about nodes.

    Args:
        hostfile: the nodes.
        include: the nodes and devices to take from it.
        exclude: those to leave out.
        options: ``--launcher-option`` entries, KEY=VALUE.
        detach: return as soon as the job is started.
    """

    hostfile: Path | None = None
    include: str | None = None
    exclude: str | None = None
    options: Sequence[str] = field(default=())
    detach: bool = False


def make_launcher(name: str | None, flags: ClusterFlags | None = None) -> Launcher:
    """The launcher of this name; without a name, ssh when there is a hostfile and local otherwise.

    Raises:
        UsageError: there is no such launcher, it lacks a flag, or a flag is wrong.
    """
    flags = flags or ClusterFlags()
    name = name or ("ssh" if flags.hostfile is not None else "local")
    if name not in NAMES:
        raise UsageError(f"'{name}' is not a launcher", where="--launcher", hint=f"launchers are {', '.join(NAMES)}")
    options = _read_options(name, flags.options)
    if name in _WITHOUT_HOSTFILE:
        _refuse_nodes(name, flags)
    if name == "local":
        from llmpipe_cli.cluster.launchers.local import LocalLauncher

        return LocalLauncher()
    if name == "slurm":
        return _slurm(options)
    if name == "kubernetes":
        return _kubernetes(options)
    hosts, ssh, port = read_hosts(name, flags), ssh_options(options), options.get("master-port")
    if name == "torchrun":
        from llmpipe_cli.cluster.launchers.torchrun import TorchrunLauncher

        return TorchrunLauncher(hosts, port=port, say=console.say)
    if name in ("deepspeed", "mpi"):
        from llmpipe_cli.cluster.launchers.foreign import ForeignLauncher

        way = options.get("runner", "pdsh") if name == "deepspeed" else "mpirun"
        if way not in ("pdsh", "openmpi", "mpirun"):
            raise UsageError(f"'{way}' is not a runner", where="--launcher-option runner", hint="pdsh or openmpi")
        return ForeignLauncher(hosts, ssh, way, port=port, say=_say)
    from llmpipe_cli.cluster.launchers.ssh import SshLauncher

    return SshLauncher(hosts, ssh, port=port, say=_say)


def _refuse_nodes(name: str, flags: ClusterFlags) -> None:
    """Nodes that are named and would not be used are a mistake."""
    for flag, value in (("hostfile", flags.hostfile), ("include", flags.include), ("exclude", flags.exclude)):
        if value is not None:
            hint = "add --hostfile FILE" if name == "local" and flag != "hostfile" else "leave it out"
            raise UsageError(f"the {name} launcher reads no hostfile", where=f"--{flag} {value}", hint=hint)


def _slurm(options: Mapping[str, Any]) -> Launcher:
    from llmpipe_cli.cluster.launchers.slurm import SlurmLauncher, SlurmOptions

    asked = {key.replace("-", "_"): value for key, value in options.items() if key not in _SBATCH_OPTIONS}
    sbatch = tuple((key, value) for key, value in options.items() if key in _SBATCH_OPTIONS)
    return SlurmLauncher(SlurmOptions(**asked, sbatch=sbatch), say=_say)


def _kubernetes(options: Mapping[str, Any]) -> Launcher:
    from llmpipe_cli.cluster.launchers.kubernetes import KubernetesLauncher, KubernetesOptions

    if missing := [key for key in ("image", "claim", "mount") if key not in options]:
        raise UsageError(
            f"the kubernetes launcher needs {', '.join(missing)}",
            where="--launcher kubernetes",
            hint="add --launcher-option image=..., claim=... (a PersistentVolumeClaim) and mount=... (its path)",
        )
    asked = {key.replace("-", "_"): value for key, value in options.items()}
    return KubernetesLauncher(KubernetesOptions(**asked), say=_say)


def read_hosts(name: str, flags: ClusterFlags) -> list[Host]:
    """The chosen nodes of the hostfile.

    Raises:
        UsageError: there is no hostfile, or it has a mistake.
    """
    from llmpipe_cli.cluster.hostfile import read_hostfile, select

    if flags.hostfile is None:
        raise UsageError(
            f"the {name} launcher needs to know the nodes", where=f"--launcher {name}", hint="add --hostfile FILE"
        )
    return select(read_hostfile(flags.hostfile), flags.include, flags.exclude)


def ssh_options(options: Mapping[str, Any]) -> SshOptions:
    """How nodes are reached."""
    from llmpipe_cli.cluster.connection import SshOptions

    default = SshOptions()
    return SshOptions(
        connect_timeout_seconds=options.get("connect-timeout", default.connect_timeout_seconds),
        silence_seconds=options.get("node-timeout", default.silence_seconds),
        config=options.get("ssh-config"),
        python=options.get("python"),
    )


def _read_options(launcher: str, entries: Sequence[str]) -> dict[str, Any]:
    known = _OPTIONS[launcher]
    found: dict[str, Any] = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if key not in known or not equals:
            hint = f"options of {launcher}: {', '.join(known)}" if known else f"{launcher} has no options"
            raise UsageError(f"'{entry}' is not understood", where="--launcher-option", hint=hint)
        try:
            found[key] = known[key](value)
        except ValueError:
            raise UsageError(f"'{value}' is not a number", where=f"--launcher-option {entry}") from None
        if known[key] in (int, float) and found[key] <= 0:
            raise UsageError(f"{key} has to be more than 0", where=f"--launcher-option {entry}")
    return found


def _say(text: str) -> None:
    console.say(text, "yellow" if text.startswith("warning") else "")
