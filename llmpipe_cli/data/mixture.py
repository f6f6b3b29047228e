"""Several sources as one: read one after the other, and how many samples of each an epoch draws.

An epoch of a mixture has as many samples as its sources have together. With weights each source gets its share of them
(Hare's largest remainders): one whose share is larger than its size is drawn several times an epoch, one whose share is
smaller goes on in the next epoch where this one left off (`data.order.MixtureOrder`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from llmpipe_cli.data.sources import Fields, Record, SkipLog, Source
from llmpipe_cli.errors import UsageError
from llmpipe_cli.recipe.schema import DataSource


class ChainedSource(Source):
    """The records of several sources, one after the other; each is read with its own fields and its own `on_error`.

    Args:
        parts: what the recipe says of each source, and the source.
        fields_of: the fields that a task reads from a source.
    """

    def __init__(self, parts: Sequence[tuple[DataSource, Source]], fields_of: Callable[[DataSource], Fields]) -> None:
        self.parts = list(parts)
        self.fields_of = fields_of
        sizes = [source.total_bytes for _, source in self.parts]
        self.total_bytes = None if None in sizes else sum(size for size in sizes if size is not None)

    def identity(self) -> dict[str, Any]:
        return {"mixture": [part_identity(section, source, self.fields_of(section)) for section, source in self.parts]}

    def describe(self) -> str:
        return " and ".join(source.describe() for _, source in self.parts)

    def label_names(self, label: str) -> list[str] | None:
        declared = [
            source.label_names(fields.label) if (fields := self.fields_of(section)).label else None
            for section, source in self.parts
        ]
        names = [name for each in declared if each is not None for name in each]
        return list(dict.fromkeys(names)) if None not in declared else None

    def raw_records(self, fields: Fields, skipped: SkipLog) -> Iterator[Record]:
        finished_bytes = 0
        for section, source in self.parts:
            log = SkipLog(section.on_error, parent=skipped)
            for record in source.records(self.fields_of(section), log, section.max_documents):
                self.position_bytes = finished_bytes + source.position_bytes
                yield record
            finished_bytes += source.position_bytes


def part_identity(section: DataSource, source: Source, fields: Fields) -> dict[str, Any]:
    """What the records of one source of a mixture depend on."""
    return {
        "source": source.identity(),
        "fields": [*fields.texts, fields.label],
        "max_documents": section.max_documents,
        "on_error": section.on_error,
    }


def draws_an_epoch(sizes: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """Samples of each source in one epoch, which has as many as all sources together.

    Args:
        sizes: samples of each source.
        weights: relative shares; None draws each sample once.

    Raises:
        UsageError: a source would not be drawn at all.
    """
    if weights is None:
        return list(sizes)
    total, whole = sum(sizes), sum(map(Fraction, weights))
    exact = [Fraction(weight) * total / whole for weight in weights]
    draws = [int(share) for share in exact]
    rest = sorted(range(len(draws)), key=lambda index: (draws[index] - exact[index], index))
    for index in rest[: total - sum(draws)]:
        draws[index] += 1
    if 0 in draws:
        index = draws.index(0)
        raise UsageError(
            f"a weight of {weights[index]:g} is less than one of the {total} samples of an epoch",
            where=f"data.train.mixture.{index}.weight",
            hint="raise it, or leave the source out",
        )
    return draws
