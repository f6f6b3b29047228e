"""The controller of a job that was started with ``--detach``: ``python -m llmpipe_cli.cli.detached RUN_DIR``.

The command that the user typed has prepared everything and hands over on stdin, so that no secret stands on a command
line; it returns as soon as this process has taken over. What a terminal would show goes to ``logs/controller.log``.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llmpipe_cli.cli import console, jobs
from llmpipe_cli.cli.launchers import ClusterFlags, make_launcher
from llmpipe_cli.cli.signals import StopSignals
from llmpipe_cli.cluster.launchers.base import LaunchSpec
from llmpipe_cli.errors import LlmpipeError, NodeError
from llmpipe_cli.run import RunDirectory, read_json

if TYPE_CHECKING:
    from llmpipe_cli.cli.jobs import LaunchOptions

_START_SECONDS = 60.0


def hand_over(spec: LaunchSpec, options: LaunchOptions) -> None:
    """Start the controller in the background and return when it has taken over.

    Raises:
        NodeError: it did not start.
    """
    run = spec.run
    flags = dataclasses.asdict(options.cluster) | {"hostfile": _absolute(options.cluster.hostfile)}
    order = {
        "launcher": options.launcher,
        "flags": flags,
        "stages": spec.stages,
        "device": spec.device,
        "grace_seconds": spec.grace_seconds,
        "environment": dict(spec.environment),
        "inputs": [str(path) for path in spec.inputs],
    }
    log = run.logs / "controller.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "llmpipe_cli.cli.detached", str(run.path)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    assert process.stdin is not None
    process.stdin.write(json.dumps(order).encode("ascii"))
    process.stdin.close()
    end = time.monotonic() + _START_SECONDS
    while (read_json(run.controller_file) or {}).get("pid") != process.pid:
        if process.poll() is not None or time.monotonic() > end:
            raise NodeError("the controller did not start", hint=f"see {log}")
        time.sleep(0.05)


def main() -> int:
    """Watch the job to its end; returns the exit code."""
    run = RunDirectory(Path(sys.argv[1]))
    with StopSignals() as signals:
        run.write_controller()
        order = json.loads(sys.stdin.buffer.read())
        flags = order["flags"]
        hostfile = Path(flags.pop("hostfile")) if flags["hostfile"] else flags.pop("hostfile")
        spec = LaunchSpec(
            run,
            tuple(order["stages"]),
            order["device"],
            order["grace_seconds"],
            order["environment"],
            inputs=tuple(Path(path) for path in order["inputs"]),
        )
        try:
            from llmpipe_cli.report.tables import progress_of

            launcher = make_launcher(order["launcher"], ClusterFlags(hostfile=hostfile, **flags))
            progress = progress_of(run)
            return jobs.conclude(run, jobs.watch(launcher.start(spec), run, progress, signals), progress).exit_code
        except LlmpipeError as error:
            if not run.status_file.exists():
                run.write_status("failed", error.exit_code, message=error.message, where=error.where, hint=error.hint)
            console.print_error(error)
            return error.exit_code


def _absolute(path: Path | None) -> str | None:
    return str(path.absolute()) if path is not None else None


if __name__ == "__main__":
    sys.exit(main())
