"""A link between two network namespaces that delays and loses packets, for kernels without netem.

python tests/lossy_link.py OTHER_NAMESPACE DELAY_SECONDS LOSS        inside the first namespace, as root

Each namespace gets a device ``lossy0``; this process carries the packets from one to the other. It prints a line when
the devices are there; their addresses are set by whoever started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque
from pathlib import Path

_TUNSETIFF = 0x400454CA
_IFF_TUN_WITHOUT_HEADER = 0x1001
_CLONE_NEWNET = 0x40000000


def open_device() -> int:
    """A new device in the current namespace; it lives as long as its descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"lossy0", _IFF_TUN_WITHOUT_HEADER))
    return descriptor


def main() -> None:
    """Carry packets until killed."""
    delay, loss = float(sys.argv[2]), float(sys.argv[3])
    first = open_device()
    with Path(f"/run/netns/{sys.argv[1]}").open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    second = open_device()
    print("ready", flush=True)
    chance = random.Random(1)
    under_way: deque[tuple[float, int, bytes]] = deque()
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for readable in select.select([first, second], [], [], wait)[0]:
            packet = os.read(readable, 65536)
            if chance.random() >= loss:
                under_way.append((time.monotonic() + delay, second if readable == first else first, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, device, packet = under_way.popleft()
            with contextlib.suppress(OSError):  # the other end is not up yet
                os.write(device, packet)


if __name__ == "__main__":
    main()
