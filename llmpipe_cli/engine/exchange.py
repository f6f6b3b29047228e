"""JSON between ranks over the process group; never pickles."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist


def _device(group: dist.ProcessGroup | None = None) -> torch.device:
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def broadcast_json(value: Any, source: int = 0) -> Any:
    """The value of rank `source`, on every rank. Other ranks pass anything."""
    device, is_source = _device(), dist.get_rank() == source
    data = json.dumps(value).encode() if is_source else b""
    size = torch.tensor(len(data), dtype=torch.int64, device=device)
    dist.broadcast(size, source)
    buffer = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if is_source:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(buffer, source)
    return value if is_source else json.loads(buffer.cpu().numpy().tobytes())


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks, by rank, on every rank; over a group of all ranks instead of the default one."""
    device, world = _device(group), dist.get_world_size()
    data = json.dumps(value).encode()
    sizes = torch.zeros(world, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([len(data)], dtype=torch.int64, device=device), group=group)
    largest = int(sizes.max())
    mine = torch.zeros(largest, dtype=torch.uint8, device=device)
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    everything = torch.zeros(world * largest, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(everything, mine, group=group)
    rows = everything.view(world, largest).cpu().numpy()
    return [json.loads(row[: int(size)].tobytes()) for row, size in zip(rows, sizes, strict=True)]
