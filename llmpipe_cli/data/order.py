"""The order in which samples are drawn: a function of the seed and the position alone.

Training reads one endless stream of positions 0, 1, 2, ...; position p lies in epoch p // n, and each epoch is a
permutation of the n samples. The permutation is computed, not stored: a Feistel network scrambles the bits of a number
below the next power of four, and is applied again while the result is not below n ("cycle walking"), which gives a
bijection on 0..n-1. So any position is found at once, without state, for corpora of any size, and resuming needs
nothing but a number. No library's random generator is involved: the order stays the same across versions and machines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_NUM_ROUNDS = 8


class SampleOrder:
    """The stream of sample indices.

    Args:
        num_samples: samples in one epoch, at least 1.
        seed: decides the order.
        shuffle: False gives 0, 1, ..., n-1 in each epoch.
    """

    def __init__(self, num_samples: int, seed: int, shuffle: bool = True) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples}")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle

    def indices(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Sample indices at positions [start, stop), int64 [stop - start]; positions run on into later epochs."""
        return self.at(np.arange(start, stop))

    def at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sample indices at any positions, int64 [n]."""
        epochs, offsets = np.divmod(positions, self.num_samples)
        found = offsets.astype(np.int64)
        for epoch in np.unique(epochs).tolist() if self.shuffle else ():
            chosen = epochs == epoch
            found[chosen] = self._permute(offsets[chosen].astype(np.uint64), epoch).astype(np.int64)
        return found

    def _permute(self, offsets: npt.NDArray[np.uint64], epoch: int) -> npt.NDArray[np.uint64]:
        if self.num_samples == 1:
            return offsets
        half_bits = ((self.num_samples - 1).bit_length() + 1) // 2
        keys = _round_keys(self.seed, epoch)
        values = _feistel(offsets, half_bits, keys)
        outside = values >= self.num_samples
        while outside.any():  # fewer than 4 turns on average: the domain is at most four times too large
            values[outside] = _feistel(values[outside], half_bits, keys)
            outside = values >= self.num_samples
        return values


class MixtureOrder:
    """The stream of sample indices over several sources that are drawn in given numbers an epoch.

    Each place of an epoch belongs to a source; a permutation of the places mixes them. The k-th place of a source reads
    on in that source's own endless stream, from epoch to epoch, so no sample comes again before all others of its
    source have come.

    Args:
        sizes: samples of each source; indices count through the sources one after the other.
        draws: samples of each source in one epoch.
        seed: decides the order.
    """

    def __init__(self, sizes: Sequence[int], draws: Sequence[int], seed: int) -> None:
        self.places = SampleOrder(sum(draws), seed)
        self.draws = list(draws)
        self.first_place = np.cumsum([0, *draws])
        self.first_sample = np.cumsum([0, *sizes])
        # keys of their own: with those of the places, sources of equal sizes would be drawn in equal orders
        self.streams = [SampleOrder(size, _source_seed(seed, index)) for index, size in enumerate(sizes)]

    def indices(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Sample indices at positions [start, stop), int64 [stop - start]; positions run on into later epochs."""
        slots = self.places.indices(start, stop)
        epochs = np.arange(start, stop) // self.places.num_samples
        sources = np.searchsorted(self.first_place, slots, side="right") - 1
        found = np.empty(stop - start, np.int64)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            own = epochs[chosen] * self.draws[source] + slots[chosen] - self.first_place[source]
            found[chosen] = self.first_sample[source] + self.streams[source].at(own)
        return found


def _source_seed(seed: int, index: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"source {seed} {index}".encode(), digest_size=7).digest(), "little")


def _round_keys(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    digest = hashlib.blake2b(f"sample order {seed} {epoch}".encode(), digest_size=8 * _NUM_ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8")


def _feistel(values: npt.NDArray[np.uint64], half_bits: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection on the numbers of 2 * half_bits bits."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Spreads every input bit over all 64 output bits (the finaliser of SplitMix64; overflow is meant)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
