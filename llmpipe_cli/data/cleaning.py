"""Cleaning of texts before they are tokenised: what the recipe asks for, and nothing by itself.

Markup, control characters and Unicode forms are changed inside a text; texts of the wrong length or script, and
duplicates, are left out and counted with their place. Near-duplicates are texts whose sets of five-word runs overlap by
at least `near_duplicate_similarity` (Jaccard), found with MinHash and locality-sensitive hashing (Broder 1997;
datasketch); the first of them stays. Training and validation data are cleaned alike, before a share is held out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

from llmpipe_cli.data.sources import Record, SkipLog, digest_of
from llmpipe_cli.errors import UsageError
from llmpipe_cli.recipe.schema import Cleaning

_BLOCKS = {"p", "br", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "table", "blockquote", "pre"}
_UNSEEN = {"script", "style", "head"}
_SHINGLE_WORDS = 5
_PERMUTATIONS = 128


class Cleaner:
    """Cleans the records of one split.

    Args:
        options: what to do.

    Raises:
        UsageError: a package that the options need is missing.
    """

    def __init__(self, options: Cleaning) -> None:
        self._options = options
        self._seen: set[bytes] = set()
        self._near: Any = None
        self._stop_words = {word.casefold() for word in options.stop_words}
        if options.unicode == "ftfy":
            _import("ftfy", "data.clean.unicode")
        if options.duplicates == "near":
            self._near = _import("datasketch", "data.clean.duplicates").MinHashLSH(
                threshold=options.near_duplicate_similarity, num_perm=_PERMUTATIONS
            )

    def records(self, records: Iterator[Record], skipped: SkipLog) -> Iterator[Record]:
        """The records that stay, cleaned. Of a document in pieces, only the whole is compared with others."""
        dropping = False
        for record in records:
            if record.first:
                texts = tuple(self.text(text) for text in record.texts)
                cleaned = replace(record, texts=texts)
                if record.last:
                    cleaned = replace(cleaned, digest=digest_of("\0".join(texts)))
                reason = self._reason_against(cleaned)
                dropping = reason is not None
                if reason is not None:
                    skipped.leave_out(UsageError(reason, where=record.where))
                    continue
                yield cleaned
            elif not dropping:
                yield replace(record, texts=tuple(self.text(text) for text in record.texts))

    def text(self, text: str) -> str:
        """One text, cleaned."""
        options = self._options
        if options.html:
            text = without_html(text)
        if options.unicode == "ftfy":
            import ftfy

            text = ftfy.fix_text(text)
        elif options.unicode != "none":
            text = unicodedata.normalize("NFC" if options.unicode == "nfc" else "NFKC", text)
        if options.control_characters:
            text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs"))
        if self._stop_words:
            text = " ".join(
                word for word in text.split() if word.strip(".,;:!?\"'()").casefold() not in self._stop_words
            )
        return text

    def _reason_against(self, record: Record) -> str | None:
        options, text = self._options, record.texts[0]
        if not all(each.strip() for each in record.texts):
            return "nothing is left of the text"
        if record.last and options.min_chars is not None and len(text) < options.min_chars:
            return f"{len(text)} characters, fewer than {options.min_chars}"
        if record.last and options.max_chars is not None and len(text) > options.max_chars:
            return f"{len(text)} characters, more than {options.max_chars}"
        if options.scripts:
            share = script_share(text, options.scripts)
            if share < options.min_script_share:
                return f"{100 * share:.0f} % of the letters are {' or '.join(options.scripts)}"
        if options.duplicates != "none":
            if record.digest in self._seen:
                return "a copy of an earlier text"
            self._seen.add(record.digest)
        if self._near is not None and record.last:
            return self._near_duplicate(record)
        return None

    def _near_duplicate(self, record: Record) -> str | None:
        from datasketch import MinHash

        words = record.texts[0].casefold().split()
        hashed = MinHash(num_perm=_PERMUTATIONS, seed=1)
        for start in range(max(1, len(words) - _SHINGLE_WORDS + 1)):
            hashed.update(" ".join(words[start : start + _SHINGLE_WORDS]).encode())
        found = self._near.query(hashed)
        if found:
            return f"almost a copy of {sorted(found)[0]}"
        self._near.insert(record.where, hashed, check_duplication=False)
        return None


def without_html(text: str) -> str:
    """The text of a page: tags away, entities as characters, blocks on lines of their own."""
    parser = _Text()
    parser.feed(text)
    parser.close()
    lines = (re.sub(r"[ \t\r\f\v]+", " ", line).strip() for line in "".join(parser.parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in _UNSEEN
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in _UNSEEN))
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def script_share(text: str, scripts: list[str]) -> float:
    """Share of the letters that belong to one of the scripts, by their Unicode names (latin, cyrillic, han as `cjk`);
    1 for a text without letters."""
    names = tuple(script.upper() for script in scripts)
    letters = [c for c in text if c.isalpha()]
    inside = sum(unicodedata.name(c, "").startswith(names) for c in letters)
    return inside / len(letters) if letters else 1.0


def _import(package: str, where: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise UsageError(f"this needs the package {package}", where=where, hint=f"pip install {package}") from None
