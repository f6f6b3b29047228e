"""A rank that another launcher starts: ``python -m llmpipe_cli.cluster.foreign TOKEN`` under deepspeed or mpirun.

The token holds the run directory and the job's mark in letters that every shell and launcher leaves alone. What the
rank needs waits in a file of the node that only its owner can read, written there by the node's agent; so none of the
launcher's ways of carrying variables is relied on. Then the process becomes the rank's guardian (`cluster.rank`).
"""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
from pathlib import Path

from llmpipe_cli.cluster.torchrun import MARK_VARIABLE, Meeting
from llmpipe_cli.run import RunDirectory

# What Open MPI calls the variables of torch.distributed.
_OPEN_MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
}


def make_token(run: Path, mark: str, meeting: Meeting) -> str:
    """The argument of this module: ``MARK.BASE32``, without any character that is special somewhere."""
    content = json.dumps({"run": str(run), "address": meeting.address, "port": meeting.port}).encode("ascii")
    return f"{mark}x{base64.b32encode(content).decode('ascii').rstrip('=')}"


def read_token(token: str) -> tuple[RunDirectory, str, Meeting]:
    """Run directory, mark and meeting point of a token."""
    mark, _, text = token.partition("x")
    content = json.loads(base64.b32decode(text + "=" * (-len(text) % 8)))
    return RunDirectory(Path(content["run"])), mark, Meeting(content["address"], content["port"])


def job_file(run: RunDirectory, mark: str) -> Path:
    """The file with the variables of this node's ranks; nodes with shared storage have one each."""
    return run.control / f"job-{mark}-{socket.gethostname()}.json"


def main() -> None:
    """Become the guardian."""
    run, mark, meeting = read_token(sys.argv[1])
    given: dict[str, str] = json.loads(job_file(run, mark).read_text(encoding="ascii"))
    # The runner was told to leave accelerators alone, and its children on its own node inherit that.
    inherited = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    environment = inherited | given | {MARK_VARIABLE: mark}
    for name, theirs in _OPEN_MPI.items():
        environment.setdefault(name, os.environ.get(theirs, ""))
    environment["MASTER_ADDR"], environment["MASTER_PORT"] = meeting.address, str(meeting.port)
    os.execve(sys.executable, [sys.executable, "-P", "-m", "llmpipe_cli.cluster.rank"], environment)


if __name__ == "__main__":
    main()
