"""Loads a recipe: file, extended files and ``--set`` values become one checked `Recipe` whose fields know their place.

The way: every file is parsed into a tree of nodes with places (document.py), other tools' names are translated
(names.py), extended files are merged below the file that names them, overrides are laid on top, every leaf is checked
against the schema, and the combinations at last (checks.py). Mistakes are collected all along and raised together, in
reading order, as one `RecipeError`.

    loaded = load_recipe("recipe.yaml", ["train.max_steps=10"], job="train")
    loaded.recipe.train.max_steps       # 10
    loaded.where("train.max_steps")     # "--set train.max_steps=10"
    loaded.where("model.dtype")         # "recipe.yaml:7:10"

Merging: mappings are merged key by key, anything else is replaced, and ``null`` removes what was set below.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from llmpipe_cli.errors import RecipeError, UsageError
from llmpipe_cli.recipe import checks, names
from llmpipe_cli.recipe.builtin import builtin_recipes, find_recipe
from llmpipe_cli.recipe.document import (
    MAX_DEPTH,
    Entry,
    Node,
    Place,
    RefusedError,
    describe_value,
    parse_file,
    parse_text,
    shorten,
)
from llmpipe_cli.recipe.schema import Recipe, Section

MAX_EXTENDS = 8
MAX_PROBLEMS = 40
_FIRST_OVERRIDE = 1000  # places of flags sort after those of all files

Problems = list[tuple[Place, UsageError]]


@dataclass(frozen=True)
class Notice:
    """Something that works, but not as it was written."""

    message: str
    where: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f"\n  hint: {self.hint}" if self.hint else "")


@dataclass
class LoadedRecipe:
    """A checked recipe and where each of its values was written."""

    recipe: Recipe
    path: Path
    """The file as it was found."""
    shown: str
    """The file's name in messages."""
    text: str
    """The file's text, as given."""
    tree: Node
    """The merged values with their places."""
    warnings: list[Notice] = field(default_factory=list)
    lock: dict[str, Any] | None = None
    """The `lock` section of a recipe.lock.yaml: versions and data fingerprints."""

    @property
    def base_dir(self) -> Path:
        """The folder that relative file names are also looked for in."""
        return self.path.parent

    def where(self, dotted: str) -> str:
        """The place of a field: ``file:line:column``, or the flag that set it.

        Args:
            dotted: for example ``train.max_steps``, ``model.config.hidden_size``, ``parallel.partition[0]``. For a
                field that was not written, the place of the innermost section that was.
        """
        return str(_place_of(self.tree, dotted))

    def error(self, dotted: str, message: str, hint: str | None = None) -> UsageError:
        """An error about the value of a field, with its place."""
        return UsageError(message, where=self.where(dotted), hint=hint)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, job: str | None = None) -> LoadedRecipe:
    """Loads and checks a recipe.

    Args:
        path: a YAML file, or the name of a ready recipe (`llmpipe recipes ls`).
        overrides: ``a.b=value`` each, as given to ``--set``; the value is a YAML number, true, false or null, a text,
            or begins with one of ``[ { " '`` and is YAML. ``a.0=value`` sets an entry of a list, ``null`` removes.
        job: "train" or "evaluate" also asks for what that job cannot do without; None checks what is written.

    Raises:
        RecipeError: every mistake, in reading order: files from the named one to the most basic, then overrides.
        UsageError: no such recipe.
    """
    found, shown = find_recipe(path)
    problems: Problems = []
    warnings: list[tuple[Place, Notice]] = []
    tree, lock, whole = _read_files(found, shown, problems, warnings)
    for index, override in enumerate(overrides):
        _apply_override(tree, override, _FIRST_OVERRIDE + index, problems, warnings)
    if problems and not tree.value:
        raise _recipe_error(problems)

    broken: set[str] = set()
    checked = _check_section(tree, Recipe, "", problems, broken, whole=whole)
    recipe = _validate(checked, broken)
    if recipe is not None:
        for finding in checks.check(recipe, job=job, locked=lock is not None):
            if _touches(finding.paths, broken):
                continue
            place = _place_of(tree, finding.paths[0])
            if finding.is_warning:
                warnings.append((place, Notice(finding.message, str(place), finding.hint)))
            else:
                problems.append((place, UsageError(finding.message, where=str(place), hint=finding.hint)))
    if problems:
        raise _recipe_error(problems)
    if recipe is None:  # the checks above and pydantic disagree: a mistake of ours, but still better told than hidden
        recipe = Recipe.model_validate(checked)
    warnings.sort(key=lambda item: item[0].sort_key())
    text = found.read_text(encoding="utf-8-sig")
    return LoadedRecipe(recipe, found, shown, text, tree, [notice for _, notice in warnings], lock)


# ---------------------------------------------------------------------------------------------- files


def _read_files(
    path: Path, shown: str, problems: Problems, warnings: list[tuple[Place, Notice]]
) -> tuple[Node, dict[str, Any] | None, bool]:
    """The recipe merged over the files it extends, its `lock` section, and whether all of these files were found."""
    layers: list[Node] = []
    seen: list[Path] = []
    lock: dict[str, Any] | None = None
    whole = True
    while True:
        seen.append(path.resolve())
        root = parse_file(path, shown, len(layers), problems)
        if root is None:
            break
        entries = dict(root.value)
        if len(layers) == 0 and (entry := entries.get("lock")) is not None and entry.node.is_mapping():
            lock = entries.pop("lock").node.plain()
        extends = entries.pop("extends", None)
        root = Node(entries, root.place, in_block=True)
        layers.append(_translate(root, Recipe, "", problems, warnings))
        if extends is None:
            break
        try:
            path, shown = _follow_extends(extends, path, shown, seen)
        except RefusedError as refused:
            problems.append((refused.place, refused.problem))
            whole = False
            break
    merged = Node({}, Place(shown, 1, 1), in_block=True)
    for layer in reversed(layers):
        merged = _merge(merged, layer)
    return merged, lock, whole


def _follow_extends(entry: Entry, path: Path, shown: str, seen: list[Path]) -> tuple[Path, str]:
    """The file that `extends` names, and its name in messages.

    Raises:
        RefusedError: no such file, or a circle.
    """
    place = entry.place()
    target = entry.node.value
    if not isinstance(target, str) or not target:
        message = f"`extends` expects one file name, found {describe_value(entry.node)}"
        raise RefusedError(place, message, "extends: base.yaml")
    base, base_shown = path.parent / target, os.path.normpath(Path(shown).parent / target)
    if not base.exists() and target in builtin_recipes():
        base, base_shown = builtin_recipes()[target], target
    if not base.is_file():
        siblings = [file.name for file in path.parent.glob("*.y*ml") if file != path]
        near = names.nearest(target, [*siblings, *builtin_recipes()])
        hint = f"did you mean {near}?" if near else "the name is relative to the file that names it"
        raise RefusedError(place, f"`extends` names a file that does not exist: {shorten(target)}", hint)
    if base.resolve() in seen:
        circle = " -> ".join(file.name for file in [*seen, base])
        raise RefusedError(place, f"`extends` goes in a circle: {circle}", "remove one of these lines")
    if len(seen) >= MAX_EXTENDS:
        raise RefusedError(place, f"`extends` goes over more than {MAX_EXTENDS} files")
    return base, base_shown


def _translate(
    node: Node, section: type[Section], path: str, problems: Problems, warnings: list[tuple[Place, Notice]]
) -> Node:
    """`node` with other tools' names of fields replaced by ours."""
    if not node.is_mapping():
        return node
    fields = _fields(section)
    accepted = names.ACCEPTED.get(path, {})
    entries: dict[str, Entry] = {}
    for key, entry in node.value.items():
        ours = accepted.get(key) if key not in fields else None
        if ours is not None and (ours in node.value or ours in entries):
            message = f"`{key}` and `{ours}` are the same field"
            problem = UsageError(message, where=str(entry.key_place), hint=f"keep `{ours}`")
            problems.append((entry.key_place, problem))
            continue
        if ours is not None:
            notice = Notice(f"`{key}` is called `{ours}` here", str(entry.key_place), f"write `{ours}`")
            warnings.append((entry.key_place, notice))
        name = ours or key
        inner = _section_of(fields[name]) if name in fields else None
        child = _translate(entry.node, inner, _join(path, name), problems, warnings) if inner else entry.node
        entries[name] = Entry(entry.key_place, child)
    return Node(entries, node.place, node.in_block)


def _merge(below: Node, above: Node) -> Node:
    """`above` laid over `below`; both stay as they are."""
    if not (below.is_mapping() and above.is_mapping()):
        return above
    entries: dict[str, Entry] = dict(below.value)
    for key, entry in above.value.items():
        if key not in entries:
            entries[key] = entry
        elif entry.node.value is None:
            del entries[key]
        else:
            entries[key] = Entry(entry.key_place, _merge(entries[key].node, entry.node))
    return Node(entries, above.place, above.in_block)


# ---------------------------------------------------------------------------------------------- overrides

_SEGMENT = re.compile(r"[^.\[\]=]+")
_PATH = re.compile(r"[^.\[\]=]+(?:\.[^.\[\]=]+|\[\d+\])*\Z")


def _apply_override(
    tree: Node, override: str, order: int, problems: Problems, warnings: list[tuple[Place, Notice]]
) -> None:
    """Sets one value of the merged tree, in place."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    place = Place(f"--set {shorten(' '.join(override.split()), 80)}", order=order)
    try:
        if not equals or not _PATH.match(dotted):
            raise RefusedError(place, "expected `section.field=value`", "for example --set train.max_steps=100")
        segments = _SEGMENT.findall(dotted)
        if segments[0] in ("extends", "lock"):
            message = f"`{segments[0]}` cannot be set on the command line"
            raise RefusedError(place, message, "write it in the recipe")
        if len(segments) > MAX_DEPTH:
            raise RefusedError(place, f"nested more than {MAX_DEPTH} levels deep")
        segments = _translate_segments(segments, place, warnings)
        value = _override_value(text, place, problems)
        if value is None:
            return
        node = tree
        for index in range(len(segments) - 1):
            node = _child(node, segments[: index + 1], place)
        _set_child(node, segments, value, place)
    except RefusedError as refused:
        problems.append((refused.place, refused.problem))


def _override_value(text: str, place: Place, problems: Problems) -> Node | None:
    word = text.strip()
    if word[:1] in ("[", "{", '"', "'"):
        return parse_text(word, place.source, place.order, problems, flag=True)
    # A shell word is a scalar: `*.jsonl`, `#1` or `translate to German: ` are texts, whatever YAML would read in them.
    if re.fullmatch(r"[-+.\w~]*", word):
        return parse_text(word or "null", place.source, place.order, problems, flag=True)
    return Node(text, place)


def _translate_segments(segments: list[str], place: Place, warnings: list[tuple[Place, Notice]]) -> list[str]:
    translated: list[str] = []
    section: type[Section] | None = Recipe
    for segment in segments:
        if section is not None and segment not in _fields(section):
            ours = names.ACCEPTED.get(".".join(translated), {}).get(segment)
            if ours is not None:
                warnings.append((place, Notice(f"`{segment}` is called `{ours}` here", str(place), f"write `{ours}`")))
                segment = ours
        translated.append(segment)
        section = _section_of(_fields(section)[segment]) if section and segment in _fields(section) else None
    return translated


def _child(node: Node, segments: list[str], place: Place) -> Node:
    """The mapping or list at `segments`, the last of which is below `node`; made when nothing was written there."""
    segment = segments[-1]
    index = _index(node, segments, place) if isinstance(node.value, list) else 0
    if isinstance(node.value, list):
        child: Node = node.value[index] if index < len(node.value) else Node(None, place)
    else:
        child = node.value[segment].node if segment in node.value else Node(None, place)
    if child.value is None:
        child = Node({}, place, in_block=True)
    elif isinstance(child.value, (dict, list)):
        # A copy: other uses of the same YAML anchor keep theirs.
        child = Node(type(child.value)(child.value), child.place, child.in_block)
    else:
        dotted = ".".join(segments)
        message = f"`{dotted}` is {describe_value(child)} and has no fields"
        raise RefusedError(place, message, f"set it whole: --set {dotted}=...")
    if isinstance(node.value, list):
        node.value[index : index + 1] = [child]
    else:
        entry = node.value.get(segment)
        node.value[segment] = Entry(entry.key_place if entry else place, child)
    return child


def _set_child(node: Node, segments: list[str], value: Node, place: Place) -> None:
    last = segments[-1]
    if isinstance(node.value, list):
        index = _index(node, segments, place)
        node.value[index : index + 1] = [] if value.value is None else [value]
    elif value.value is None:
        node.value.pop(last, None)
    elif last in node.value:
        node.value[last] = Entry(place, _merge(node.value[last].node, value))
    else:
        node.value[last] = Entry(place, value)


def _index(node: Node, segments: list[str], place: Place) -> int:
    *parents, segment = segments
    length = len(node.value)
    if not segment.isdecimal() or len(segment) > 6 or int(segment) > length:
        parent = ".".join(parents)
        message = f"`{parent}` is a list of {length}; `{shorten(segment)}` is not one of its places"
        raise RefusedError(place, message, f"the first is {parent}.0; {parent}.{length} adds one")
    return int(segment)


# ---------------------------------------------------------------------------------------------- single values


@cache
def _fields(section: type[Section]) -> dict[str, FieldInfo]:
    """Fields of a section by the name that recipes write."""
    return {info.alias or name: info for name, info in section.model_fields.items()}


def _section_of(info: FieldInfo) -> type[Section] | None:
    """The section a field holds, also when it may hold something else besides."""
    for annotation in (info.annotation, *get_args(info.annotation)):
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return annotation
    return None


def _item_section(info: FieldInfo) -> type[Section] | None:
    """The section that each item of a list holds."""
    for annotation in (info.annotation, *get_args(info.annotation)):
        for item in get_args(annotation) if get_origin(annotation) is list else ():
            if isinstance(item, type) and issubclass(item, Section):
                return item
    return None


def _is_list_of_mappings(node: Node) -> bool:
    return isinstance(node.value, list) and all(item.is_mapping() for item in node.value)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _check_section(
    node: Node, section: type[Section], path: str, problems: Problems, broken: set[str], *, whole: bool = True
) -> dict:
    """The plain values of a section without the wrong ones, whose paths are added to `broken`.

    What is missing is no mistake of a section that is not `whole`: it may be in a file that was not found.
    """
    fields = _fields(section)
    plain: dict[str, Any] = {}
    for key, entry in node.value.items():
        dotted = _join(path, key)
        if key not in fields:
            broken.add(dotted)
            if len(problems) < 10 * MAX_PROBLEMS:  # the rest is not shown, and finding what was meant takes time
                problems.append((entry.key_place, _unknown_key(key, path, section, entry)))
            continue
        inner = _section_of(fields[key])
        if inner is not None and entry.node.is_mapping():
            plain[key] = _check_section(entry.node, inner, dotted, problems, broken)
        elif (each := _item_section(fields[key])) is not None and _is_list_of_mappings(entry.node):
            plain[key] = [
                _check_section(item, each, f"{dotted}.{index}", problems, broken)
                for index, item in enumerate(entry.node.value)
            ]
        elif inner is not None and entry.node.value is None and not _allows_none(fields[key]):
            plain[key] = {}  # `train:` with nothing below it yet
        elif problem := _check_value(entry, fields[key], dotted):
            broken.add(dotted)
            problems.append(problem)
        else:
            plain[key] = entry.node.plain()
    for key, info in fields.items():
        if info.is_required() and key not in node.value:
            broken.add(_join(path, key))
            if not whole:
                continue
            hint = {
                "name": "name: my-run",
                "model": "model: {from: gpt2}, or model: {config: {model_type: gpt2, ...}}",
                "tokenizer.train": "tokenizer: {train: {vocab_size: 8000}}",
            }.get(_join(path, key))
            message = f"`{path}` needs the field `{key}`" if path else f"the recipe needs the field `{key}`"
            problems.append((node.place, UsageError(message, where=str(node.place), hint=hint)))
    return plain


def _allows_none(info: FieldInfo) -> bool:
    return type(None) in get_args(info.annotation)


@cache
def _adapter(section_field: tuple[Any, ...]) -> TypeAdapter[Any]:
    annotation, *metadata = section_field
    return TypeAdapter(Annotated[annotation, *metadata] if metadata else annotation)


def _type_adapter(info: FieldInfo) -> TypeAdapter[Any]:
    try:
        return _adapter((info.annotation, *info.metadata))
    except TypeError:  # metadata that cannot be hashed
        return _adapter.__wrapped__((info.annotation, *info.metadata))


def _check_value(entry: Entry, info: FieldInfo, dotted: str) -> tuple[Place, UsageError] | None:
    node = entry.node
    value = node.plain()
    place = entry.place()
    adapter = _type_adapter(info)
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError as error:
        words = _expected(adapter, _section_of(info))
        if isinstance(node.value, list) and "a list of " in words:
            # Point at the first wrong item where the list as such is right.
            indices = [part for item in error.errors() for part in item["loc"] if isinstance(part, int)]
            if indices and indices[0] < len(node.value):
                node = node.value[indices[0]]
                place = node.place
                words = words.partition("a list of ")[2].removesuffix(" or auto")
                for singular, plural in _PLURALS:
                    words = words.replace(plural, singular)
        message = f"`{dotted}` expects {words}, found {describe_value(node)}"
        return place, UsageError(message, where=str(place), hint=_value_hint(dotted, node, words, info))
    if isinstance(value, float) and not math.isfinite(value):
        return place, UsageError(f"`{dotted}` expects a finite number, found {value}", where=str(place))
    return None


def _unknown_key(key: str, path: str, section: type[Section], entry: Entry) -> UsageError:
    """The error for a key that no field has: where it belongs, or what was meant."""
    place = entry.key_place
    on_command_line = place.line == 0
    shown = shorten(key)
    at = f"`{path}` has no field `{shown}`" if path else f"a recipe has no field `{shown}`"
    elsewhere = names.ELSEWHERE.get(key)
    sections = [dotted for dotted in _all_fields() if dotted.rpartition(".")[2] == key]
    top_level = path == ""
    if key in _fields(section):  # pragma: no cover - callers ask about unknown keys only
        raise AssertionError(key)
    near = names.nearest(key, [*_fields(section), *names.ACCEPTED.get(path, {})])
    near = names.ACCEPTED.get(path, {}).get(near, near) if near else None
    if key in names.NOT_HERE and not (key in ("name", "path", "type") and not path.startswith("data.")):
        return UsageError(at, where=str(place), hint=names.NOT_HERE[key])
    if elsewhere is None and not sections:
        accepted = [
            _join(where, ours) for where, table in names.ACCEPTED.items() for k, ours in table.items() if k == key
        ]
        elsewhere = accepted[0] if accepted and not accepted[0].startswith("data.validation") else None
    target = elsewhere or (sections[0] if sections and (top_level or near is None) else None)
    if target is not None:
        return UsageError(at, where=str(place), hint=_write_it_at(target, key, on_command_line))
    if near is not None:
        return UsageError(at, where=str(place), hint=f"did you mean `{near}`?")
    deeper = names.nearest(key, [dotted.rpartition(".")[2] for dotted in _all_fields()])
    if deeper is not None:
        dotted = next(dotted for dotted in _all_fields() if dotted.rpartition(".")[2] == deeper)
        return UsageError(at, where=str(place), hint=f"did you mean `{dotted}`?")
    return UsageError(at, where=str(place), hint=f"its fields are {', '.join(_fields(section))}")


def _write_it_at(target: str, key: str, on_command_line: bool) -> str:
    if on_command_line:
        return f"write --set {target}=..."
    parent, _, last = target.rpartition(".")
    under = f" under {parent}:" if parent else " at the top level"
    return f"write it{under}" if last == key else f"write `{last}`{under}"


@cache
def _all_fields() -> tuple[str, ...]:
    """Dotted names of all fields of a recipe, outer ones first."""
    found: list[str] = []

    def walk(section: type[Section], path: str) -> None:
        for key, info in _fields(section).items():
            found.append(_join(path, key))
            inner = _section_of(info)
            if inner is not None:
                walk(inner, _join(path, key))

    walk(Recipe, "")
    return tuple(sorted(found, key=lambda dotted: dotted.count(".")))


# ---------------------------------------------------------------------------------------------- words


def _expected(adapter: TypeAdapter[Any], section: type[Section] | None) -> str:
    schema = adapter.json_schema()
    if section is not None and schema.get("type") == "object":
        return "a mapping"
    return _words(schema)


_PLURALS = (("a text", "texts"), ("a whole number", "whole numbers"))


def _words(schema: dict[str, Any]) -> str:
    """A JSON schema in words, as far as the recipe's fields need them."""
    if "anyOf" in schema:
        parts = [_words(part) for part in schema["anyOf"] if part.get("type") != "null"]
        if parts == ["a text", "a list of texts"]:
            return "a text or a list of texts"
        return _one_of(
            [choice for part in parts for choice in (re.split(r", | or ", part) if len(part) < 40 else [part])]
        )
    if "$ref" in schema or schema.get("type") == "object":
        return "a mapping"
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return _one_of([str(choice) for choice in schema["enum"]])
    kind = schema.get("type")
    if kind == "array":
        items = _words(schema["items"])
        for singular, plural in _PLURALS:
            items = items.replace(singular, plural)
        return f"a list of {items}"
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _range(schema)
    if kind == "boolean":
        return "true or false"
    if "pattern" in schema:
        return "a name of letters, digits, '.', '_' and '-'"
    return "a text"


def _one_of(choices: list[str]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"


def _range(schema: dict[str, Any]) -> str:
    parts = []
    if "minimum" in schema:
        parts.append(f"of at least {schema['minimum']:g}")
    if "exclusiveMinimum" in schema:
        parts.append(f"above {schema['exclusiveMinimum']:g}")
    if "maximum" in schema and schema["maximum"] < 2**62:
        parts.append(f"of at most {schema['maximum']:g}")
    if "exclusiveMaximum" in schema and schema["exclusiveMaximum"] < 2**62:
        parts.append(f"below {schema['exclusiveMaximum']:g}")
    return f" {' and '.join(parts)}" if parts else ""


_COMPRESSED = (
    "write adamw: compressed optimizers keep an exchange between replicas of their own, which pipelines do not call, "
    "and DeepSpeed has dropped them; for slow links between stages write wire_dtype: bf16 under parallel:"
)
_ZERO_2 = (
    "write 0 or 1: a pipeline adds up gradients over many micro-batches, and ZeRO 2 and 3 would have to exchange them "
    "for each one"
)


def _value_hint(dotted: str, node: Node, words: str, info: FieldInfo) -> str | None:
    value = node.value
    last = dotted.rpartition(".")[2]
    if dotted == "parallel.zero_stage" and value in (2, 3):
        return _ZERO_2
    if dotted == "parallel.activation_checkpointing" and isinstance(value, bool):
        return "write full, selective or none"
    if isinstance(value, str):
        ours = names.VALUES.get(dotted, {}).get(value.lower())
        if ours is not None:
            return f"write {ours}"
        if dotted == "train.optimizer" and value.lower() in names.COMPRESSED_OPTIMIZERS:
            return _COMPRESSED
        if words == "true or false" and value.lower() in ("yes", "on", "y", "no", "off", "n"):
            return f"write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
        if "number" in words and re.fullmatch(r"\s*[-+]?[\d_.]+(e[-+]?\d+)?\s*", value, re.IGNORECASE):
            return f"leave the quotes out: {last}: {value.strip()}"
        if value.lower() in ("none", "null") and (_allows_none(info) or words.startswith("a list")):
            return "leave the line out"
        if words.startswith("a list of") and not words.endswith("auto"):
            return f"write a list: {last}: [{shorten(value)}]"
        near = names.nearest(value, re.findall(r"[a-z0-9][a-z0-9-]*(?:_[a-z0-9]+)*", words))
        if near is not None and near not in ("one", "of", "list", "text", "number", "whole", "a", "or", "name"):
            return f"did you mean {near}?"
    if isinstance(value, float) and "whole number" in words and math.isfinite(value) and value == int(value):
        return f"write {int(value)}"
    if isinstance(value, (int, float)) and words.startswith(("a text", "a name")) and not isinstance(value, bool):
        return f'put it in quotes: {last}: "{value}"'
    if isinstance(value, int) and not isinstance(value, bool) and words.startswith("a list"):
        return f"write a list: {last}: [{value}]"
    if value is None:
        return "write a value, or leave the line out"
    examples = {
        "train.early_stopping": "early_stopping: {metric: loss, patience: 3}",
        "tokenizer": "tokenizer: gpt2, or tokenizer: {train: {vocab_size: 8000}}",
        "model": "model: {from: gpt2}",
        "model.config": "config: {model_type: gpt2, ...}",
        "data.train": 'train: {files: "corpus/*.txt"}',
        "data.validation": "validation: {fraction: 0.02}",
    }
    if dotted in examples:
        return examples[dotted]
    if (section := _section_of(info)) is not None:
        return f"its fields are {', '.join(_fields(section))}"
    return " ".join(info.description.split()) if info.description else None


# ---------------------------------------------------------------------------------------------- helpers


def _validate(plain: dict[str, Any], broken: set[str]) -> Recipe | None:
    """The recipe; wrong or missing required values are stood in for, so that the rest can be checked together."""
    stand_in = dict(plain)
    if "name" in broken:
        stand_in["name"] = "recipe"
    if "model" in broken:
        stand_in["model"] = {}
    if "tokenizer.train" in broken:
        stand_in.pop("tokenizer", None)
    try:
        return Recipe.model_validate(stand_in)
    except ValidationError:
        return None


def _touches(paths: Sequence[str], broken: set[str]) -> bool:
    return any(
        path == other or path.startswith(f"{other}.") or other.startswith(f"{path}.")
        for path in paths
        for other in broken
    )


def _place_of(tree: Node, dotted: str) -> Place:
    node, place = tree, tree.place
    for segment in _SEGMENT.findall(dotted):
        if isinstance(node.value, dict) and segment in node.value:
            entry = node.value[segment]
            node, place = entry.node, entry.place()
        elif isinstance(node.value, list) and segment.isdecimal() and int(segment) < len(node.value):
            node = node.value[int(segment)]
            place = node.place
        else:
            break
    return place


def _recipe_error(problems: Problems) -> RecipeError:
    ordered = [problem for _, problem in sorted(problems, key=lambda item: item[0].sort_key())]
    if len(ordered) > MAX_PROBLEMS:
        more = len(ordered) - MAX_PROBLEMS
        ordered = [*ordered[:MAX_PROBLEMS], UsageError(f"and {more} more problems")]
    return RecipeError(ordered)
