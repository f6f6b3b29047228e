"""More training texts from few: copies with words left out, swapped or replaced (Wei & Zou 2019).

Each training text stays, and `copies` changed ones follow it. What is changed depends on the text and the number of the
copy alone, so that preparing twice gives the same. Validation data is never changed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llmpipe_cli.data.discover import find_files
from llmpipe_cli.data.sources import Record
from llmpipe_cli.errors import UsageError
from llmpipe_cli.recipe.schema import Augmentation

Synonyms = dict[str, list[str]]


class Augmenter:
    """Adds changed copies.

    Args:
        options: how many, and what is changed.
        base_dir: the recipe's folder, for the table of synonyms.

    Raises:
        UsageError: no such table, or not one.
    """

    def __init__(self, options: Augmentation, base_dir: Path) -> None:
        self._options = options
        self._synonyms = _read_synonyms(options.synonyms, base_dir) if options.synonyms is not None else {}

    def records(self, records: Iterator[Record]) -> Iterator[Record]:
        """Each record and its changed copies; a document in pieces stays alone."""
        for record in records:
            yield record
            if not (record.first and record.last):
                continue
            for copy in range(self._options.copies):
                draw = random.Random(record.digest + copy.to_bytes(4, "big"))
                text = self.text(record.texts[0], draw)
                if text.strip() and text != record.texts[0]:
                    yield replace(record, texts=(text, *record.texts[1:]))

    def text(self, text: str, draw: random.Random) -> str:
        """One changed copy of a text."""
        options, words = self._options, text.split()
        for index, word in enumerate(words):
            others = self._synonyms.get(word.casefold())
            if others and draw.random() < options.synonym_share:
                words[index] = draw.choice(others)
        for _ in range(round(options.swap * len(words)) if len(words) > 1 else 0):
            first, second = draw.sample(range(len(words)), 2)
            words[first], words[second] = words[second], words[first]
        kept = [word for word in words if draw.random() >= options.deletion]
        return " ".join(kept or words[:1])


def _read_synonyms(name: str, base_dir: Path) -> Synonyms:
    """A JSON object from words to lists of words."""
    (path,) = find_files(name, None, base_dir, where="data.augment.synonyms")[:1]
    try:
        table = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UsageError(f"not JSON: {error}", where=str(path)) from error
    fine = isinstance(table, dict) and all(
        isinstance(others, list) and others and all(isinstance(other, str) for other in others)
        for others in table.values()
    )
    if not fine:
        hint = 'for example {"quick": ["fast", "swift"]}'
        raise UsageError("a table of synonyms is an object from words to lists of words", where=str(path), hint=hint)
    return {word.casefold(): others for word, others in table.items()}
