"""Where tensors sit in the arguments and results of a call, and how to build a result of the same form.

A *path* is a tuple of keys and indices that leads from a nest of tuples, lists and dicts to one tensor. The arguments
of a call are taken as the nest ``(args, kwargs)``, so ``(0, 2)`` is the third positional argument and
``(1, "position_bias")`` a keyword argument. A *template* is a JSON value that describes a nest without its tensors.
Addressing single tensors by path keeps the slicer from flattening every argument of every layer at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llmpipe_cli.errors import UsageError

Path = tuple[str | int, ...]
CallArguments = tuple[tuple[Any, ...], dict[str, Any]]


def walk_tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """All tensors of a nest of tuples, lists and dicts, with their paths, in order; other objects are not entered."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from walk_tensors(item, (*path, key))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from walk_tensors(item, (*path, index))


def get_at(value: Any, path: Path) -> Any:
    """The item at `path`; KeyError or IndexError when the nest has another form."""
    for step in path:
        value = value[step]
    return value


def put_at(value: Any, path: Path, item: Any) -> Any:
    """A copy of the nest with `item` at `path`; only the containers along the path are copied."""
    if not path:
        return item
    step, rest = path[0], path[1:]
    replaced = put_at(value[step], rest, item)
    if isinstance(value, dict):
        changed = value.copy()
        changed[step] = replaced
        return changed
    items = list(value)
    items[int(step)] = replaced
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def describe_result(value: Any, arguments: CallArguments, where: str) -> Any:
    """Template of a layer's result.

    A tensor is described by the argument with the same shape and dtype, where there is one, so that a stand-in of the
    right size can be made for any batch.

    Raises:
        UsageError: the result holds an object that cannot be rebuilt.
    """
    if isinstance(value, Tensor):
        for path, tensor in walk_tensors(arguments):
            if tensor.shape == value.shape and tensor.dtype == value.dtype:
                return {"tensor": str(value.dtype).removeprefix("torch."), "like": list(path)}
        return {"tensor": str(value.dtype).removeprefix("torch."), "like": None}
    if isinstance(value, dict) and type(value) is dict:
        return {"dict": {key: describe_result(item, arguments, where) for key, item in value.items()}}
    if type(value) in (tuple, list):
        return {type(value).__name__: [describe_result(item, arguments, where) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise UsageError(f"{where} returns a {type(value).__name__}, which cannot be rebuilt on another stage")


def build_result(template: Any) -> Callable[[CallArguments, bool], Any]:
    """Turn a template into a function that makes stand-ins.

    The function takes the call's arguments and `fresh`. With `fresh` every tensor is newly made zeros; without, the
    argument of the same shape is passed through, which costs nothing.
    """
    if "tensor" in template:
        return _build_tensor(template)
    if "value" in template:
        value = template["value"]
        return lambda arguments, fresh: value
    if "dict" in template:
        items = {key: build_result(item) for key, item in template["dict"].items()}
        return lambda arguments, fresh: {key: item(arguments, fresh) for key, item in items.items()}
    kind = "tuple" if "tuple" in template else "list"
    parts = [build_result(item) for item in template[kind]]
    if kind == "tuple":
        return lambda arguments, fresh: tuple(part(arguments, fresh) for part in parts)
    return lambda arguments, fresh: [part(arguments, fresh) for part in parts]


def _build_tensor(template: dict[str, Any]) -> Callable[[CallArguments, bool], Tensor]:
    dtype = getattr(torch, template["tensor"])
    if template["like"] is None:
        return lambda arguments, fresh: torch.zeros((), dtype=dtype, device=_device_of(arguments))
    path = tuple(template["like"])

    def pass_through(arguments: CallArguments, fresh: bool) -> Tensor:
        source = get_at(arguments, path)
        return torch.zeros_like(source, requires_grad=False) if fresh else source

    return pass_through


def _device_of(arguments: CallArguments) -> torch.device | None:
    for _, tensor in walk_tensors(arguments):
        return tensor.device
    return None
