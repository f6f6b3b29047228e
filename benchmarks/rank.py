"""One rank of a launch of the comparison: builds all systems, then runs their steps in turn.

``python -m torch.distributed.run ... benchmarks/rank.py FOLDER`` reads FOLDER/launch.json and writes
FOLDER/seconds.json: for each system and round the seconds from a barrier before to a barrier after its step, and the
processor seconds that both ranks spent in it (`cpu`), which a busy machine changes less. Systems that are not in
`always` take part in every `every`-th round; their other rounds are null. `simulated` has, for llmpipe, what the
simulator makes of each step's own records, over the measured length. At `deadline` (seconds since the epoch) no
further round begins; two are measured in any case.
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
    # DeepSpeed remembers the process grid of its last engine; data parallelism has to find none.
    building = sorted(names, key=lambda name: name != "deepspeed-data")
    systems = {name: build(name, work, rank, folder) for name in building}
    wall: dict[str, list[float | None]] = {name: [] for name in names}
    cpu: dict[str, list[float | None]] = {name: [] for name in names}
    simulated: dict[str, list[float | None]] = {name: [] for name in names}
    for turn in range(-launch["warmup"], launch["rounds"]):
        if turn > 1 and _is_late(launch["deadline"]):
            break
        # The order turns round, so that no system always follows the same one.
        for name in names if turn % 2 else reversed(names):
            if turn > 0 and turn % launch["every"] and name not in launch["always"]:
                wall[name].append(None)
                cpu[name].append(None)
                simulated[name].append(None)
                continue
            dist.barrier()
            started, busy = time.perf_counter(), time.process_time()
            systems[name].step()
            dist.barrier()
            spent = torch.tensor([time.perf_counter() - started, time.process_time() - busy], dtype=torch.float64)
            dist.all_reduce(spent[1:])
            if turn >= 0:
                wall[name].append(spent[0].item())
                cpu[name].append(spent[1].item())
                recorded = launch["simulate"] and name.startswith("llmpipe-")
                simulated[name].append(systems[name].simulated_over_measured() if recorded else None)
    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps({"wall": wall, "cpu": cpu, "simulated": simulated}))
    dist.barrier()
    dist.destroy_process_group()


def _is_late(deadline: float) -> bool:
    """Whether rank 0's clock is past the deadline; all ranks ask together."""
    late = torch.tensor(time.time() > deadline)
    dist.broadcast(late, 0)
    return bool(late)


if __name__ == "__main__":
    main()
