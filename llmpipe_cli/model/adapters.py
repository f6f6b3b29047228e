"""LoRA: small trained matrices beside the frozen linear layers of a pretrained model.

An adapted layer computes ``W x + scale * B A dropout(x)``, A of shape [r, in] and B of shape [out, r], as peft does. A
and B become children of the layer itself, so all weights of the model keep their Hugging Face names and the new ones
have the names that peft writes. Each adapter belongs to the segments that its layer's weight belongs to. A is drawn
from a seed made of its name, so no layout changes it; B starts at zero. With tensor shards a shard holds B's rows for
its outputs of the layer, or A's columns for its inputs (`divide_adapters`).

Adapters are kept in peft's own form, ``adapter_model.safetensors`` with ``adapter_config.json``, and read from it,
whoever wrote it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmpipe_cli.errors import CheckpointError, UsageError
from llmpipe_cli.model.initialise import parameter_seed
from llmpipe_cli.model.skeleton import all_names
from llmpipe_cli.model.slicing.plan import Segment, SlicePlan
from llmpipe_cli.model.tensor.apply import Division
from llmpipe_cli.model.tensor.parts import Part
from llmpipe_cli.recipe.names import nearest
from llmpipe_cli.recipe.schema import LoraSection, ModelSection

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"

_PEFT_PREFIX = "base_model.model."
_PEFT_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "chat": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "translation": "SEQ_2_SEQ_LM",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
}
_TASKS_WITH_NEW_HEAD = ("classification", "token-classification", "question-answering")
# What peft adapts where nothing is said, by model type; other types get all linear layers.
_Q_V = ("q_proj", "v_proj")
_KNOWN_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm"), _Q_V),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _Q_V),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("bloom", "gpt_neox", "falcon"), ("query_key_value",)),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), ("query", "value")),
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "mpt": ("Wqkv",),
    "codegen": ("qkv_proj",),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
}
# Variants of LoRA that compute something else than is computed here.
_UNSUPPORTED = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "target_parameters", "layer_replication",
                "trainable_token_indices", "use_qalora", "alora_invocation_tokens", "use_bdlora")  # fmt: skip


@dataclass(frozen=True)
class Adapters:
    """What LoRA adds to one model; plain data."""

    r: int
    """Rows of A and columns of B."""
    scale: float
    """Factor of B A x: alpha / r."""
    dropout: float
    """Probability with which an element of an adapter's input is dropped in training."""
    targets: tuple[str, ...]
    """Module names of the adapted layers."""
    saved: tuple[str, ...]
    """Names of the model's own parameters that are trained whole beside the adapters."""
    config: dict[str, Any]
    """Content of adapter_config.json."""

    @property
    def names(self) -> list[str]:
        """Names of all new parameters."""
        return [name for target in self.targets for name in adapter_names(target)]

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` reverses it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Adapters:
        """What `to_json` wrote."""
        return cls(**{**value, "targets": tuple(value["targets"]), "saved": tuple(value["saved"])})


def adapter_names(target: str) -> tuple[str, str]:
    """Names of A and B of one adapted layer."""
    return f"{target}.lora_A.weight", f"{target}.lora_B.weight"


# -- what to adapt -----------------------------------------------------------------------------------------------------


def choose_adapters(
    model: PreTrainedModel,
    lora: LoraSection,
    task: str,
    *,
    base: str,
    revision: str | None,
    missing: Iterable[str] = (),
) -> Adapters:
    """The adapters that a recipe asks for.

    Args:
        model: the model; its parameters may be on meta.
        lora: the recipe's section.
        task: the recipe's task; where it puts a new head on the model, the head is trained whole.
        base: directory or hub id of the pretrained model, for adapter_config.json.
        revision: of the hub id.
        missing: names of parameters that the pretrained model does not contain: trained whole too, since a frozen
            random layer would be of no use and lost in the end.

    Raises:
        UsageError: a name in the section matches nothing, or something that cannot be adapted.
    """
    modules = dict(model.named_modules())
    whole = [_matches(model, name, "lora.modules_to_save") for name in lora.modules_to_save]
    saved_modules = {name: None for group in whole for name in group}
    if task in _TASKS_WITH_NEW_HEAD:
        saved_modules.update(dict.fromkeys(_head_modules(model)))
    groups = all_names(model)
    saved = [
        name
        for name, aliases in groups.items()
        if any(f"{alias}.".startswith(f"{module}.") for alias in aliases for module in saved_modules)
    ]
    for name in missing:
        if name not in saved:
            saved.append(name)
            saved_modules[name.rpartition(".")[0]] = None

    kept_out = tuple(f"{module}." for module in saved_modules)
    wanted, targets = _choose_targets(model, lora)
    targets = [name for name in targets if not f"{name}.".startswith(kept_out)]
    for name in targets:
        _check_target(model, name, modules[name])
    if not targets:
        raise UsageError("no layer is left to adapt", where="lora.target_modules", hint="shorten lora.modules_to_save")
    config = {
        "peft_type": "LORA",
        "task_type": _PEFT_TASKS.get(task),
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": wanted or _shortest_names(model, targets, kept_out),
        "modules_to_save": sorted(saved_modules) or None,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(modules[name], Conv1D) for name in targets),
        "init_lora_weights": True,
        "use_rslora": False,
        "inference_mode": True,
    }
    return Adapters(lora.r, lora.alpha / lora.r, lora.dropout, tuple(targets), tuple(saved), config)


def _choose_targets(model: PreTrainedModel, lora: LoraSection) -> tuple[list[str], list[str]]:
    """What to write as peft's target_modules (empty: as short as possible), and the names of the layers."""
    if isinstance(lora.target_modules, list):
        targets = [name for wanted in lora.target_modules for name in _matches(model, wanted, "lora.target_modules")]
        return list(lora.target_modules), list(dict.fromkeys(targets))
    known = _KNOWN_TARGETS.get(model.config.model_type, ()) if lora.target_modules == "auto" else ()
    if known:
        targets = [name for name, _ in model.named_modules() if name.endswith(tuple(f".{part}" for part in known))]
        if targets:
            return list(known), targets
    head = model.get_output_embeddings()
    tied = {alias for names in all_names(model).values() if len(names) > 1 for alias in names}
    return [], [
        name
        for name, module in model.named_modules()
        if _is_linear(module) and module is not head and f"{name}.weight" not in tied
    ]


def _matches(model: nn.Module, wanted: str, where: str) -> list[str]:
    """Modules whose name is `wanted` or ends with it."""
    found = [name for name, _ in model.named_modules() if name == wanted or name.endswith(f".{wanted}")]
    if not found:
        last_parts = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        near = nearest(wanted, sorted(part for part in last_parts if not part.isdigit()))
        linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)})
        hint = f"did you mean {near}?" if near else f"its linear layers are {', '.join(linear[:12])}"
        raise UsageError(f"{type(model).__name__} has no module {wanted!r}", where=where, hint=hint)
    return found


def _check_target(model: nn.Module, name: str, module: nn.Module) -> None:
    if not _is_linear(module):
        raise UsageError(
            f"{name} is a {type(module).__name__}; LoRA adapts linear layers",
            where="lora.target_modules",
            hint="name it in lora.modules_to_save to train it whole",
        )
    if any(f"{name}.weight" in aliases and len(aliases) > 1 for aliases in all_names(model).values()):
        raise UsageError(
            f"the weight of {name} is tied to another layer's, so that it cannot be adapted alone",
            where="lora.target_modules",
            hint="leave it out",
        )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _head_modules(model: PreTrainedModel) -> list[str]:
    """The task's head: what stands beside the base model."""
    inside = model.base_model_prefix
    return [
        name
        for name, module in model.named_children()
        if name != inside and next(module.parameters(), None) is not None
    ]


def _shortest_names(model: nn.Module, targets: list[str], kept_out: tuple[str, ...]) -> list[str]:
    """Last parts of the names if they mean exactly `targets`, else the full names."""
    parts = sorted({name.rpartition(".")[2] for name in targets})
    meant = [
        name
        for name, _ in model.named_modules()
        if name.rpartition(".")[2] in parts and not f"{name}.".startswith(kept_out)
    ]
    return parts if set(meant) == set(targets) else sorted(targets)


def extend_plan(plan: SlicePlan, model: PreTrainedModel, adapters: Adapters) -> SlicePlan:
    """The slice plan with the new parameters: each in every segment that uses its layer's weight."""
    first_names = {alias: names[0] for names in all_names(model).values() for alias in names}
    after: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for target in adapters.targets:
        weight = first_names[f"{target}.weight"]
        name_a, name_b = adapter_names(target)
        after.setdefault(weight, []).extend((name_a, name_b))
        num_in, num_out = _features(model.get_submodule(target))
        sizes[name_a], sizes[name_b] = num_in * adapters.r, num_out * adapters.r

    def extended(segment: Segment) -> Segment:
        added = [name for weight in segment.parameters for name in after.get(weight, ())]
        num_parameters = segment.num_parameters + sum(sizes[name] for name in added)
        return replace(segment, parameters=(*segment.parameters, *added), num_parameters=num_parameters)

    unused = [name for weight in plan.unused for name in after.get(weight, ())]
    return replace(plan, segments=tuple(extended(segment) for segment in plan.segments), unused=(*plan.unused, *unused))


def divide_adapters(model: PreTrainedModel, division: Division, adapters: Adapters) -> Division:
    """The division of a model and its adapters over tensor shards.

    Beside a layer divided by columns every shard has A whole and B's rows for its own outputs; by rows, A's columns for
    its own inputs and B whole. The whole one of the two sees a part of the gradient: what it works on is summed over
    the shards with the layer's own result or input gradient, so that adapters add no communication to a micro-batch.

    Args:
        model: the undivided model without adapters; its parameters may be on meta.
        division: what this shard holds of it.
        adapters: what is added.

    Raises:
        UsageError: an adapted layer belongs to experts, whose results are summed over the shards as one.
    """
    first_names = {alias: names[0] for names in all_names(model).values() for alias in names}
    experts = tuple(f"{name}." for name, style in division.styles.items() if style == "moe_tp_experts")
    parts, partial = dict(division.parts), set(division.partial)
    for target in adapters.targets:
        if target.startswith(experts):
            raise UsageError(
                f"the adapter of {target} cannot be divided over tensor shards: the layer belongs to experts",
                where="lora.target_modules",
                hint="leave it out, or write parallel.tensor: 1",
            )
        layer: Any = model.get_submodule(target)
        num_in, num_out = _features(layer)
        name_a, name_b = adapter_names(target)
        part = division.parts.get(first_names[f"{target}.weight"])
        if part is None:
            if first_names[f"{target}.weight"] in division.partial:
                partial |= {name_a, name_b}
        elif part.dim == int(isinstance(layer, Conv1D)):
            parts[name_b] = Part((num_out, adapters.r), 0, part.ranges)
            partial.add(name_a)
        else:
            parts[name_a] = Part((adapters.r, num_in), 1, part.ranges)
            partial.add(name_b)
    return replace(division, parts=parts, partial=partial)


# -- layers ------------------------------------------------------------------------------------------------------------


def attach(model: PreTrainedModel, adapters: Adapters) -> None:
    """Put the adapters into the model, their parameters on meta; the layers' own weights keep their names.

    A layer whose weight is a tensor shard's part gets the shard's part of its adapter.
    """
    for target in adapters.targets:
        layer: Any = model.get_submodule(target)
        num_in, num_out = _features(layer)
        dtype = layer.weight.dtype
        layer.lora_dropout = nn.Dropout(adapters.dropout)
        layer.lora_A = nn.Linear(num_in, adapters.r, bias=False, device="meta", dtype=dtype)
        layer.lora_B = nn.Linear(adapters.r, num_out, bias=False, device="meta", dtype=dtype)
        layer.lora_change = functools.partial(_change, layer, adapters.scale)
        layer.forward = functools.partial(_adapted, layer, layer.forward)


def _adapted(layer: Any, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    result = forward(inputs)
    return result + layer.lora_change(inputs)


def _change(layer: Any, scale: float, inputs: Tensor) -> Tensor:
    """What the adapter adds to the layer's result."""
    change: Tensor = layer.lora_B(layer.lora_A(layer.lora_dropout(inputs)))
    return change * scale


def _features(layer: Any) -> tuple[int, int]:
    """Size of a linear layer's input and output; Conv1D keeps its weight transposed."""
    rows, columns = layer.weight.shape
    return (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)


def draw_adapter(name: str, parameter: Tensor, seed: int, part: Part | None = None) -> None:
    """Fill A with the values that a linear layer starts from (uniform within 1 / sqrt(in)), B with zeros.

    The values depend on seed and name alone, also on another device, and on a tensor shard, which holds `part` of them.
    """
    with torch.no_grad():
        if name.endswith(".lora_B.weight"):
            parameter.zero_()
            return
        generator = torch.Generator().manual_seed(parameter_seed(seed, name))
        shape = part.shape if part is not None else parameter.shape
        bound = 1.0 / math.sqrt(shape[1])
        values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        parameter.copy_(part.take(values) if part is not None else values)


def merged_weight(layer: Any, weight: Tensor, matrix_a: Tensor, matrix_b: Tensor, scale: float) -> Tensor:
    """The weight that alone computes what layer and adapter compute together; summed in fp32, in `weight`'s dtype."""
    change = (matrix_b.float() @ matrix_a.float()) * scale
    return (weight.float() + (change.T if isinstance(layer, Conv1D) else change)).to(weight.dtype)


# -- files -------------------------------------------------------------------------------------------------------------


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds adapters and not a whole model."""
    return (directory / CONFIG_FILE).is_file() and not any(directory.glob("model*.safetensors"))


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Content of adapter_config.json.

    Raises:
        CheckpointError: it cannot be read.
        UsageError: it is no LoRA adapter, or a variant that is not supported.
    """
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, base = config["peft_type"], config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the adapter's config cannot be read: {error}", where=str(path)) from error
    if kind != "LORA" or not base:
        message = f"adapters of the kind {kind} cannot be read" if base else "it does not name the model it belongs to"
        hint = "only LoRA" if base else "write base_model_name_or_path, a folder or a hub id"
        raise UsageError(message, where=str(path), hint=hint)
    used = next((name for name in _UNSUPPORTED if config.get(name)), None)
    used = used or ("bias" if config.get("bias", "none") != "none" else None)
    if used is not None:
        raise UsageError(f"adapters with {used} cannot be read", where=str(path), hint="merge it with peft first")
    return config


def split_adapter(section: ModelSection) -> tuple[ModelSection, Path | None]:
    """The section of the model itself, and the directory of adapters if that is what `from` names.

    Raises:
        UsageError, CheckpointError: the adapter's config cannot be used, or the model that it names is gone.
    """
    directory = Path(section.from_) if section.from_ is not None else None
    if directory is None or not is_adapter(directory):
        return section, None
    config = read_adapter_config(directory)
    base = config["base_model_name_or_path"]
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UsageError(
            f"the model that this adapter belongs to is not there: {base}",
            where=str(directory / CONFIG_FILE),
            hint="write its new place as base_model_name_or_path",
        )
    return section.model_copy(update={"from_": base, "revision": config.get("revision")}), directory


def config_section(section: ModelSection, adapter: Path | None) -> ModelSection:
    """What to read the model's config from: a checkpoint's own (with the labels of its head), else the base model's."""
    if adapter is None or not (adapter / "training" / "config.json").is_file():
        return section
    return section.model_copy(update={"from_": str(adapter / "training"), "revision": None})


def read_adapters(directory: Path) -> Adapters:
    """The adapters in a directory, which layers they are for taken from the names of their tensors.

    Raises:
        CheckpointError, UsageError: see `read_adapter_config`; the weights cannot be read.
    """
    config = read_adapter_config(directory)
    with _opened(directory) as file:
        names = [name.removeprefix(_PEFT_PREFIX) for name in file.keys()]  # noqa: SIM118 (not a mapping)
    targets = [match[1] for name in names if (match := re.fullmatch(r"(.+)\.lora_A\.weight", name))]
    known = {name for target in targets for name in adapter_names(target)}
    r, alpha = int(config["r"]), float(config["lora_alpha"])
    scale = alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r
    saved = tuple(name for name in names if name not in known)
    return Adapters(r, scale, float(config.get("lora_dropout", 0.0)), tuple(targets), saved, config)


def read_adapter_weights(model: nn.Module, names: Iterable[str], directory: Path, parts: Mapping[str, Part]) -> None:
    """Fill parameters of the model, which are real, from the directory's adapters.

    Args:
        model: the model with its adapters.
        names: of the parameters.
        directory: of the adapters.
        parts: which parts of parameters the model holds, where it does not hold them whole.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    with read_adapter_tensors(directory) as read, torch.no_grad():
        for name in names:
            value, parameter, part = read(name), model.get_parameter(name), parts.get(name)
            shape = part.shape if part is not None else tuple(parameter.shape)
            if value.shape != shape:
                message = f"{name} has shape {tuple(value.shape)}, the model asks for {shape}"
                raise CheckpointError(message, where=str(directory / WEIGHTS_FILE))
            parameter.copy_(part.take(value) if part is not None else value)


@contextlib.contextmanager
def read_adapter_tensors(directory: Path) -> Iterator[Callable[[str], Tensor]]:
    """A function that reads one of the adapters' tensors by the name of its parameter.

    Raises:
        CheckpointError: the file cannot be read, or holds no such tensor.
    """
    with _opened(directory) as file:
        stored = set(file.keys())

        def read(name: str) -> Tensor:
            if _PEFT_PREFIX + name not in stored:
                raise CheckpointError(f"there is no {name} in the adapter", where=str(directory / WEIGHTS_FILE))
            return file.get_tensor(_PEFT_PREFIX + name)

        yield read


def adapter_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters, given by their names in the model, under peft's names."""
    return {_PEFT_PREFIX + name: tensor.detach() for name, tensor in tensors.items()}


def _opened(directory: Path) -> Any:
    try:
        return safe_open(directory / WEIGHTS_FILE, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the adapter cannot be read: {error}", where=str(directory / WEIGHTS_FILE)) from error
