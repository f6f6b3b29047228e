"""Parts of the training data for cross-validation, stratified by label.

The records of each label are dealt to the folds in turn, in their own order; copies of a text share its fold, so that
no model is tested on what it has learned. With as many folds as records, each is left out once.
"""

from __future__ import annotations

from collections.abc import Iterator

from llmpipe_cli.data.sources import Record


def in_fold(records: Iterator[Record], index: int, count: int, *, validation: bool) -> Iterator[Record]:
    """The records of fold `index` of `count` (validation), or those of all other folds."""
    fold_of_text: dict[bytes, int] = {}
    next_fold: dict[str, int] = {}
    for record in records:
        if record.digest not in fold_of_text:
            # Labels begin at different folds, so that rare ones do not all fall into the first.
            label = str(record.label) if record.label is not None else "|".join(sorted(set(record.labels)))
            turn = next_fold.setdefault(label, len(next_fold))
            fold_of_text[record.digest] = turn % count
            next_fold[label] = turn + 1
        if (fold_of_text[record.digest] == index) == validation:
            yield record


def count_records(records: Iterator[Record]) -> int:
    """How many different texts there are: the number of folds that leave one out."""
    return len({record.digest for record in records})
