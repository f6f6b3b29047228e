"""One rank of a launch of the comparison: builds all systems, then runs their steps in turn.

``python -m torch.distributed.run ... benchmarks/rank.py FOLDER`` reads FOLDER/launch.json and writes
FOLDER/seconds.json: for each system the seconds of each round, from a barrier before to a barrier after its step.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from systems import Work, build

from llmpipe_cli.worker.process import quiet_cpu_start


def main() -> None:
    """Measure and write."""
    folder = Path(sys.argv[1])
    launch = json.loads((folder / "launch.json").read_text())
    torch.set_num_threads(launch["threads"])
    quiet_cpu_start()
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False, dist_init_required=True)
    rank, work, names = dist.get_rank(), Work(**launch["work"]), launch["systems"]
    systems = {name: build(name, work, rank, folder) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(launch["warmup"] + launch["rounds"]):
        # The order turns round, so that no system always follows the same one.
        for name in names if turn % 2 else reversed(names):
            dist.barrier()
            started = time.perf_counter()
            systems[name].step()
            dist.barrier()
            if turn >= launch["warmup"]:
                seconds[name].append(time.perf_counter() - started)
    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
