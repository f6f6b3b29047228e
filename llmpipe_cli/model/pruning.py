"""Smaller and sparser models: neurons, attention heads or single weights removed.

Neurons and heads are taken out of the matrices, which really shrink; the config says the new sizes, and the result is
an ordinary model. Single weights become zeros: nothing shrinks, and what is won depends on who reads them. Each way
removes what is smallest in magnitude, as much in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmpipe_cli.errors import UsageError

_NEURON_MULTIPLE = 8
_SMALLEST_SIDE = 32  # of a matrix whose single weights are pruned: heads of a few labels are left alone
# Query, key, value and output layers of attention, by the names that transformers' models give them.
_ATTENTION_NAMES = (("q_proj", "k_proj", "v_proj", "o_proj"), ("q", "k", "v", "o"))
# Layers into the neurons and the one out of them, by the names that transformers' models give them.
_MLP_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("lin1",), "lin2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
)
_WIDTH_FIELDS = (
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "d_ff",
    "hidden_dim",
)


@dataclass(frozen=True)
class Mlp:
    """One feed-forward block: layers into its neurons, and the layer out of them."""

    name: str
    ins: tuple[nn.Module, ...]
    out: nn.Module

    @property
    def width(self) -> int:
        return rows(self.ins[0]).shape[0]


@dataclass(frozen=True)
class Attention:
    """One attention block: query, key, value and output layers."""

    name: str
    query: nn.Module
    key: nn.Module
    value: nn.Module
    out: nn.Module
    bias: nn.Embedding | None
    """T5's relative position bias, a column a head, which all layers of a stack use."""


def prune_mlp(model: PreTrainedModel, share: float) -> tuple[int, int]:
    """Remove the weakest neurons of every feed-forward layer, in place.

    A neuron's strength is the product of the norms of its weights in and out: what it can add to the layer's result.
    All layers keep the same number, a multiple of 8, as the config has one width for all.

    Args:
        model: changed, its config too.
        share: of the neurons to remove, 0 < share < 1.

    Returns:
        Neurons a layer before and after.

    Raises:
        UsageError: feed-forward layers of a form that is not known, or of different widths.
    """
    kind = model.config.model_type
    blocks = _find_mlps(model)
    widths = {block.width for block in blocks}
    fields = [name for name in _WIDTH_FIELDS if hasattr(model.config, name)]
    if len(widths) != 1 or not fields:
        raise UsageError(
            f"the feed-forward layers of {kind} cannot be pruned",
            hint="known are gated ones (Llama, Qwen, T5 1.1) and plain ones (GPT-2, BERT, OPT, BART, T5)",
        )
    width = widths.pop()
    kept = max(_NEURON_MULTIPLE, round(width * (1 - share) / _NEURON_MULTIPLE) * _NEURON_MULTIPLE)
    if kept >= width:
        raise UsageError(
            f"{share:g} of {width} neurons is less than the {_NEURON_MULTIPLE} that go together",
            hint=f"prune {_NEURON_MULTIPLE / width:.2g} or more of them",
        )
    for block in blocks:
        chosen = _strengths(block).topk(kept).indices.sort().values
        for layer in block.ins:
            _keep(layer, chosen, out=True)
        _keep(block.out, chosen, out=False)
    for name in fields:
        if getattr(model.config, name) in (width, None):
            setattr(model.config, name, kept)
    _check_shapes(model, "feed-forward layers")
    return width, kept


def rows(layer: nn.Module) -> Tensor:
    """A linear layer's weight as [out, in]; GPT-2's Conv1D keeps it the other way around."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(layer, nn.Linear) else weight.T


def _find_mlps(model: PreTrainedModel) -> list[Mlp]:
    """All feed-forward blocks: modules that have layers of the known names, with shapes that fit each other."""
    blocks = []
    for name, module in model.named_modules():
        for ins, out in _MLP_NAMES:
            layers = _layers(module, (*ins, out))
            if not layers:
                continue
            width = rows(layers[0]).shape[0]
            if all(rows(layer).shape[0] == width for layer in layers[:-1]) and rows(layers[-1]).shape[1] == width:
                blocks.append(Mlp(name, tuple(layers[:-1]), layers[-1]))
                break
    return blocks


def _layers(module: nn.Module, paths: Sequence[str]) -> list[nn.Module]:
    """The module's linear layers of these names; none when one of them is missing."""
    found = [layer for path in paths if (layer := _layer(module, path)) is not None]
    return found if len(found) == len(paths) else []


def _layer(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            return None
        module = child
    return module if isinstance(module, nn.Linear | Conv1D) else None


def _strengths(block: Mlp) -> Tensor:
    """[neurons]: norm of the weights in, of all layers together, times the norm of the weights out."""
    with torch.no_grad():
        squares = torch.stack([rows(layer).float().square().sum(1) for layer in block.ins]).sum(0)
        return squares.sqrt() * rows(block.out).float().norm(dim=0)


def _keep(layer: nn.Module, chosen: Tensor, *, out: bool) -> None:
    """Keep some outputs (with their biases) or some inputs of a linear layer."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    # [out, in] in nn.Linear, [in, out] in Conv1D
    dim = (0 if out else 1) if isinstance(layer, nn.Linear) else (1 if out else 0)
    layer.weight = nn.Parameter(weight.detach().index_select(dim, chosen).contiguous())
    if out and isinstance(bias, Tensor):
        layer.bias = nn.Parameter(bias.detach()[chosen].clone())
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif out and isinstance(layer, Conv1D):
        layer.nf = len(chosen)


def prune_heads(model: PreTrainedModel, share: float) -> tuple[int, int]:
    """Remove the weakest attention heads of every layer, in place; save and open the model again to use it.

    A head's strength is the product of the norms of its value and output weights: what it can add to the layer's
    result. Heads that share keys and values go together. All layers keep the same number, as the config has one number
    for all; where layers share a position bias by head, they keep the same heads.

    Args:
        model: changed, its config too.
        share: of the heads to remove, 0 < share < 1.

    Returns:
        Heads a layer before and after.

    Raises:
        UsageError: attention of a form that is not known, a config that has no size of a head, or too small a share.
    """
    config = model.config
    blocks = _find_attention(model)
    num_heads = int(getattr(config, "num_attention_heads", 0) or 0)
    num_groups = int(getattr(config, "num_key_value_heads", None) or num_heads)
    if not blocks or not num_heads or any(not _fits(block, num_heads, num_groups) for block in blocks):
        raise UsageError(
            f"the attention heads of {config.model_type} cannot be removed",
            hint="known are models whose config has the size of a head, such as Llama, Qwen, Mistral, Gemma and T5",
        )
    kept = max(1, round(num_groups * (1 - share)))
    if kept >= num_groups:
        what = "heads" if num_groups == num_heads else "groups of heads with one key and value"
        hint = f"prune {1 / num_groups:.2g} or more of them" if num_groups > 1 else "the last one cannot be removed"
        raise UsageError(f"{share:g} of {num_groups} {what} is less than one", hint=hint)
    head_dim = rows(blocks[0].query).shape[0] // num_heads
    sets = _sharing_a_bias(blocks)
    for members in sets:
        strengths = torch.stack([_group_strengths(block, num_groups) for block in members])
        chosen = (strengths / strengths.sum(1, keepdim=True)).sum(0).topk(kept).indices.sort().values
        for block in members:
            _keep_groups(block, chosen, num_groups)
    config.num_attention_heads = num_heads // num_groups * kept
    if getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = kept
    config.head_dim = head_dim
    _check_shapes(model, "attention heads")
    return num_heads, config.num_attention_heads


def prune_weights(model: PreTrainedModel, share: float) -> tuple[float, float]:
    """Set the weights of smallest magnitude in each linear layer to zero, in place.

    Embeddings, the output layer and matrices with a side below 32 stay as they are.

    Args:
        model: changed.
        share: of each layer's weights, 0 < share < 1.

    Returns:
        Share of zeros among the weights of these layers before and after.

    Raises:
        UsageError: there is no such layer.
    """
    output = model.get_output_embeddings()
    kept = {id(getattr(module, "weight", None)) for module in (output, model.get_input_embeddings())}
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D)
        and min(module.weight.shape) >= _SMALLEST_SIDE
        and id(module.weight) not in kept
    ]
    if not layers:
        raise UsageError(
            f"this {model.config.model_type} model has no linear layers to prune",
            hint=f"pruned are those of at least {_SMALLEST_SIDE} rows and columns whose weights are not shared",
        )
    before = _share_of_zeros(layers)
    for layer in layers:
        prune.l1_unstructured(layer, "weight", amount=share)
        prune.remove(layer, "weight")
    return before, _share_of_zeros(layers)


def _share_of_zeros(layers: list[nn.Linear | Conv1D]) -> float:
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    return zeros / sum(layer.weight.numel() for layer in layers)


def _find_attention(model: PreTrainedModel) -> list[Attention]:
    blocks = []
    for name, module in model.named_modules():
        for names in _ATTENTION_NAMES:
            if layers := _layers(module, names):
                bias = getattr(module, "relative_attention_bias", None)
                query, key, value, out = layers
                table = bias if isinstance(bias, nn.Embedding) else None
                blocks.append(Attention(name, query, key, value, out, table))
                break
    return blocks


def _fits(block: Attention, num_heads: int, num_groups: int) -> bool:
    """Whether the block's shapes are those of so many heads in so many groups."""
    wide, narrow = rows(block.query).shape[0], rows(block.key).shape[0]
    return (
        wide % num_heads == 0
        and num_heads % num_groups == 0
        and narrow == wide // num_heads * num_groups
        and rows(block.value).shape[0] == narrow
        and rows(block.out).shape[1] == wide
    )


def _sharing_a_bias(blocks: list[Attention]) -> list[list[Attention]]:
    """Blocks that have to keep the same heads: those of a stack whose first one holds the position bias of all."""
    stacks: dict[str, list[Attention]] = {}
    for block in blocks:  # encoder.block.3.layer.0.SelfAttention: the stack's name, and the kind of attention
        stacks.setdefault(f"{block.name.partition('.block.')[0]} {block.name.rpartition('.')[2]}", []).append(block)
    together = [members for members in stacks.values() if any(block.bias is not None for block in members)]
    apart = [[block] for members in stacks.values() if members not in together for block in members]
    return together + apart


def _group_strengths(block: Attention, num_groups: int) -> Tensor:
    """[groups]: norm of the value's weights times the norm of the output's weights of all heads in the group."""
    with torch.no_grad():
        values, outs = rows(block.value).float(), rows(block.out).T.float()
        return values.reshape(num_groups, -1).norm(dim=1) * outs.reshape(num_groups, -1).norm(dim=1)


def _keep_groups(block: Attention, chosen: Tensor, num_groups: int) -> None:
    """Keep some groups of heads: heads of one group lie next to each other."""
    for layer, is_out in ((block.query, True), (block.key, True), (block.value, True), (block.out, False)):
        _keep(layer, _places(rows(layer).shape[0 if is_out else 1], chosen, num_groups), out=is_out)
    if block.bias is not None:
        table = block.bias.weight.detach()
        places = _places(table.shape[1], chosen, num_groups)
        block.bias.weight = nn.Parameter(table[:, places].contiguous())
        block.bias.embedding_dim = len(places)


def _places(width: int, chosen: Tensor, num_groups: int) -> Tensor:
    """Positions of the chosen groups' members along a side of this width."""
    return torch.arange(width).view(num_groups, -1)[chosen].flatten()


def _check_shapes(model: PreTrainedModel, what: str) -> None:
    """The config, as it will be read again, has to describe the model as it is now.

    Raises:
        UsageError: it does not, so nobody could open the result.
    """
    try:
        with torch.device("meta"):
            described = type(model)(type(model.config).from_dict(model.config.to_dict()))
    except Exception as error:  # config classes and models raise anything at sizes that do not fit
        reason = f"its config cannot describe the result ({type(error).__name__})"
        raise UsageError(f"the {what} of {model.config.model_type} cannot be pruned: {reason}") from error
    shapes = {name: value.shape for name, value in described.state_dict().items()}
    for name, value in model.state_dict().items():
        if shapes.get(name) != value.shape:
            raise UsageError(
                f"the {what} of {model.config.model_type} cannot be pruned: its config cannot describe "
                f"{name} of {list(value.shape)}"
            )
