"""Which whole documents share a sample: best-fit decreasing bin packing.

Documents are taken from the longest to the shortest, each into the fullest sample that still has room for it. The
result depends on the lengths and the order of the documents alone, and is computed in one pass wherever it is needed:
lengths are small whole numbers, so the samples are kept by the room that they have left.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def best_fit(lengths: npt.NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Documents of each sample, in the order in which they were put in.

    Args:
        lengths: tokens of each document, int [num_documents]; longer ones count as `capacity`.
        capacity: tokens a sample.
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set while a sample has room for r more tokens
    clipped = np.minimum(np.asarray(lengths), capacity)
    for document in np.argsort(-clipped, kind="stable").tolist():
        length = int(clipped[document])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            bins[chosen].append(document)
        else:
            room, chosen = capacity, len(bins)
            bins.append([document])
        left = room - length
        by_room[left].append(chosen)
        rooms |= 1 << left
    return bins
