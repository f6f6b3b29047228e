"""Watching one forward pass: which parameters each part uses, what depends on parameters, how much is computed.

`Recorder` is a dispatch mode, so it sees every single operation. It works on a model whose parameters are real and on
one whose parameters are on the meta device. In the second case it lets the two kinds mix: operations that touch a meta
tensor run on meta, everything that follows from the inputs alone (masks, positions) stays real, so that a model may
look into its masks although it has no weights. An operation whose result depends on values that are not there
(`nonzero`, `item`) is given stand-in values: true for masks, zero for the rest.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def _grouped_products(rows: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    """Operations of a product in which every row meets one of several matrices."""
    return 2 * rows.shape[0] * weights.shape[-2] * weights.shape[-1]


def _attention_products(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Queries times keys and scores times values, of every query head. (torch's own count refuses grouped heads in 2.11
    and takes them in 2.13.)"""
    batch, heads, num_queries, size = query.shape
    return 2 * batch * heads * num_queries * key.shape[2] * (size + value.shape[3])


_MORE_COUNTS = {
    "aten::_grouped_mm": _grouped_products,
    "transformers::grouped_mm_fallback": _grouped_products,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention_products,
}

_FILLED_LIKE = {
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
}
_MAX_STAND_IN_ELEMENTS = 2**24


def _grouped_result(rows: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[-1])


def _histogram_result(values: Tensor, bins: int = 100, *args: Any, **kwargs: Any) -> Tensor:
    return values.new_empty(bins)


_META_RESULTS = {"aten::_grouped_mm": _grouped_result, "aten::histc": _histogram_result}
"""Results on meta of operations whose own rules for meta tensors accept fewer dtypes than the operations do."""


class Recorder(TorchDispatchMode):
    """Record one forward pass of `model`.

    `place` is set by the caller while the pass runs and says which part of the model is running.

    Attributes:
        uses: places in which each parameter (by first name) was used.
        flops: floating-point operations by place.
        random: whether an operation drew random numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.place = 0
        self.uses: dict[str, set[int]] = defaultdict(set)
        self.flops: dict[int, float] = defaultdict(float)
        self.random = False
        self._names = {_storage_key(parameter): name for name, parameter in model.named_parameters()}
        self._derived: dict[int, Any] = {}  # storages computed from parameters, kept alive so that keys stay unique

    def depends_on_parameters(self, tensor: Tensor) -> bool:
        """Whether the tensor was computed from parameters, and not from the inputs alone."""
        key = _storage_key(tensor)
        return key in self._derived or key in self._names

    def forget(self, tensor: Tensor) -> None:
        """Take a tensor as computed from the inputs alone."""
        self._derived.pop(_storage_key(tensor), None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            name = self._names.get(_storage_key(tensor))
            if name is not None:
                self.uses[name].add(self.place)
        derived = func not in _FILLED_LIKE and any(self.depends_on_parameters(tensor) for tensor in tensors)
        result = _run(func, args, kwargs, tensors)
        if derived:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._derived[_storage_key(leaf)] = leaf.untyped_storage()
        self.random = self.random or draws_numbers(func, args, kwargs)
        count: Any = flop_registry.get(func._overloadpacket) or _MORE_COUNTS.get(func._schema.name)
        if count is not None:
            self.flops[self.place] += count(*args, **kwargs, out_val=result)
        return result


def draws_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation draws random numbers; fused attention does so only where it drops probabilities."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return bool(args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value))
    return True


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _run(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
    """Run one operation whose tensors may be real or on meta."""
    some_meta = any(tensor.is_meta for tensor in tensors)
    if not some_meta:
        return func(*args, **_without_meta_device(kwargs))
    if func in _FILLED_LIKE:
        shape = args[0].shape
        return func(torch.empty((), dtype=args[0].dtype).expand(shape), *args[1:], **_without_meta_device(kwargs))
    device = kwargs.get("device")
    if device is not None and torch.device(device).type != "meta":
        kwargs = {**kwargs, "device": torch.device("meta")}
    meta_args, meta_kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
    try:
        result = _META_RESULTS.get(func._schema.name, func)(*meta_args, **meta_kwargs)
    except (NotImplementedError, RuntimeError):
        stand_args, stand_kwargs = tree_map_only(Tensor, _stand_in, (args, _without_meta_device(kwargs)))
        return func(*stand_args, **stand_kwargs)
    return _keep_inplace_target(func, args, result)


def _keep_inplace_target(func: Any, args: Any, result: Any) -> Any:
    """An operation in place returns its own first argument, also where that is real and the rest was on meta."""
    if func._schema.is_mutable and args and isinstance(args[0], Tensor) and not args[0].is_meta:
        return args[0]
    return result


def _without_meta_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "meta":
        return {**kwargs, "device": torch.device("cpu")}
    return kwargs


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to("meta")


def _stand_in(tensor: Tensor) -> Tensor:
    """Real values for a meta tensor in an operation that cannot do without."""
    if not tensor.is_meta:
        return tensor
    if tensor.numel() > _MAX_STAND_IN_ELEMENTS:
        raise NotImplementedError("an operation on a large tensor depends on the values of the weights")
    if tensor.dtype is torch.bool:
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


class AttentionOnMeta(TorchFunctionMode):
    """Lets fused attention mix real and meta tensors; it compares their devices before any dispatch mode sees it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and any(
            isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))
        ):
            args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
        return func(*args, **kwargs)


class PlaceClock:
    """Tells in which place of a forward pass a node of the autograd graph was made.

    Nodes carry a number that grows with their creation. The clock notes the number at every change of place.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._places: list[int] = []

    def now(self) -> int:
        """The number that the next node will exceed."""
        with torch.enable_grad():
            tick = torch.zeros((), device="cpu", requires_grad=True).mul(1).grad_fn
        assert tick is not None
        return tick._sequence_nr()

    def enter(self, place: int) -> None:
        """From now on nodes belong to `place`."""
        self._starts.append(self.now())
        self._places.append(place)

    def place_of(self, node: Any) -> int:
        """Place in which `node` was made."""
        index = bisect.bisect_right(self._starts, node._sequence_nr()) - 1
        return self._places[max(index, 0)]
