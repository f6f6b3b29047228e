"""What this machine offers to run ranks on: its CUDA devices, or some of its processor cores.

A machine without an accelerator offers two ranks by default, or one on a single core: enough to see a pipeline at
work. torch is asked for CUDA devices only when a driver is present, because importing it takes seconds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmpipe_cli.errors import PreflightError, UsageError

DeviceKind = Literal["cpu", "cuda"]

_UNUSED_DRIVER = (
    "this machine has a driver of an accelerator, and torch finds no device: the ranks run on processor cores "
    "(is torch built for it, the driver new enough, CUDA_VISIBLE_DEVICES right? DS_ACCELERATOR=cpu if it is meant)"
)


@dataclass(frozen=True)
class Devices:
    """Devices for ranks, on one node or on several.

    Args:
        kind: cpu or cuda.
        count: how many ranks there are, on all nodes together.
        name: the device's name as its driver gives it; empty where it is not known from here.
        memory_bytes: memory of one device; on CPU the machine's memory shared out over its ranks; 0 where it is not
            known from here.
        warning: something the user should know, or None.
        by_node: ranks of each node; empty for one node.
    """

    kind: DeviceKind
    count: int
    name: str
    memory_bytes: int
    warning: str | None = None
    by_node: tuple[int, ...] = ()


def num_cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_driver() -> bool:
    """Whether this machine has a driver of an accelerator."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def local_devices(requested: int | None = None) -> Devices:
    """The devices of this machine.

    Args:
        requested: how many to use (``--devices``); None takes all accelerators, or min(cores, 2) on CPU.

    Raises:
        UsageError: `requested` is not positive.
        PreflightError: more accelerators are asked for than there are.
    """
    if requested is not None and requested < 1:
        raise UsageError(f"--devices {requested} is not a number of devices", hint="give 1 or more")
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return _cpu(requested)
    accelerators = _cuda_devices()
    if not accelerators:
        return _cpu(requested, _UNUSED_DRIVER if has_driver() else None)
    if requested is not None and requested > len(accelerators):
        raise PreflightError(
            f"{requested} devices are asked for and this machine has {len(accelerators)} ({accelerators[0][0]})",
            hint=f"use --devices {len(accelerators)}, or DS_ACCELERATOR=cpu to run on the processor",
        )
    used = accelerators[:requested]
    # The plan has to fit the smallest.
    name, memory_bytes = min(used, key=lambda device: device[1])
    return Devices("cuda", len(used), name, memory_bytes)


def _cpu(requested: int | None, warning: str | None = None) -> Devices:
    cores = num_cores()
    count = requested or min(cores, 2)
    if count > cores and warning is None:
        warning = f"{count} ranks share {cores} cores: they take turns, so this says nothing about speed"
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
    return Devices("cpu", count, "cpu", memory_bytes, warning)


def _cuda_devices() -> list[tuple[str, int]]:
    """(name, memory in bytes) of each CUDA or ROCm device that torch can use and the environment shows."""
    if not has_driver():
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [(device.name, device.total_memory) for device in properties]
