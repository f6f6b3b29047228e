"""Seeds that depend on what is computed and not on where.

Dropout draws from torch's global generator. Before the randomness of a segment begins, the generator is seeded from
(recipe seed, step, global micro-batch, draw index of the segment) so that stages, replicas and recomputation leave
every mask as it is.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts, the same on every machine and in every Python process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class DrawSeeder:
    """Seeds torch for one micro-batch at a time.

    Only the generators that this rank's layers draw from are seeded: `torch.manual_seed` also notes a stack trace for
    every kind of device that is not there, which costs more than a small layer.

    Args:
        seed: the recipe's seed.
        device: device of this rank.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index or 0])
        self._step = 0
        self._micro_batch = 0

    def set_position(self, step: int, micro_batch: int) -> None:
        """Say which step and which micro-batch of the global batch the next draws belong to."""
        self._step, self._micro_batch = step, micro_batch

    def __call__(self, draw: int) -> None:
        """Seed the generators for the draw with this index."""
        seed = derive_seed(self._seed, "draw", self._step, self._micro_batch, draw)
        for generator in self._generators:
            generator.manual_seed(seed)
