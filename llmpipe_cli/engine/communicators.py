"""Process groups for messages between neighbouring stages, and how long a rank waits in any group."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# A rank that waits longer for another one ends with an error; saving and evaluating are far below it.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# With NCCL a posted receive is a kernel: until the data has come it holds a multiprocessor for each channel of its
# communicator (a power of two; up to 32 where nothing is said), and passes compute on what is left of the device. Four
# are twice what NCCL uses for a peer on another node. NCCL_MAX_CTAS overrides it.
_MAX_THREAD_BLOCKS = 4


def use_collective_timeout() -> None:
    """Let groups made from now on wait as long as the default group, DeepSpeed's too.

    Left alone those of NCCL give up after ten minutes, before the watchdog has found out for whom they wait.
    """
    distributed_c10d.default_pg_nccl_timeout = COLLECTIVE_TIMEOUT


def transfer_group() -> dist.ProcessGroup:
    """A group of all ranks for `engine.transfers`; all ranks make it together.

    A communicator of NCCL does what it is told in one order on one stream: a rank must do nothing in it but send to
    one other, or receive from one.
    """
    if dist.get_backend() != "nccl":
        return dist.new_group()
    # Before the next pass's blocks of threads, which would keep a neighbour waiting for the last one's result.
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = _MAX_THREAD_BLOCKS
    options._timeout = COLLECTIVE_TIMEOUT
    return dist.new_group(pg_options=options, timeout=COLLECTIVE_TIMEOUT)


def open_connections(ends: Iterable[tuple[dist.ProcessGroup, int, bool]], device: torch.device) -> None:
    """Pass one number over each connection of this rank.

    NCCL makes a connection in the first call that uses it, and that call returns when the other rank has made its own.
    In the middle of a schedule one rank would stand there while the other waits for something else from it.

    Args:
        ends: group, peer and whether this rank sends. Whoever shares a connection has to come to it without waiting
            for what follows, so all ranks list theirs in one order over the whole pipeline.
        device: device of the messages.
    """
    message = torch.zeros(1, device=device)
    for group, peer, sends in ends:
        if sends:
            dist.send(message, peer, group=group)
        else:
            dist.recv(message, peer, group=group)
