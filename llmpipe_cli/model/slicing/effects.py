"""What a layer call leaves behind besides its result, for later layers or for the loss.

Two kinds exist in transformers. A layer may put tensors into a mapping that it is given: Gemma's layers share keys and
values through `shared_kv_states`. And transformers' output collector keeps values from inside layers: router logits for
the auxiliary loss of a mixture of experts. Both are addressed like a part of the call's result, by a path that begins
with a name of its own: ``("@argument", 1, "shared_kv_states", "full_attention", 0)`` or
``("@captured", "router_logits", 0)``, the last number counting from the call's first captured value.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import Tensor
from transformers.utils import output_capturing

from llmpipe_cli.model.slicing.structure import CallArguments, Path, get_at

ARGUMENT = "@argument"
CAPTURED = "@captured"

Marks = tuple[dict[Path, dict[Any, Any]], dict[str, int]]
"""State before a call: the entries of the mappings among its arguments, and the lengths of the collector's lists."""


def is_effect(path: Path) -> bool:
    """Whether a path leads to an effect, and not into a call's result."""
    return bool(path) and path[0] in (ARGUMENT, CAPTURED)


def mark(arguments: CallArguments) -> Marks:
    """The state before a call."""
    return {path: dict(mapping) for path, mapping in _mappings(arguments)}, captured_lengths()


def captured_lengths() -> dict[str, int]:
    """Number of values that transformers' output collector holds, by what is collected."""
    return {name: len(values) for name, values in _collected().items()}


def effects_since(before: Marks, arguments: CallArguments) -> dict[Path, Any]:
    """What a call has left behind, by path: tensors, or tuples of them."""
    entries, lengths = before
    effects: dict[Path, Any] = {}
    for path, mapping in _mappings(arguments):
        known = entries.get(path, {})
        for key, value in mapping.items():
            if key not in known or known[key] is not value:
                effects[ARGUMENT, *path, key] = value
    for name, values in _collected().items():
        for number, value in enumerate(values[lengths.get(name, 0) :]):
            effects[CAPTURED, name, number] = value
    return effects


def read_effect(path: Path, arguments: CallArguments, lengths: dict[str, int]) -> Tensor:
    """The tensor at an effect's path after a call; `lengths` are those of before the call."""
    if path[0] == ARGUMENT:
        return get_at(arguments, path[1:])
    return get_at(_collected()[str(path[1])], (lengths[str(path[1])] + int(path[2]), *path[3:]))


def leave_effect(path: Path, value: Any, arguments: CallArguments) -> None:
    """Leave `value` behind as if a call had; captured values must be left in their order."""
    if path[0] == ARGUMENT:
        get_at(arguments, path[1:-1])[path[-1]] = value
    else:
        _collected()[str(path[1])].append(value)


def _mappings(arguments: CallArguments) -> Iterator[tuple[Path, MutableMapping[Any, Any]]]:
    args, kwargs = arguments
    for index, value in enumerate(args):
        if isinstance(value, MutableMapping):
            yield (0, index), value
    for name, value in kwargs.items():
        if isinstance(value, MutableMapping):
            yield (1, name), value


def _collected() -> dict[str, list[Any]]:
    collector = output_capturing._active_collector.get() or {}
    return {name: values for name, values in collector.items() if isinstance(values, list)}
