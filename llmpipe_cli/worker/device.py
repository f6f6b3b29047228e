"""Which device a rank computes on."""

from __future__ import annotations

import os
import socket

import torch

from llmpipe_cli.cluster.torchrun import DEVICE_VARIABLE
from llmpipe_cli.errors import PreflightError

# A stream that waits for a neighbour must not stand in front of another one's work: by default eight hardware queues
# are shared by all streams, and each direction to each neighbour has one, besides those of the passes and collectives.
_DEFAULTS = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    # The lanes of transfers are made for what it warns of.
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "0",
}


def rank_device() -> torch.device:
    """This rank's device, made current before anything lies on it: the accelerator with its local number, or the CPU.

    Raises:
        PreflightError: the job was planned for accelerators, and there is none for this rank.
    """
    number, host = int(os.environ["LOCAL_RANK"]), socket.gethostname()
    wanted = os.environ.get("DS_ACCELERATOR") != "cpu"
    if wanted:  # before a device is first looked at
        os.environ.update({name: value for name, value in _DEFAULTS.items() if name not in os.environ})
    if not wanted or not torch.cuda.is_available():
        if os.environ.get(DEVICE_VARIABLE) == "cuda":
            raise PreflightError(
                f"the job is planned for accelerators, and torch {torch.__version__} finds none on this node",
                where=host,
                hint="is torch built for them, is their driver new enough, and is DS_ACCELERATOR unset?",
            )
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if number >= count:
        raise PreflightError(
            f"{number + 1} ranks or more are started on this node, and it shows {count} accelerators",
            where=host,
            hint="every rank needs one of its own: start fewer ranks, or look at CUDA_VISIBLE_DEVICES",
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device
