"""Rank processes that run one plan after another, so that a benchmark starts once and not once a plan.

`Ranks` starts them and gives them plans; ``python benchmarks/ranks.py`` is such a process. It reads a line of JSON a
plan from its standard input, runs llmpipe's own worker with it, and answers with a line. Asked to track, it answers
with the most bytes of tensors that were alive at once during a training step, as PyTorch's allocator reported every
allocation and release to the profiler.
"""

from __future__ import annotations

import bisect
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Ranks:
    """`size` rank processes on this machine's cores, one thread each; use as a context manager."""

    def __init__(self, size: int) -> None:
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
        self._members = [
            subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
            for _ in range(size)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: object) -> None:
        for member in self._members:
            member.kill()
            member.wait()

    def run(self, folder: Path, values: dict[str, Any], *, track: bool = False) -> tuple[Path, list[int]]:
        """Train a recipe on as many ranks as its layout has.

        Args:
            folder: where data and runs are kept.
            values: the recipe.
            track: count the tensors' bytes.

        Returns:
            The run directory, and for each rank the most bytes during a step (0 if not tracked).

        Raises:
            RuntimeError: a rank failed.
        """
        from llmpipe_cli.data.prepare import prepare
        from llmpipe_cli.plan.resolve import make_plan
        from llmpipe_cli.recipe.schema import Recipe
        from llmpipe_cli.run import RunDirectory

        recipe = Recipe.model_validate(values)
        data = prepare(recipe, folder, folder / "cache")
        plan = make_plan(recipe, data, device="cpu", num_devices=len(self._members))
        run = RunDirectory.create(folder / "runs", plan.name)
        plan.save(run.plan)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        members = self._members[: plan.layout.num_ranks]
        for rank, member in enumerate(members):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(members), "MASTER_PORT": port}
            order = {"run": str(run.path), "environment": {name: str(value) for name, value in place.items()}}
            assert member.stdin is not None
            member.stdin.write(json.dumps({**order, "track": track}) + "\n")
            member.stdin.flush()
        answers = []
        for rank, member in enumerate(members):
            assert member.stdout is not None
            line = member.stdout.readline()
            answers.append(json.loads(line) if line else {"code": "died"})
            if answers[-1]["code"]:
                raise RuntimeError(f"rank {rank} of {run.path} ended with {answers[-1]['code']}")
        return run.path, [answer["peak_bytes"] for answer in answers]


def _tracked(work: Any) -> tuple[int, int]:
    """The result of `work`, and the most bytes of tensors alive at once during a training step."""
    import gc

    import torch

    from llmpipe_cli.worker.training import Trainer

    own_step = Trainer.step

    def step(trainer: Trainer) -> bool:
        with torch.profiler.record_function("training step"):
            return own_step(trainer)

    gc.collect()  # of an earlier job
    setattr(Trainer, "step", step)  # noqa: B010
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            code = work()
    finally:
        setattr(Trainer, "step", own_step)  # noqa: B010
    results = profiler.profiler.kineto_results
    steps = [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in results.events()
        if event.name() == "training step"
    ]
    return code, peak_bytes(_allocations(results), steps)


CLOCKS_APART_NS = 1_000_000
"""More than clocks of threads differ by, and less than a block usually lives."""
Allocation = tuple[int, int, int]
"""Nanosecond, address and bytes of an allocation; a release has negative bytes."""


def peak_bytes(allocations: Iterable[Allocation], windows: Sequence[tuple[int, int]]) -> int:
    """The most bytes alive at once within any of the windows.

    Not every release is reported: gloo's threads, which the profiler does not follow, may be the last to let go of a
    tensor that was sent or reduced. So a block is also gone when another is allocated over it. Clocks of threads
    differ a little: a release that comes up to `CLOCKS_APART_NS` after such an allocation is that of the block before.
    Releases of what was never counted are those of an earlier job of this process.

    Args:
        allocations: in any order.
        windows: first and last nanosecond of each.
    """
    sizes: dict[int, int] = {}  # of the blocks alive, by address
    addresses: list[int] = []  # the same, ascending
    covered: dict[tuple[int, int], int] = {}  # when blocks without a release were allocated over, by address and size
    alive = peak = 0

    def drop(address: int) -> int:
        del addresses[bisect.bisect_left(addresses, address)]
        return sizes.pop(address)

    for moment, address, num_bytes in sorted(allocations, key=lambda each: each[0]):
        if num_bytes > 0:
            for gone in _overlapping(addresses, sizes, address, num_bytes):
                covered[gone, sizes[gone]] = moment
                alive -= drop(gone)
            bisect.insort(addresses, address)
            sizes[address] = num_bytes
            alive += num_bytes
        elif moment <= covered.pop((address, -num_bytes), moment - CLOCKS_APART_NS - 1) + CLOCKS_APART_NS:
            continue
        elif sizes.get(address) == -num_bytes:
            alive -= drop(address)
        if any(begin <= moment <= end for begin, end in windows):
            peak = max(peak, alive)
    return peak


def _overlapping(addresses: list[int], sizes: dict[int, int], start: int, num_bytes: int) -> list[int]:
    """Addresses of the blocks that share bytes with the new one."""
    first = bisect.bisect_left(addresses, start)
    if first and addresses[first - 1] + sizes[addresses[first - 1]] > start:
        first -= 1
    return addresses[first : bisect.bisect_left(addresses, start + num_bytes)]


def _allocations(results: Any) -> Iterator[Allocation]:
    """Every allocation and release that the profiler noticed."""
    from torch._C._profiler import _EventType

    events = list(results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size


def main() -> None:
    """Run plans until the input ends."""
    import importlib

    import torch.distributed

    from llmpipe_cli.worker.__main__ import main as work

    comm = importlib.import_module("deepspeed.comm.comm")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a job prints is no answer
    for line in sys.stdin:
        order = json.loads(line)
        os.environ.update(order["environment"])
        sys.argv = ["worker", order["run"]]
        code, peak = _tracked(work) if order["track"] else (work(), 0)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        comm.cdb = None
        print(json.dumps({"code": code, "peak_bytes": peak}), file=answers, flush=True)


if __name__ == "__main__":
    main()
