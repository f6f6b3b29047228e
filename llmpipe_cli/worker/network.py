"""The job of ``llmpipe doctor`` on each rank: how fast the links between ranks really are.

    python -m llmpipe_cli.worker.network RUN_DIR        under torchrun's environment

Neighbouring ranks, as pipeline stages would be, send each other small messages (latency) and large ones (bandwidth),
pair after pair; then all ranks reduce a tensor together. Each node counts the TCP segments that it had to send again
meanwhile, which tells of a link that loses packets. Rank 0 writes ``network.json``; see `cluster.network` for its keys.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmpipe_cli.cluster.network import FILE_NAME, summarise
from llmpipe_cli.engine.exchange import gather_json
from llmpipe_cli.run import RunDirectory, write_json
from llmpipe_cli.worker.device import rank_device
from llmpipe_cli.worker.failure import write_failure

_PINGS = 30
_BLOCK_BYTES = 4 << 20
_BLOCKS_AT_LEAST, _BLOCK_SECONDS = 4, 0.4
_REDUCE_BYTES = 16 << 20
_TIMEOUT = timedelta(minutes=2)


def measure(device: torch.device) -> dict[str, Any]:
    """Measure all links from device to device; called by all ranks together, which all get the result."""
    before = _tcp_segments()
    pairs = []
    for left in range(dist.get_world_size() - 1):
        # One pair at a time has the network to itself.
        result = _measure_pair(left, left + 1, device) if dist.get_rank() in (left, left + 1) else None
        pairs.append(gather_json(result)[left])
    reduce_seconds = _measure_all_reduce(device)
    after = _tcp_segments()
    own = {
        "host": os.environ.get("LLMPIPE_NODE") or socket.gethostname(),
        "sent": after[0] - before[0],
        "sent_again": after[1] - before[1],
    }
    return summarise(pairs, gather_json(own), {"bytes": _REDUCE_BYTES, "seconds": reduce_seconds})


def _measure_pair(left: int, right: int, device: torch.device) -> dict[str, Any]:
    """Latency and bandwidth from `left` to `right`; the left rank's clock counts."""
    is_left, other = dist.get_rank() == left, right if dist.get_rank() == left else left
    small, block = torch.zeros(1, device=device), torch.zeros(_BLOCK_BYTES // 4, device=device)

    def ping() -> None:
        if is_left:
            dist.send(small, other)
            dist.recv(small, other)
        else:
            dist.recv(small, other)
            dist.send(small, other)

    for _ in range(3):  # the first message opens the connection
        ping()
    latency = statistics.median(_timed(ping, device) for _ in range(_PINGS)) / 2

    def blocks(count: int) -> None:
        for _ in range(count):
            dist.send(block, other) if is_left else dist.recv(block, other)
        ping()  # all have arrived

    count = torch.tensor([_BLOCKS_AT_LEAST], device=device)
    if is_left:
        seconds = _timed(lambda: blocks(1), device)
        count[0] = min(256, max(_BLOCKS_AT_LEAST, int(_BLOCK_SECONDS / seconds)))
        dist.send(count, other)
    else:
        blocks(1)
        dist.recv(count, other)
    number = int(count.item())
    seconds = _timed(lambda: blocks(number), device)
    gbps = number * _BLOCK_BYTES * 8 / max(seconds - 2 * latency, 1e-9) / 1e9
    return {"from": left, "to": right, "latency_seconds": latency, "gbps": gbps}


def _measure_all_reduce(device: torch.device) -> float:
    tensor = torch.zeros(_REDUCE_BYTES // 4, device=device)
    dist.all_reduce(tensor)
    return statistics.median(_timed(lambda: dist.all_reduce(tensor), device) for _ in range(3))


def _timed(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _tcp_segments() -> tuple[int, int]:
    """TCP segments that this node has sent, and sent again; zeros where the kernel does not tell."""
    try:
        lines = [line.split() for line in Path("/proc/net/snmp").read_text(encoding="ascii").splitlines()]
    except OSError:
        return 0, 0
    tcp = [line for line in lines if line[0] == "Tcp:"]
    values = dict(zip(tcp[0][1:], tcp[1][1:], strict=True))
    return int(values["OutSegs"]), int(values["RetransSegs"])


def main() -> int:
    """Measure and write; returns the exit code."""
    run, rank = RunDirectory(Path(sys.argv[1])), int(os.environ["RANK"])
    try:
        device = rank_device()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
        result = measure(device)
        if rank == 0:
            write_json(run.path / FILE_NAME, result)
        dist.barrier()
    except BaseException as error:
        return write_failure(run, rank, error)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
