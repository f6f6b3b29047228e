"""Which training documents are held out for validation: a share of all, or of each class.

A document's side follows from a hash of its content, so copies of a text never lie on both sides. Without classes the
hash alone decides, and a document keeps its side whatever else the data holds. With classes a first reading finds, for
each class, the texts with the smallest hashes, as many as the share says and at least one of two or more; a text that
stands under several labels counts for the first.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmpipe_cli.data.sources import Record


class HeldOut:
    """The held-out side of a split; `record in held_out` tells.

    Args:
        fraction: share of the documents.
        records: all documents with their labels, for a share of each class; None for a share of all.
    """

    def __init__(self, fraction: float, records: Iterable[Record] | None = None) -> None:
        self.limit = fraction * 2**64
        self.chosen = _smallest_of_each_class(records, fraction) if records is not None else None

    def __contains__(self, record: Record) -> bool:
        if self.chosen is not None:
            return record.digest in self.chosen
        return int.from_bytes(record.digest[:8], "big") < self.limit


def _smallest_of_each_class(records: Iterable[Record], fraction: float) -> set[bytes]:
    label_of: dict[bytes, str] = {}
    for record in records:
        label_of.setdefault(record.digest, str(record.label))
    classes: dict[str, list[bytes]] = {}
    for digest, label in label_of.items():
        classes.setdefault(label, []).append(digest)
    chosen: set[bytes] = set()
    for digests in classes.values():
        count = min(max(round(fraction * len(digests)), 1), len(digests) - 1)
        chosen.update(sorted(digests)[:count])
    return chosen
