"""The Hugging Face hub on a machine without a network: its client would try again, half a minute a file."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

_NO_NETWORK = "the hub cannot be reached from here, and only what was downloaded before can be read; "


def expect(name: str | Path) -> str:
    """Call it before something is read by its hub id: without a network, only downloaded files are looked for.

    Args:
        name: a hub id, or a folder, which needs nothing.

    Returns:
        What to say before the hint of an error: that there is no network, or nothing.
    """
    return "" if Path(name).is_dir() or _is_reachable() else _NO_NETWORK


@cache
def _is_reachable() -> bool:
    """Whether the hub's name is known here; asked once a process, and not where a proxy would ask."""
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE:
        return False
    if host.scheme in getproxies():
        return True
    try:
        socket.getaddrinfo(host.hostname, host.port or host.scheme)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported later, and for other processes
        constants.HF_HUB_OFFLINE = True
        return False
    return True
