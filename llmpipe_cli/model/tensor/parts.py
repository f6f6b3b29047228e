"""Which part of a whole parameter one shard holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Ranges of one dimension of a parameter; over all shards they cover every element once."""

    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    dim: int
    """The divided dimension."""
    ranges: tuple[tuple[int, int], ...]
    """First index and the one after the last, of each piece that the shard holds, in this order."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the shard."""
        size = sum(stop - start for start, stop in self.ranges)
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    def of_shard(self, shard: int, num_shards: int) -> Part:
        """The part of the same parameter that another shard holds."""
        return divide(self.shape, self.dim, shard, num_shards, len(self.ranges))

    def take(self, whole: Tensor) -> Tensor:
        """The shard of a whole parameter; shares no memory with it."""
        pieces = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges]
        return (
            torch.cat(pieces, self.dim) if len(pieces) > 1 else pieces[0].clone(memory_format=torch.contiguous_format)
        )

    def put(self, whole: Tensor, shard: Tensor) -> None:
        """Write the shard to its place in `whole`; it has `local_shape`, or is that flattened."""
        position = 0
        shard = shard.view(self.local_shape)
        for start, stop in self.ranges:
            whole.narrow(self.dim, start, stop - start).copy_(shard.narrow(self.dim, position, stop - start))
            position += stop - start

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` reverses it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Part:
        """What `to_json` wrote."""
        ranges = tuple((start, stop) for start, stop in value["ranges"])
        return cls(tuple(value["shape"]), value["dim"], ranges)


def share(size: int, shard: int, num_shards: int) -> tuple[int, int]:
    """First index of a shard's share of `size` indices, and the one after the last; shares differ by one at most."""
    return shard * size // num_shards, (shard + 1) * size // num_shards


def divide(shape: tuple[int, ...], dim: int, shard: int, num_shards: int, blocks: int = 1) -> Part:
    """A shard's part of a parameter whose dimension `dim` is made of `blocks` equal blocks, each of them divided."""
    dim %= len(shape)
    width = shape[dim] // blocks
    start, stop = share(width, shard, num_shards)
    return Part(tuple(shape), dim, tuple((block * width + start, block * width + stop) for block in range(blocks)))
