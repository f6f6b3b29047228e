"""From a plan to the divided model: which part of each parameter a shard holds, and the communication around layers.

`divide_model` reads names and shapes alone, so that a plan is checked before any rank starts. `install` changes a
stage's own modules: forwards that communicate, and the attributes that count heads.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.skeleton import all_names, replace_parameter
from llmpipe_cli.model.tensor.collectives import TensorGroup
from llmpipe_cli.model.tensor.dropout import adapter_dropout, with_whole_masks
from llmpipe_cli.model.tensor.loss import parallel_loss
from llmpipe_cli.model.tensor.parts import Part, divide, share
from llmpipe_cli.model.tensor.plans import reason_without_plan, styles_of

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_WIDTHS = ("all_head_size", "inner_dim", "split_size")
# Divided projections that make heads of queries (or of all three), and those of keys and values.
_QUERIES = {"q_proj", "query", "q", "q_b_proj", "c_attn", "query_key_value", "qkv_proj", "wq"}
_KEYS = {"k_proj", "v_proj", "key", "value", "k", "v"}
_FUSED = {"query_key_value", "qkv_proj"}
_BY_COLUMN = {"colwise": 1, "packed_colwise": 2, "packed_colwise_3": 3, "colwise_gather_output": 1, "colwise_rep": 1}
_BY_ROW = {"rowwise": 1, "packed_rowwise": 2, "rowwise_split_input": 1, "rowwise_rep": 1}
_GATHERED = {"colwise_gather_output", "colwise_rep"}
_SPLIT = {"rowwise_split_input", "rowwise_rep"}
# Set on a shard's parameters.
PART = "tensor_part"
PARTIAL_GRADIENT = "tensor_partial_gradient"


@dataclass
class Division:
    """How one shard holds a model."""

    parts: dict[str, Part] = field(default_factory=dict)
    """Part of each divided parameter, by its first name; all others are whole."""
    partial: set[str] = field(default_factory=set)
    """Whole parameters of which a shard sees a part of the gradient."""
    styles: dict[str, str] = field(default_factory=dict)
    """Style of each divided module inside the layers."""
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    """New values of attention modules' attributes."""
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Projections that are whole on each shard: the outputs that the shard's heads need."""
    embeddings: tuple[str, ...] = ()
    """Embedding modules whose vocabulary is divided."""
    head: str | None = None
    """The output layer, if its vocabulary is divided."""


def divide_model(model: PreTrainedModel, shard: int, num_shards: int) -> Division:
    """What shard `shard` of `num_shards` holds of a model whose parameters may be on meta.

    Raises:
        UsageError: the type has no plan, or its heads cannot be dealt to so many shards.
    """
    reason = reason_without_plan(model)
    if reason is not None:
        raise UsageError(
            f"{model.config.model_type} cannot be divided over tensor shards: {reason}",
            where="parallel.tensor",
            hint="write tensor: 1, and use parallel.pipeline and parallel.data",
        )
    return _Divider(model, shard, num_shards).divide()


def check_division(model: PreTrainedModel, num_shards: int) -> None:
    """Raise what `divide_model` raises for any of the shards."""
    for shard in range(num_shards):
        divide_model(model, shard, num_shards)


class _Divider:
    def __init__(self, model: PreTrainedModel, shard: int, num_shards: int) -> None:
        self.model, self.shard, self.num_shards = model, shard, num_shards
        self.modules = dict(model.named_modules())
        self.first_names = {alias: names[0] for names in all_names(model).values() for alias in names}
        self.result = Division()

    def divide(self) -> Division:
        styles = styles_of(self.model)
        for name, style in styles.items():
            if name in self.modules:
                self.result.styles[name] = style
                self._divide_module(name, self.modules[name], style)
            else:
                self._divide_parameter(name, style, _BY_COLUMN.get(style) or _BY_ROW.get(style, 1))
        for name, style in styles.items():
            if style == "moe_tp_experts":
                self._check_experts(name)
        for owner in dict.fromkeys(name.rpartition(".")[0] for name, style in styles.items() if style in _BY_COLUMN):
            self._divide_heads(owner)
        self._divide_vocabulary()
        return self.result

    def _divide_module(self, name: str, module: nn.Module, style: str) -> None:
        if style in ("replicated_with_grad_allreduce", "mla_kv_a_proj", "moe_tp_experts", "replicate"):
            if style == "replicated_with_grad_allreduce":
                self.result.partial |= {self.first_names[f"{name}.{key}"] for key, _ in module.named_parameters()}
            return
        if style == "head_table" and isinstance(module, nn.Embedding):
            self._set(f"{name}.weight", 1)
            return
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise self._refusal(f"{name} is a {type(module).__name__}, no linear layer")
        by_column = style in _BY_COLUMN
        self._set(f"{name}.weight", int(by_column == isinstance(module, Conv1D)), _blocks(style))
        if by_column and getattr(module, "bias", None) is not None:
            self._set(f"{name}.bias", 0, _blocks(style))

    def _divide_parameter(self, name: str, style: str, blocks: int) -> None:
        """A matrix that a module holds itself, such as those of all experts [experts, outputs, inputs]."""
        dims = self.model.get_parameter(name).dim()
        if style in _BY_COLUMN:
            self._set(name, dims - 2 if dims > 1 else 0, blocks)
        elif dims > 1 or style == "packed_rowwise":
            self._set(name, -1, blocks)

    def _set(self, name: str, dim: int, blocks: int = 1) -> None:
        parameter = self.model.get_parameter(name)
        part = divide(tuple(parameter.shape), dim, self.shard, self.num_shards, blocks)
        self.result.parts[self.first_names[name]] = part

    def _check_experts(self, name: str) -> None:
        whole = [
            key for key, _ in self.modules[name].named_parameters() if f"{name}.{key}" not in self._divided_names()
        ]
        if whole:
            raise self._refusal(f"its experts have {whole[0]}, which the plan leaves whole")

    def _divided_names(self) -> set[str]:
        return {alias for alias, first in self.first_names.items() if first in self.result.parts}

    # -- heads ---------------------------------------------------------------------------------------------------------

    def _divide_heads(self, owner: str) -> None:
        """An attention module: deal its heads, and set the attributes that count them."""
        leaves = {
            name.rpartition(".")[2]: style
            for name, style in self.result.styles.items()
            if name.rpartition(".")[0] == owner
        }
        queries = [leaf for leaf, style in leaves.items() if leaf in _QUERIES and style not in _GATHERED]
        if not queries:
            return
        module, config = self.modules[owner], self.model.config.get_text_config()
        heads = next((getattr(module, name) for name in _HEADS if hasattr(module, name)), config.num_attention_heads)
        if heads % self.num_shards:
            valid = [count for count in range(1, heads + 1) if heads % count == 0]
            below = max(count for count in valid if count < self.num_shards)
            above = min((count for count in valid if count > self.num_shards), default=None)
            raise UsageError(
                f"num_attention_heads {heads} cannot be dealt evenly to {self.num_shards} tensor shards",
                where="parallel.tensor",
                hint=f"use tensor: {below}" + (f" or {above}" if above is not None else ""),
            )
        local = heads // self.num_shards
        attributes = {name: local for name in _HEADS if hasattr(module, name)}
        for name in _WIDTHS:
            if hasattr(module, name):
                attributes[name] = getattr(module, name) // self.num_shards
        attributes |= self._divide_keys(owner, module, heads, leaves)
        self.result.attributes[owner] = attributes

    def _divide_keys(self, owner: str, module: Any, heads: int, leaves: dict[str, str]) -> dict[str, int]:
        """Key and value heads: divided, or kept whole and taken from where they are fewer than the shards."""
        config = self.model.config.get_text_config()
        known = next((getattr(module, name) for name in _KEY_VALUE_HEADS if hasattr(module, name)), None)
        key_heads = known if known is not None else getattr(config, "num_key_value_heads", None) or heads
        keys = [leaf for leaf in leaves if leaf in _KEYS]
        if "kv_b_proj" in leaves:
            key_heads = heads  # latent attention: one a query head
        if key_heads % self.num_shards == 0:
            return {name: key_heads // self.num_shards for name in _KEY_VALUE_HEADS if hasattr(module, name)}
        local, group = heads // self.num_shards, heads // key_heads
        wanted = [head // group for head in range(self.shard * local, (self.shard + 1) * local)]
        distinct = sorted(set(wanted))
        even = local % len(distinct) == 0
        taken = distinct if even and wanted == [h for h in distinct for _ in range(local // len(distinct))] else wanted
        fused = [leaf for leaf in leaves if leaf in _FUSED]
        if fused and not (key_heads == 1 and getattr(module, "multi_query", False)):
            raise UsageError(
                f"num_kv_heads {key_heads} cannot be dealt evenly to {self.num_shards} tensor shards",
                where="parallel.tensor",
                hint=f"use tensor: {math.gcd(key_heads, self.num_shards)}",
            )
        if fused:  # all queries, then one head of keys and one of values
            size = module.head_dim
            self._take_rows(
                f"{owner}.{fused[0]}", [*range(self.shard * local, (self.shard + 1) * local), heads, heads + 1], size
            )
            return {}
        if not hasattr(module, "num_key_value_groups"):
            raise self._refusal(f"{owner} does not say how many queries share a key head")
        for leaf in keys:
            size = self.model.get_parameter(f"{owner}.{leaf}.weight").shape[0] // key_heads
            self._take_rows(f"{owner}.{leaf}", taken, size)
        attributes = {name: len(taken) for name in _KEY_VALUE_HEADS if hasattr(module, name)}
        return attributes | {"num_key_value_groups": local // len(taken)}

    def _take_rows(self, name: str, heads: Iterable[int], size: int) -> None:
        """Keep a projection whole, and use the outputs of some heads of it."""
        self.result.rows[name] = tuple(row for head in heads for row in range(head * size, (head + 1) * size))
        for key, _ in self.modules[name].named_parameters():
            first = self.first_names[f"{name}.{key}"]
            self.result.parts.pop(first, None)
            self.result.partial.add(first)

    # -- vocabulary ----------------------------------------------------------------------------------------------------

    def _divide_vocabulary(self) -> None:
        """Input embedding and output layer, tied or not, where nothing but such layers uses their weights."""
        head = self.model.get_output_embeddings()
        for layer in (self.model.get_input_embeddings(), head):
            name = next((name for name, module in self.modules.items() if module is layer), None)
            if name is None or name in self.result.styles or not isinstance(layer, (nn.Embedding, nn.Linear)):
                continue
            first = self.first_names[f"{name}.weight"]
            users = [alias.rpartition(".")[0] for alias, own in self.first_names.items() if own == first]
            if not all(isinstance(self.modules[user], nn.Embedding) or self.modules[user] is head for user in users):
                continue
            self._set(f"{name}.weight", 0)
            embeddings = [user for user in users if isinstance(self.modules[user], nn.Embedding)]
            self.result.embeddings = tuple(dict.fromkeys([*self.result.embeddings, *embeddings]))
            if layer is head:
                self.result.head = name
                if getattr(layer, "bias", None) is not None:
                    self._set(f"{name}.bias", 0)

    def _refusal(self, reason: str) -> UsageError:
        return UsageError(
            f"{self.model.config.model_type} cannot be divided over tensor shards: {reason}",
            where="parallel.tensor",
            hint="write tensor: 1, and use parallel.pipeline and parallel.data",
        )


def _blocks(style: str) -> int:
    return _BY_COLUMN[style] if style in _BY_COLUMN else _BY_ROW[style]


def fill_parts(
    model: PreTrainedModel, batches: Iterable[list[str]], division: Division, fill: Callable[[list[str]], object]
) -> None:
    """Give a stage's parameters the shard's parts of the values that `fill` makes.

    Args:
        model: the skeleton, its parameters on meta.
        batches: first names of the stage's parameters; those of one batch are whole in memory at once.
        division: what this shard holds.
        fill: makes whole parameters real.
    """
    names = all_names(model)
    shards: dict[str, nn.Parameter] = {}
    for batch in batches:
        metas = {name: model.get_parameter(name) for name in batch}
        fill(batch)
        for name in batch:
            if name in division.parts:
                whole = model.get_parameter(name)
                shards[name] = nn.Parameter(division.parts[name].take(whole.detach()), whole.requires_grad)
                # Back to meta until all are made: the rules of a module see the shapes that they expect.
                replace_parameter(model, names[name], metas[name])
    for name, shard in shards.items():
        replace_parameter(model, names[name], shard)


def mark(model: PreTrainedModel, division: Division, names: Iterable[str]) -> None:
    """Note on a stage's parameters, which hold the shard's parts, which parts these are.

    DeepSpeed counts parameters with the attribute `model_parallel` on every shard, all others on the first alone.
    """
    for name in names:
        parameter: Any = model.get_parameter(name)
        if name in division.parts:
            setattr(parameter, PART, division.parts[name])
            parameter.model_parallel = True
        if name in division.partial:
            setattr(parameter, PARTIAL_GRADIENT, True)


# -- the stage's modules -----------------------------------------------------------------------------------------------


def install(model: PreTrainedModel, division: Division, group: TensorGroup, *, whole_logits: bool = False) -> None:
    """Let a stage's own modules work on their parts.

    Args:
        model: the stage's skeleton: its own parameters hold the shard's parts, all others are on meta.
        division: what this shard holds.
        group: the shards.
        whole_logits: gather the logits in training too, for a loss that is not the model's own.
    """
    modules = dict(model.named_modules())
    draws = _has_dropout(model.config)
    for name, style in division.styles.items():
        module: Any = modules[name]
        if _is_own(module):
            if style == "mla_kv_a_proj":
                rope_dim = model.config.get_text_config().qk_rope_head_dim
                module.forward = _latent_forward(module.forward, rope_dim, group)
            else:
                module.forward = _layer_forward(module, style, division.rows.get(name), group)
    for name in division.embeddings:
        module = modules[name]
        if _is_own(module):
            module.forward = _embedding_forward(module, group)
    for name, attributes in division.attributes.items():
        module = modules[name]
        if _is_own(module):
            module.forward = _with_local_heads(module, group)
            for key, value in attributes.items():
                setattr(module, key, value)
    if draws:
        for name in dict.fromkeys(name.rpartition(".")[0] for name in division.styles):
            module = modules[name]
            if _is_own(module):
                module.forward = with_whole_masks(module, module.forward, group)
    for module in modules.values():
        if hasattr(module, "lora_dropout") and _is_own(module):
            part = getattr(module.lora_A.weight, PART, None)
            module.lora_dropout.forward = adapter_dropout(module.lora_dropout, part, group)
    if division.head is not None and _is_own(modules[division.head]):
        parallel = not whole_logits and "self.loss_function(" in inspect.getsource(type(model).forward)
        head: Any = modules[division.head]
        if parallel:
            model.loss_function = parallel_loss(model.loss_function, getattr(head.weight, PART), group)
        head.forward = _head_forward(model, head, parallel, group)


def _is_own(module: nn.Module) -> bool:
    return any(not parameter.is_meta for parameter in module.parameters())


def _has_dropout(config: Any) -> bool:
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in config.to_dict().items())


def _layer_forward(module: Any, style: str, rows: tuple[int, ...] | None, group: TensorGroup) -> Callable[..., Any]:
    plain = module.forward
    if rows is not None:
        return _rows_forward(module, rows, group)
    if style in _BY_COLUMN:
        return _column_forward(module, plain, style in _GATHERED, group)
    if style in _BY_ROW:
        return _row_forward(module, plain, style in _SPLIT, group)
    if style == "moe_tp_experts":
        return _experts_forward(plain, group)
    return plain


def _column_forward(module: Any, plain: Callable[..., Any], gathered: bool, group: TensorGroup) -> Callable[..., Any]:
    part: Part = getattr(module.weight, PART)
    if isinstance(module, Conv1D):
        module.nf = part.local_shape[1]
    else:
        module.out_features = part.local_shape[0]

    def forward(inputs: Tensor) -> Tensor:
        result = plain(group.copy(inputs))
        if gathered:
            return group.gather(result, part.shape[part.dim])
        group.region = part
        return result

    return forward


def _row_forward(module: Any, plain: Callable[..., Any], split: bool, group: TensorGroup) -> Callable[..., Any]:
    bias: nn.Parameter | None = module.bias
    if bias is not None:
        # The layer itself adds nothing; found before the parameter, which stays registered.
        module.__dict__["bias"] = torch.zeros_like(bias, requires_grad=False) if isinstance(module, Conv1D) else None
    if isinstance(module, nn.Linear):
        module.in_features = module.weight.shape[1]

    def forward(inputs: Tensor) -> Tensor:
        result = group.reduce(plain(group.split(inputs) if split else inputs))
        group.region = None
        return result if bias is None else result + bias

    return forward


def _rows_forward(module: Any, rows: tuple[int, ...], group: TensorGroup) -> Callable[..., Any]:
    """A projection that is whole on each shard, of which the shard's heads need some outputs."""
    index = torch.tensor(rows, device=module.weight.device)

    def forward(inputs: Tensor) -> Tensor:
        bias, copied = module.bias, group.copy(inputs)
        result = F.linear(copied, module.weight[index], None if bias is None else bias[index])
        return result + module.lora_change(copied)[..., index] if hasattr(module, "lora_change") else result

    return forward


def _experts_forward(plain: Callable[..., Any], group: TensorGroup) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *routing: Any, **kwargs: Any) -> Tensor:
        routing = tuple(_copied(value, group) for value in routing)
        kwargs = {name: _copied(value, group) for name, value in kwargs.items()}
        return group.reduce(plain(group.copy(hidden_states), *routing, **kwargs))

    return forward


def _copied(value: Any, group: TensorGroup) -> Any:
    return group.copy(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _latent_forward(plain: Callable[..., Any], rope_dim: int, group: TensorGroup) -> Callable[..., Any]:
    """A projection whose last `rope_dim` outputs go to all heads directly."""

    def forward(inputs: Tensor) -> Tensor:
        result = plain(inputs)
        latent, positions = result.split([result.shape[-1] - rope_dim, rope_dim], -1)
        return torch.cat([latent, group.copy(positions)], -1)

    return forward


def _embedding_forward(module: Any, group: TensorGroup) -> Callable[..., Any]:
    plain = module.forward
    start, stop = getattr(module.weight, PART).ranges[0]
    module.num_embeddings = stop - start
    padding = module.padding_idx
    if padding is not None:
        module.padding_idx = padding - start if start <= padding < stop else None

    def forward(ids: Tensor) -> Tensor:
        outside = (ids < start) | (ids >= stop)
        vectors = plain((ids - start).masked_fill(outside, 0))
        return group.reduce(vectors.masked_fill(outside.unsqueeze(-1), 0))

    return forward


def _head_forward(model: PreTrainedModel, module: Any, parallel: bool, group: TensorGroup) -> Callable[..., Any]:
    plain = module.forward
    size = getattr(module.weight, PART).shape[0]
    module.out_features = module.weight.shape[0]

    def forward(inputs: Tensor) -> Tensor:
        logits = plain(group.copy(inputs))
        return logits if parallel and model.training and torch.is_grad_enabled() else group.gather(logits, size)

    return forward


def _with_local_heads(module: nn.Module, group: TensorGroup) -> Callable[..., Any]:
    """An attention module's forward that gives it its heads' part of the biases that the model makes for all heads."""
    plain = module.forward
    signature = inspect.signature(plain)
    heads = next((getattr(module, name) for name in _HEADS if hasattr(module, name)), None)
    if heads is None or "alibi" not in signature.parameters:
        return plain
    start, stop = share(heads, group.rank, group.size)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        alibi, mask = bound.arguments.get("alibi"), bound.arguments.get("attention_mask")
        if alibi is not None and alibi.dim() == 3:  # [batch x heads, 1, keys]
            bound.arguments["alibi"] = alibi.unflatten(0, (-1, heads))[:, start:stop].flatten(0, 1)
        elif alibi is not None:  # [batch, heads, 1, keys]
            bound.arguments["alibi"] = alibi[:, start:stop]
        if mask is not None and mask.dim() == 4 and mask.shape[1] == heads > 1:
            bound.arguments["attention_mask"] = mask[:, start:stop]
        return plain(*bound.args, **bound.kwargs)

    return forward
