"""The process on each device: ``python -m llmpipe_cli.worker RUN_DIR`` under torchrun's environment.

It joins the process group, gets the plan from rank 0, does its job and ends with the exit code of the outcome. A
failure is written to the run directory before the process ends, so that the controller can show the first cause.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from llmpipe_cli.run import RunDirectory
from llmpipe_cli.worker.failure import write_failure
from llmpipe_cli.worker.stop import StopFlag


def main() -> int:
    """Run this rank to its end; returns the exit code."""
    run = RunDirectory(Path(sys.argv[1]))
    rank = int(os.environ["RANK"])
    stop = StopFlag(run.stop_file if rank == 0 else None)
    try:
        import torch.distributed as dist

        from llmpipe_cli.worker.process import join

        context = join(run, stop)
        if context.plan.job == "train":
            from llmpipe_cli.worker.training import train as job
        elif context.plan.job == "bench":
            from llmpipe_cli.worker.bench import bench as job
        elif context.plan.job == "evaluate":
            from llmpipe_cli.worker.evaluation import evaluate as job
        elif context.plan.job == "serve":
            from llmpipe_cli.worker.serving import serve as job
        else:
            from llmpipe_cli.worker.generation import generate as job
        code = job(context)
        # A rank that ended with something still on the way to it would take what it had sent with it.
        dist.barrier()
        return code
    except BaseException as error:
        return write_failure(run, rank, error)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Other ranks may be gone: tearing the process group down could wait for them for ever.
    os._exit(code)
