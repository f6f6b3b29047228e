"""Merging LoRA adapters into the weights of their model: a plain Hugging Face directory comes out.

The model is read, merged and written a few layers at a time, so that only one file's worth of weights is in memory.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel

from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.adapters import (
    CONFIG_FILE,
    Adapters,
    adapter_names,
    config_section,
    merged_weight,
    read_adapter_tensors,
    read_adapters,
    split_adapter,
)
from llmpipe_cli.model.auto import load_config, resolve_weights
from llmpipe_cli.model.skeleton import all_names, build_skeleton, replace_parameter
from llmpipe_cli.model.weights import read_weights, stage_state_dict
from llmpipe_cli.recipe.schema import ModelSection

MAX_SHARD_BYTES = 5 * 10**9
# What a directory needs besides weights, where the adapter's directory has it.
_ASSETS = (
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
)
ASSET_PATTERNS = ("tokenizer*", "special_tokens_map.json", "*.model", *_ASSETS)


def merge_adapter(
    directory: Path,
    out: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_pickle: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the model that base and adapters make together.

    Weights have the dtype that the adapter was trained in, where that is known, else the base model's.

    Args:
        directory: a checkpoint of a LoRA training, or any directory that peft wrote.
        out: a directory that does not exist or is empty.
        max_shard_bytes: size of one weights file; a single layer may be larger.
        allow_pickle: read the base model from pytorch_model.bin too.
        progress: called with files written and files in all.

    Raises:
        UsageError: `directory` holds no adapters, or `out` is not empty.
        CheckpointError: base or adapters cannot be read.
    """
    given = ModelSection.model_validate({"from": str(directory), "allow_pickle": allow_pickle})
    section, adapter = split_adapter(given)
    if adapter is None:
        raise UsageError(f"there is no {CONFIG_FILE} here, so nothing to merge", where=str(directory))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("this is where the model should go, and it is not empty", where=str(out))
    weights, adapters = resolve_weights(section), read_adapters(adapter)
    # Of all tasks this one leaves the config as it is.
    config = load_config(config_section(section, adapter), "masked-lm")
    name = (config.architectures or [""])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise UsageError(f"transformers has no class {name!r} for this model", where=str(weights))
    model = build_skeleton(cls, config, dtype=cast("torch.dtype", config.dtype) or torch.float32)
    out.mkdir(parents=True, exist_ok=True)
    _write(model, weights, adapter, adapters, out, max_shard_bytes, allow_pickle, progress)
    config.save_pretrained(out)
    for folder in (weights, adapter):
        for pattern in ASSET_PATTERNS:
            for path in folder.glob(pattern):
                shutil.copyfile(path, out / path.name)


def _write(
    model: PreTrainedModel,
    weights: Path,
    adapter: Path,
    adapters: Adapters,
    out: Path,
    max_shard_bytes: int,
    allow_pickle: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    groups = all_names(model)
    chunks = _chunks(model, max_shard_bytes)
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for number, names in enumerate(chunks, start=1):
        metas = {name: model.get_parameter(name) for name in names}
        read_weights(model, names, weights, allow_pickle=allow_pickle)
        _merge(model, set(names), adapter, adapters)
        buffers = [name for name, _ in model.named_buffers() if name in model.state_dict()] if number == 1 else []
        state = {key: value.contiguous() for key, value in stage_state_dict(model, [*names, *buffers]).items()}
        file = "model.safetensors" if len(chunks) == 1 else f"model-{number:05d}-of-{len(chunks):05d}.safetensors"
        save_file(state, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(state, file))
        num_bytes += sum(value.numel() * value.element_size() for value in state.values())
        for name, meta in metas.items():
            replace_parameter(model, groups[name], meta)
        if progress is not None:
            progress(number, len(chunks))
    if len(chunks) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _chunks(model: PreTrainedModel, max_bytes: int) -> list[list[str]]:
    """First names of all parameters in groups of at most `max_bytes`; a layer stays whole."""
    chunks: list[list[str]] = [[]]
    size = 0
    for _, layer in itertools.groupby(all_names(model), key=_layer_of):
        names = list(layer)
        added = sum(p.numel() * p.element_size() for p in map(model.get_parameter, names))
        if chunks[-1] and size + added > max_bytes:
            chunks.append([])
            size = 0
        chunks[-1] += names
        size += added
    return chunks


def _layer_of(name: str) -> str:
    """The name up to its first number: ``model.layers.3``; of other parameters their module's."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match[0] if match else name.rpartition(".")[0]


def _merge(model: PreTrainedModel, names: set[str], adapter: Path, adapters: Adapters) -> None:
    """Change the parameters `names`, which are real, as the adapters say."""
    first_names = {alias: aliases[0] for aliases in all_names(model).values() for alias in aliases}
    with read_adapter_tensors(adapter) as read, torch.no_grad():
        for target in adapters.targets:
            if first_names[f"{target}.weight"] in names:
                layer, weight = model.get_submodule(target), model.get_parameter(f"{target}.weight")
                matrix_a, matrix_b = map(read, adapter_names(target))
                weight.copy_(merged_weight(layer, weight, matrix_a, matrix_b, adapters.scale))
        for name in adapters.saved:
            if first_names.get(name) in names:
                model.get_parameter(name).copy_(read(name))
