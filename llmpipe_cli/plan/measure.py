"""A model's profile from its real modules: one forward pass of transformers' own code on the meta device.

The pass runs as it does for the slice plan (`model.slicing.forward`), at two lengths: what grows with the sequence's
square is told from what grows with its length by the two. Every operation is seen by a dispatch mode, which notes
matrix products with their shapes and what other kernels move; what autograd keeps is counted through its hooks for
saved tensors, each storage once. Fused attention is replaced by a stand-in that keeps what fused kernels keep (query,
key, value, result and a number a row), because on meta PyTorch would take the unfused one. Processors have no fused
kernel with dropout: there the unfused one is what runs. Their dropout keeps factors, that of accelerators a mask.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig, PreTrainedModel

from llmpipe_cli.model.auto import example_inputs
from llmpipe_cli.model.skeleton import build_skeleton
from llmpipe_cli.model.slicing.forward import run_forward
from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.model.slicing.recorder import Recorder
from llmpipe_cli.model.slicing.walk import cut_segments
from llmpipe_cli.model.tensor.plans import reason_without_plan
from llmpipe_cli.plan.profile import Attention, ModelProfile, Product, SegmentProfile, Size

logger = logging.getLogger(__name__)
aten = torch.ops.aten

_LENGTHS = (96, 192)  # no size of a model is likely to equal them
_WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FREE = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.detach.default}
_EXPERT_PRODUCTS = {"aten::_grouped_mm", "transformers::grouped_mm_fallback"}
_LOOKUPS = {aten.embedding.default, aten.index_select.default, aten.gather.default}


def measure_profile(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    task: str,
    slice_plan: SlicePlan,
    *,
    dtype: str,
    attn_implementation: str = "auto",
    trainable: Iterable[str] | None = None,
    device: str = "cuda",
) -> ModelProfile:
    """The profile of a model, a segment of its slice plan each.

    Args:
        cls: the model class.
        config: its config.
        task: decides the example inputs.
        slice_plan: how it is cut.
        dtype: fp32, bf16 or fp16.
        attn_implementation: as in the recipe.
        trainable: names of the parameters that learn; None means all.
        device: "cuda" or "cpu": whose kernels keep what.

    Where the forward cannot run without weights, sizes are estimated from the slice plan's operations.
    """
    attention = "sdpa" if attn_implementation.startswith("flash") else attn_implementation
    model = build_skeleton(cls, config, dtype=_DTYPES[dtype], attn_implementation=attention)
    learning = None if trainable is None else set(trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and (learning is None or name in learning))
    limit = _max_length(config)
    short, long = (
        length if limit >= _LENGTHS[1] else max(4, limit // share)
        for length, share in zip(_LENGTHS, (2, 1), strict=True)
    )
    seen: list[list[_Seen]] | None = None
    if slice_plan.num_segments > 1:
        try:
            seen = [
                _watch(model, slice_plan, example_inputs(config, task, 1, length), device) for length in (short, long)
            ]
        except Exception as error:  # model code can fail in any way when values are missing
            logger.info("measuring %s without values failed: %s", cls.__name__, error)
    if seen is None or any(len(one) != slice_plan.num_segments for one in seen):
        return _estimated(slice_plan, model, dtype)
    carried = [slice_plan.carried_elements_per_token(b + 1) * _WIDTHS[dtype] for b in range(slice_plan.num_segments)]
    segments = tuple(
        _fit(slice_plan, index, model, _AtTwoLengths(few, many, short, long), carried[index])
        for index, (few, many) in enumerate(zip(*seen, strict=True))
    )
    divides = reason_without_plan(model) is None and not slice_plan.split  # tensor shards divide whole layers
    divisible = _divisible(config) if divides else ()
    return ModelProfile(_shared(segments), dtype, measured_on=device, divisible=divisible)


@dataclass
class _Seen:
    """What one segment did in one pass."""

    products: list[tuple[int, float, int, int, bool]] = field(default_factory=list)  # `_product` and whether it shares
    attentions: list[tuple[int, int, bool]] = field(default_factory=list)  # heads, head size, causal
    moved_whole: float = 0.0
    moved_cut: float = 0.0
    saved_whole: float = 0.0
    saved_cut: float = 0.0
    largest: float = 0.0
    probabilities: float = 0.0
    kernels: int = 0


class _CostRecorder(Recorder):
    """`Recorder` that also notes what each place costs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.seen: dict[int, _Seen] = defaultdict(_Seen)
        self.hidden = int(getattr(model.config.get_text_config(), "hidden_size", 0) or 0)
        self._kept: dict[int, Any] = {}
        self._factors: dict[int, Any] = {}  # storages that went into products, kept alive so that keys stay unique

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func in _FREE or getattr(func, "is_view", False):
            return result
        seen = self.seen[self.place]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_meta]
        if not outputs:
            return result
        seen.kernels += 1
        if func._schema.name in _EXPERT_PRODUCTS:
            shared = self._is_known_factor(args[0])
            seen.products += [(*product, shared) for product in _expert_products(*args[:2])]
            return result
        if func._overloadpacket in flop_registry:
            product = _product(func, args)
            if product is not None:
                seen.products.append((*product, self._is_known_factor(args[-2])))
                return result
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_meta]
        if func in _LOOKUPS:
            inputs = []
        for tensor in (*outputs, *(tensor for tensor in inputs if not self.is_parameter(tensor))):
            num_bytes = float(tensor.numel() * tensor.element_size())
            if tensor.dim() and tensor.shape[-1] == self.hidden:
                seen.moved_whole += num_bytes
            else:
                seen.moved_cut += num_bytes
        seen.largest = max(seen.largest, *(float(tensor.numel() * tensor.element_size()) for tensor in outputs))
        if func is aten._log_softmax.default:
            seen.probabilities += float(outputs[0].numel() * outputs[0].element_size())
        return result

    def _is_known_factor(self, activations: Tensor) -> bool:
        """Whether a product's left side has been another product's too."""
        storage = activations.untyped_storage()
        known = storage._cdata in self._factors
        self._factors[storage._cdata] = storage
        return known

    def is_parameter(self, tensor: Tensor) -> bool:
        """Whether the tensor is a weight or a view of one."""
        return tensor.untyped_storage()._cdata in self._names

    def keep(self, tensor: Tensor) -> Tensor:
        """Hook: autograd saves `tensor` for the backward pass."""
        storage = tensor.untyped_storage()
        if tensor.is_meta and not self.is_parameter(tensor) and storage._cdata not in self._kept:
            self._kept[storage._cdata] = storage
            num_bytes = float(storage.nbytes())
            seen = self.seen[self.place]
            if tensor.dim() and tensor.shape[-1] == self.hidden:
                seen.saved_whole += num_bytes
            else:
                seen.saved_cut += num_bytes
        return tensor


class _StandIn(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # laid out as the kernels do it, so that merging the heads is a view
        batch, heads, length, _ = query.shape
        result = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        rows = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, rows)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


class _DeviceKernels(TorchFunctionMode):
    """Replaces what a device does in other ways than meta: fused attention by `_StandIn`, dropout by the fused one."""

    def __init__(self, recorder: _CostRecorder, device: str) -> None:
        super().__init__()
        self.recorder, self.device = recorder, device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.dropout and self.device != "cpu":
            return _masked_dropout(*args, **kwargs)
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        query, key, value = (named[name] for name in ("query", "key", "value"))
        unfused = self.device == "cpu" and named.get("dropout_p", 0.0)
        if unfused or not all(tensor.is_meta and tensor.dim() == 4 for tensor in (query, key, value)):
            return func(*args, **kwargs)
        seen = self.recorder.seen[self.recorder.place]
        head_dim = (query.shape[3] + value.shape[3]) // 2  # DeepSeek's scores are wider than its values
        seen.attentions.append((query.shape[1], head_dim, bool(named.get("is_causal"))))
        return _StandIn.apply(query, key, value)


def _masked_dropout(values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`nn.functional.dropout` with the kernel of accelerators, which keeps a mask of a byte an element."""
    if not training or not p or not values.is_meta:
        return nn.functional.dropout(values, p, training, inplace)
    return torch.native_dropout(values, p, True)[0]


def _watch(model: PreTrainedModel, slice_plan: SlicePlan, inputs: dict[str, Tensor], device: str) -> list[_Seen]:
    """What each segment does in one forward pass."""
    recorder = _CostRecorder(model)
    with (
        _DeviceKernels(recorder, device),
        torch.autograd.graph.saved_tensors_hooks(recorder.keep, lambda tensor: tensor),
    ):
        passed = run_forward(model, inputs, recorder, slice_plan.split)
    cuts = cut_segments(passed.calls, slice_plan.starts)
    return [_joined([recorder.seen[place] for place in cut.places]) for cut in cuts]


def _joined(parts: list[_Seen]) -> _Seen:
    if len(parts) == 1:
        return parts[0]
    joined = _Seen(largest=max(part.largest for part in parts), kernels=sum(part.kernels for part in parts))
    for part in parts:
        joined.products += part.products
        joined.attentions += part.attentions
    for name in ("moved_whole", "moved_cut", "saved_whole", "saved_cut", "probabilities"):
        setattr(joined, name, sum(getattr(part, name) for part in parts))
    return joined


def _product(func: Any, args: Any) -> tuple[int, float, int, int] | None:
    """(batch, rows, inner, outer) of a matrix product; None for other counted operations."""
    shapes = [tuple(leaf.shape) for leaf in args if isinstance(leaf, Tensor)]
    name = func._schema.name
    if name == "aten::addmm" or name == "aten::baddbmm":
        shapes = shapes[1:]
    elif name not in ("aten::mm", "aten::bmm"):
        return None
    left, right = shapes[0], shapes[1]
    return (left[0] if len(left) == 3 else 1), float(left[-2]), int(left[-1]), int(right[-1])


@dataclass(frozen=True)
class _AtTwoLengths:
    """What one segment did in a short and in a long pass."""

    few: _Seen
    many: _Seen
    short: int
    long: int

    def parts(self, name: str) -> tuple[float, float]:
        """A number's share a token, and a token and token."""
        at_short, at_long = getattr(self.few, name) / self.short, getattr(self.many, name) / self.long
        squared = max(0.0, (at_long - at_short) / (self.long - self.short))
        return max(0.0, at_long - squared * self.long), squared

    def size(self, prefix: str) -> Size:
        """Bytes, whole and cut."""
        whole, whole_squared = self.parts(f"{prefix}_whole")
        cut, cut_squared = self.parts(f"{prefix}_cut")
        return Size(whole, cut, whole_squared + cut_squared)

    def temporary(self) -> Size:
        """The largest result, or what is needed backward through a cross entropy: the gradient of the
        log-probabilities (in fp32) and, from it, of the logits."""
        largest, probabilities = self.parts("largest"), self.parts("probabilities")
        cut, squared = (max(one, 2 * other) for one, other in zip(largest, probabilities, strict=True))
        return Size(cut=cut, squared=squared)

    def multiplied(self) -> tuple[dict[tuple[int, int, float, bool], float], dict[Attention, float]]:
        """Products with weights, (inner, outer, rows a token, shared), and attentions, each with its count."""
        products: dict[tuple[int, int, float, bool], float] = defaultdict(float)
        attentions: dict[Attention, float] = defaultdict(float)
        for heads, dim, causal in self.many.attentions:
            attentions[Attention(heads, dim, fused=True, causal=causal)] += 1
        same = len(self.few.products) == len(self.many.products)
        earlier = self.few.products if same else self.many.products
        for (batch, rows, inner, outer, shared), before in zip(self.many.products, earlier, strict=True):
            grows = sum(a != b for a, b in zip((rows, inner, outer), before[1:4], strict=True))
            if grows >= 2 or (batch > 1 and self.long in (inner, outer)):  # scores or values: half an attention
                head_dim = outer if inner == self.long else inner  # whichever of the sides is not the sequence
                attentions[Attention(batch, head_dim, fused=False, causal=False)] += 0.5
            else:
                products[inner, outer, batch * rows / self.long, shared] += 1
        return products, attentions


def _expert_products(rows: Tensor, weights: Tensor) -> list[tuple[int, float, int, int]]:
    """`_product` of each expert of a layer, the rows dealt evenly."""
    experts, inner, outer = weights.shape
    return [(1, rows.shape[0] / experts, int(inner), int(outer))] * experts


def _fit(
    slice_plan: SlicePlan, index: int, model: PreTrainedModel, seen: _AtTwoLengths, carried: float
) -> SegmentProfile:
    """One segment's profile from what it did at two lengths."""
    segment = slice_plan.segments[index]
    is_layer = segment.kind == "layer"
    products, attentions = seen.multiplied()
    hidden, width = int(getattr(model.config.get_text_config(), "hidden_size", 0) or 0), _WIDTHS[_name_of(model)]
    carried = carried or hidden * float(width)
    cut, frozen, tied = _parameter_counts(slice_plan, index, model)
    kept = width * sum(rows * outer * count for (_, outer, rows, _), count in products.items())
    kept += sum(count * (width * a.heads * a.head_dim + 4 * a.heads) for a, count in attentions.items() if a.fused)
    return SegmentProfile(
        name=segment.name,
        kind=segment.kind,
        parameters=segment.num_parameters,
        cut_parameters=cut,
        frozen_parameters=frozen,
        products=tuple(
            Product(inner, outer, _cut(inner, outer, hidden, is_layer), rows, count, shared)
            for (inner, outer, rows, shared), count in products.items()
        ),
        attentions=tuple(replace(attention, count=count) for attention, count in attentions.items()),
        traffic=seen.size("moved"),
        saved=seen.size("saved"),
        selective_saved=Size(carried, kept),
        temporary=seen.temporary(),
        carried=carried,
        kernels=seen.many.kernels,
        all_reduces=2.0 if is_layer else 1.0 if segment.kind == "pre" else 0.0,
        tied=tied,
    )


def _name_of(model: PreTrainedModel) -> str:
    return next(name for name, dtype in _DTYPES.items() if dtype == model.dtype)


def _cut(inner: int, outer: int, hidden: int, is_layer: bool) -> Any:
    """How tensor shards divide a product: into the layer by its result, out of it by its input."""
    if not is_layer:
        return "outer" if inner == hidden and outer > hidden else "none"
    return "inner" if outer == hidden and inner >= hidden else "outer"


def _parameter_counts(slice_plan: SlicePlan, index: int, model: PreTrainedModel) -> tuple[int, int, int]:
    """Elements of a segment that tensor shards divide, that do not learn, and that other segments hold too."""
    owners = slice_plan.owners
    cut = frozen = tied = 0
    vocab = getattr(model.config.get_text_config(), "vocab_size", None)
    for name in slice_plan.segments[index].parameters:
        parameter = model.get_parameter(name)
        elements = parameter.numel()
        if parameter.dim() >= 2 and (slice_plan.segments[index].kind == "layer" or parameter.shape[0] == vocab):
            cut += elements
        if not parameter.requires_grad:
            frozen += elements
        if len(owners[name]) > 1:
            tied += elements
    return cut, frozen, tied


def _shared(segments: tuple[SegmentProfile, ...]) -> tuple[SegmentProfile, ...]:
    """The segments, those that differ in name only being one object, so that they are costed once."""
    known: dict[SegmentProfile, SegmentProfile] = {}
    return tuple(known.setdefault(replace(segment, name=segment.kind), segment) for segment in segments)


def _divisible(config: PreTrainedConfig) -> tuple[int, ...]:
    text = config.get_text_config()
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    values = [getattr(text, name, None) for name in names]
    return tuple(value for value in values if isinstance(value, int) and value > 0)


def _max_length(config: PreTrainedConfig) -> int:
    text = config.get_text_config()
    lengths = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx")]
    return max(min((length for length in lengths if isinstance(length, int) and length > 0), default=2**16) - 2, 4)


def _estimated(slice_plan: SlicePlan, model: PreTrainedModel, dtype: str) -> ModelProfile:
    """A profile from operations and parameters alone."""
    width = _WIDTHS[dtype]
    hidden = int(getattr(model.config.get_text_config(), "hidden_size", 0) or 64)
    segments = []
    for index, segment in enumerate(slice_plan.segments):
        side = math.sqrt(segment.flops_per_token / 2) if segment.flops_per_token else 0.0
        cut, frozen, tied = _parameter_counts(slice_plan, index, model)
        attention = segment.flops_per_token_squared / (4 * hidden)
        segments.append(
            SegmentProfile(
                name=segment.name,
                kind=segment.kind,
                parameters=segment.num_parameters,
                cut_parameters=cut,
                frozen_parameters=frozen,
                products=(Product(max(1, round(side)), max(1, round(side))),) if side else (),
                attentions=(Attention(1, hidden, count=attention),) if attention else (),
                traffic=Size(60.0 * hidden * width),
                saved=Size(17.0 * hidden * width),
                temporary=Size(4.0 * hidden * width),
                carried=(slice_plan.carried_elements_per_token(index + 1) or hidden) * width,
                kernels=60,
                all_reduces=2.0 if segment.kind == "layer" else 0.0,
                tied=tied,
            )
        )
    return ModelProfile(tuple(segments), dtype)
