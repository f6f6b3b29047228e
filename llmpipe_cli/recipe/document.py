"""YAML text -> a tree of nodes that know where they were written.

ruamel.yaml turns the text into parse events; this module builds the tree from them itself. Nothing is constructed from
a tag, so a file can name no Python object, and the limits below hold before any memory is spent: a file of a kilobyte
whose anchors would expand to gigabytes, or one that is nested ten thousand levels deep, ends at once with its line.

Scalars follow YAML 1.2: ``3e-4`` is a number, ``yes`` is a text. Digits may be grouped as in ``20_000``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.reader import ReaderError

from llmpipe_cli.errors import UsageError

MAX_BYTES = 256 * 1024  # the longest ready recipe has 3 kB
MAX_DEPTH = 24
MAX_NODES = 20_000  # after every alias is followed
MAX_KEY_CHARS = 200

_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?[0-9][0-9_]*\Z")
_HEX_OCT = re.compile(r"0x[0-9a-fA-F]+\Z|0o[0-7]+\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_INF_NAN = re.compile(r"(?P<inf>[-+]?\.(?:inf|Inf|INF))\Z|\.(?:nan|NaN|NAN)\Z")
_STANDARD_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}


@dataclass(frozen=True)
class Place:
    """Where something was written: `source` is a file as the user named it, or a flag (then `line` is 0)."""

    source: str
    line: int = 0
    column: int = 0
    order: int = 0  # position of the source among all sources of a recipe, so that problems sort in reading order

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source

    def sort_key(self) -> tuple[int, int, int]:
        return (self.order, self.line, self.column)


@dataclass
class Node:
    """A value and its place.

    `value` is a scalar (str, int, float, bool, None), a list of nodes, or a dict of entries.
    """

    value: Any
    place: Place
    in_block: bool = False  # a mapping or list that is indented below its key: its key is then the better place to show
    num_nodes: int = 1
    depth: int = 1

    def is_mapping(self) -> bool:
        return isinstance(self.value, dict)

    def plain(self) -> Any:
        """The value as ordinary dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: entry.node.plain() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


@dataclass
class Entry:
    """One `key: value` of a mapping."""

    key_place: Place
    node: Node

    def place(self) -> Place:
        """The place to show for a wrong value."""
        return self.key_place if self.node.in_block else self.node.place


@dataclass
class _Open:
    """A mapping or list that is being read."""

    node: Node
    anchor: str | None
    key: tuple[str, Place] | None = None
    merged: list[Node] = field(default_factory=list)


class RefusedError(Exception):
    """Reading ends here; the caller adds the problem to those it has."""

    def __init__(self, place: Place, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.place = place
        self.problem = UsageError(message, where=str(place), hint=hint)


def parse_file(path: Path, shown: str, order: int, problems: list[tuple[Place, UsageError]]) -> Node | None:
    """Reads a YAML file; mistakes are added to `problems`.

    Args:
        shown: the file's name in messages.
        order: position of the file among the sources of the recipe.

    Returns:
        the root mapping, or None when the file cannot be read at all.
    """
    try:
        text = _read_text(path, Place(shown, order=order))
        root = parse_text(text, shown, order, problems)
        if root is not None:
            _check_root(root)
        return root
    except RefusedError as refused:
        problems.append((refused.place, refused.problem))
        return None


def _read_text(path: Path, start: Place) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise RefusedError(start, "this is a folder, not a recipe", "name the YAML file in it") from None
    except OSError as error:
        raise RefusedError(start, f"cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        hint = "a recipe names data files; it does not hold the data"
        raise RefusedError(start, f"the file is larger than {MAX_BYTES // 1024} KiB", hint)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        place = Place(start.source, line, column, start.order)
        raise RefusedError(place, "the file is not UTF-8 text", "save the recipe as UTF-8") from None


def _check_root(root: Node) -> None:
    if root.value is None:
        hint = "copy one to start from: llmpipe recipes ls, llmpipe recipes cp NAME"
        raise RefusedError(root.place, "the recipe is empty", hint)
    if not root.is_mapping():
        message = f"expected `key: value` lines, found {describe_value(root)}"
        raise RefusedError(root.place, message, "a recipe begins with `name: ...`; see llmpipe recipes show demo")


def parse_text(
    text: str, shown: str, order: int, problems: list[tuple[Place, UsageError]], *, flag: bool = False
) -> Node | None:
    """Reads YAML text into a tree of nodes.

    Args:
        flag: the text is the value of a command line flag, so that places name `shown` without line and column.

    Returns:
        the root node, or None when the text is not YAML or goes over a limit.
    """
    try:
        return _Builder(shown, order, problems, flag).build(text)
    except RefusedError as refused:
        problems.append((refused.place, refused.problem))
    except MarkedYAMLError as error:
        place = Place(shown, order=order)
        mark = error.problem_mark or error.context_mark
        if mark is not None and not flag:
            place = Place(shown, mark.line + 1, mark.column + 1, order)
        message, hint = _explain_syntax(error)
        problems.append((place, UsageError(message, where=str(place), hint=hint)))
    except ReaderError as error:
        line, column = text.count("\n", 0, error.position) + 1, error.position - text.rfind("\n", 0, error.position)
        place = Place(shown, order=order) if flag else Place(shown, line, column, order)
        message = f"the character U+{ord(text[error.position]):04X} is not allowed in YAML"
        problems.append((place, UsageError(message, where=str(place), hint="delete it")))
    except YAMLError as error:
        problems.append((Place(shown, order=order), UsageError(f"not YAML: {error}", where=shown)))
    return None


def describe_value(node: Node) -> str:
    """A value in words, as messages say what was found."""
    value = node.value
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text '{shorten(value)}'"
    return f"the number {value}"


def shorten(text: str, limit: int = 60) -> str:
    """`text` on one line, cut where messages would become unreadable."""
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    # Escape sequences in a file must not reach the terminal.
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in cut)


class _Builder:
    """Builds one tree from parse events."""

    def __init__(self, shown: str, order: int, problems: list[tuple[Place, UsageError]], flag: bool) -> None:
        self.shown = shown
        self.order = order
        self.problems = problems
        self.flag = flag
        self.anchors: dict[str, Node | None] = {}  # None: the anchor's node is still being read
        self.open: list[_Open] = []
        self.root: Node | None = None

    def build(self, text: str) -> Node:
        num_documents = 0
        for event in _events(text):
            place = self.place(event)
            if isinstance(event, DocumentStartEvent):
                num_documents += 1
                if num_documents > 1:
                    self.refuse(place, "a second document begins here", "keep one recipe a file")
            elif isinstance(event, AliasEvent):
                self.add(self.follow(event.anchor, place), place)
            elif isinstance(event, ScalarEvent):
                self.add_scalar(event, place)
            elif isinstance(event, (MappingStartEvent, SequenceStartEvent)):
                self.check_tag(event.tag, place)
                if len(self.open) >= MAX_DEPTH:
                    self.refuse(place, f"nested more than {MAX_DEPTH} levels deep")
                if event.anchor:
                    self.anchors[event.anchor] = None
                value: Any = {} if isinstance(event, MappingStartEvent) else []
                self.open.append(_Open(Node(value, place, in_block=not event.flow_style), event.anchor))
            elif isinstance(event, (MappingEndEvent, SequenceEndEvent)):
                self.close()
        return self.root if self.root is not None else Node(None, Place(self.shown, 1, 1, self.order))

    def place(self, event: Any) -> Place:
        if self.flag:
            return Place(self.shown, order=self.order)
        return Place(self.shown, event.start_mark.line + 1, event.start_mark.column + 1, self.order)

    def refuse(self, place: Place, message: str, hint: str | None = None) -> NoReturn:
        raise RefusedError(place, message, hint)

    def problem(self, place: Place, message: str, hint: str | None = None) -> None:
        self.problems.append((place, UsageError(message, where=str(place), hint=hint)))

    def check_tag(self, tag: Any, place: Place) -> None:
        if tag is not None and str(tag) not in _STANDARD_TAGS and str(tag) != "!":
            shown = shorten(str(tag).replace("tag:yaml.org,2002:", "!!"))
            self.refuse(place, f"the tag {shown} is not allowed", "write plain values; a recipe builds no objects")

    def follow(self, anchor: str, place: Place) -> Node:
        if anchor not in self.anchors:
            self.refuse(place, f"the anchor &{shorten(anchor)} is not defined above")
        node = self.anchors[anchor]
        if node is None:
            self.refuse(place, f"the anchor &{shorten(anchor)} contains itself")
        return node

    def add_scalar(self, event: ScalarEvent, place: Place) -> None:
        self.check_tag(event.tag, place)
        plain = event.style is None or event.style == ""
        top = self.open[-1] if self.open else None
        if top is not None and isinstance(top.node.value, dict) and top.key is None:
            self.add_key(event.value, place)
            return
        value = self.resolve(event.value, place) if plain and event.tag is None else event.value
        node = Node(value, place)
        if event.anchor:
            self.anchors[event.anchor] = node
        self.add(node, place)

    def add_key(self, key: str, place: Place) -> None:
        if len(key) > MAX_KEY_CHARS:
            self.refuse(place, f"a key of {len(key)} characters: {shorten(key, 40)}")
        self.open[-1].key = (key, place)

    def add(self, node: Node, place: Place) -> None:
        if not self.open:
            self.root = node
            return
        top = self.open[-1]
        if isinstance(top.node.value, dict):
            if top.key is None:
                self.refuse(place, "a key has to be a word, not a mapping or a list")
            (key, key_place), top.key = top.key, None
            if key == "<<":
                self.add_merge(top, node, place)
            elif key in top.node.value:
                first = top.node.value[key].key_place
                at = f"line {first.line}" if first.line else "the same value"
                hint = "keep one of the two; YAML readers that take the last one hide such mistakes"
                self.problem(key_place, f"the key `{shorten(key)}` was already written at {at}", hint)
            else:
                top.node.value[key] = Entry(key_place, node)
        else:
            top.node.value.append(node)
        top.node.num_nodes += node.num_nodes
        top.node.depth = max(top.node.depth, node.depth + 1)
        if top.node.num_nodes > MAX_NODES or top.node.depth + len(self.open) > MAX_DEPTH + 1:
            self.refuse(place, "too large after its anchors are followed", "write the values out")

    def add_merge(self, top: _Open, node: Node, place: Place) -> None:
        sources = node.value if isinstance(node.value, list) else [node]
        for source in sources:
            if not source.is_mapping():
                self.refuse(place, f"`<<` merges mappings, found {describe_value(source)}")
            top.merged.append(source)

    def close(self) -> None:
        done = self.open.pop()
        for source in done.merged:  # keys written beside `<<` win, then earlier sources
            for key, entry in source.value.items():
                done.node.value.setdefault(key, entry)
        if done.anchor:
            self.anchors[done.anchor] = done.node
        self.add(done.node, done.node.place)

    def resolve(self, text: str, place: Place) -> Any:
        """The value of an unquoted scalar."""
        if _NULL.match(text):
            return None
        if _BOOL.match(text):
            return text[0] in "tT"
        if _INT.match(text) or _HEX_OCT.match(text):
            # Every number that a recipe can mean fits 64 bits; very long ones would only cost time.
            if len(text) > 40 or abs(number := int(text, 0 if text[:2] in ("0x", "0o") else 10)) >= 2**63:
                self.problem(place, f"the number {shorten(text, 40)} is too large")
                return 0
            return number
        if _FLOAT.match(text):
            return float(text)
        if match := _INF_NAN.match(text):
            return float(text.replace(".", "")) if match["inf"] else float("nan")
        return text


def _events(text: str) -> Iterator[Any]:
    # `safe` and `pure` choose ruamel's Python parser, without the bookkeeping of comments.
    return iter(YAML(typ="safe", pure=True).parse(text))


_SYNTAX_HINTS = (
    (r"character '\\t'", "indent with spaces, not with tabs"),
    ("mapping values are not allowed", "check the indentation; quote a text that contains ': '"),
    ("expected <block end>", "lines of one section have to begin in the same column"),
    ("could not find expected ':'", "write `key: value`"),
    ("while scanning a quoted scalar", "the closing quote is missing"),
    ("expected ',' or", "a bracket is not closed, or a comma is missing"),
    ("cannot start any token", "quote a text that begins with this character"),
)


def _explain_syntax(error: MarkedYAMLError) -> tuple[str, str | None]:
    problem = " ".join(str(part) for part in (error.context, error.problem) if part)
    hint = next((hint for pattern, hint in _SYNTAX_HINTS if re.search(pattern, problem) or pattern in problem), None)
    return f"not YAML: {shorten(' '.join(problem.split()), 160)}", hint
