"""A Slurm cluster for tests: munge, one controller and two node daemons on this machine, all with files of their own.

Needs root and Debian's slurm-wlm and munge (any 21.08 or newer).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

_TOOLS = ("/usr/sbin/munged", "/usr/sbin/slurmctld", "/usr/sbin/slurmd")


def why_not() -> str | None:
    """Why this machine cannot run Slurm; None when it can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    missing = [tool for tool in (*_TOOLS, "sbatch") if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


@contextlib.contextmanager
def running_slurm(folder: Path) -> Iterator[dict[str, str]]:
    """The variables with which Slurm's commands find the cluster, while the context lasts."""
    ports = _free_ports(3)
    host = socket.gethostname()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    conf = folder / "slurm.conf"
    conf.write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=15
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
    )
    environment = {"SLURM_CONF": str(conf)}
    commands = [
        ["/usr/sbin/munged", "--foreground", "--force", f"--socket={folder}/munge.sock", f"--key-file={key}",
         f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"],
        ["/usr/sbin/slurmctld", "-D"],
        ["/usr/sbin/slurmd", "-D", "-N", "n1"],
        ["/usr/sbin/slurmd", "-D", "-N", "n2"],
    ]  # fmt: skip
    daemons = []
    try:
        for command in commands:
            daemons.append(
                subprocess.Popen(
                    command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            )
            time.sleep(0.3)
        _wait_for_nodes(environment)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=os.environ | environment, check=False, capture_output=True)
        # Without its daemons a job's own supervisor would stay for ever.
        end = time.monotonic() + 20
        while time.monotonic() < end:
            left = subprocess.run(["squeue", "-h"], env=os.environ | environment, check=False, capture_output=True)
            if not left.stdout:
                break
            time.sleep(0.2)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _wait_for_nodes(environment: dict[str, str]) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        shown = subprocess.run(
            ["sinfo", "-h", "-o", "%T %D"], env=os.environ | environment, check=False, capture_output=True, text=True
        )
        if shown.stdout.strip() == "idle 2":
            return
        time.sleep(0.2)
    raise AssertionError(f"Slurm's nodes do not come up: {shown.stdout} {shown.stderr}")


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports
