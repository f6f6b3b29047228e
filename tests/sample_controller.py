"""A controller process for tests: starts sample workers and watches them as every command does.

python tests/sample_controller.py RUN_DIR NUM_RANKS GRACE_SECONDS [HOSTFILE SSH_CONFIG]
"""

from __future__ import annotations

import sys
from pathlib import Path

from llmpipe_cli.cli import console, jobs
from llmpipe_cli.cli.launchers import ClusterFlags, make_launcher
from llmpipe_cli.cli.signals import StopSignals, raise_on_signals
from llmpipe_cli.cluster.launchers.base import LaunchSpec
from llmpipe_cli.errors import LlmpipeError
from llmpipe_cli.report.progress import Progress
from llmpipe_cli.run import RunDirectory


def main() -> int:
    raise_on_signals()
    run, num_ranks = RunDirectory(Path(sys.argv[1])), int(sys.argv[2])
    spec = LaunchSpec(run, tuple(range(num_ranks)), "cpu", float(sys.argv[3]), worker="sample_worker")
    run.write_controller()
    progress = Progress(run.name)
    try:
        launcher = make_launcher(None, ClusterFlags())
        if len(sys.argv) > 4:
            flags = ClusterFlags(Path(sys.argv[4]), options=[f"ssh-config={sys.argv[5]}", "node-timeout=5"])
            launcher = make_launcher("ssh", flags)
        launcher.warm_up()
        with StopSignals() as signals:
            outcome = jobs.watch(launcher.start(spec), run, progress, signals)
        return jobs.conclude(run, outcome, progress).exit_code
    except LlmpipeError as error:
        console.print_error(error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
