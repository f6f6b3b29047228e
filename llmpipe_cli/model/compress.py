"""Weights as integers, and how models are opened, saved and timed for `llmpipe compress`.

Quantization keeps a weight as 8- or 4-bit integers with a scale a row (8 bits) or a scale
a group of 32 weights (4 bits), rounded to nearest, symmetric, in the file format of compressed-tensors, which
transformers opens. Activations stay floating-point numbers.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.adapters import CONFIG_FILE as ADAPTER_CONFIG
from llmpipe_cli.model.merge import ASSET_PATTERNS
from llmpipe_cli.model.weights import no_progress_bar

_GROUP_SIZE = 32
_INTEGERS = {"type": "int", "symmetric": True, "dynamic": False}
# One scheme for all layers of a model: where transformers turns integers into numbers, it looks at one.
_SCHEMES: dict[int, dict[str, Any]] = {
    8: {"weights": {**_INTEGERS, "num_bits": 8, "strategy": "channel"}, "format": "int-quantized"},
    4: {
        "weights": {**_INTEGERS, "num_bits": 4, "strategy": "group", "group_size": _GROUP_SIZE},
        "format": "pack-quantized",
    },
}


def load_plain(directory: Path) -> PreTrainedModel:
    """The model of a directory, as transformers opens it, in evaluation mode.

    Raises:
        UsageError: adapters, a model that is quantized already, no safetensors, or a class that transformers lacks.
    """
    if (directory / ADAPTER_CONFIG).is_file():
        hint = f"llmpipe merge {directory} MERGED, then compress MERGED"
        raise UsageError("these are LoRA adapters, not a whole model", where=str(directory), hint=hint)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        hint = "give the checkpoint that it was made from"
        raise UsageError("this model is quantized already", where=str(directory), hint=hint)
    if not any(directory.glob("*.safetensors")):
        hint = "give a checkpoint of llmpipe, or a model that save_pretrained wrote"
        raise UsageError("there are no weights in safetensors files here", where=str(directory), hint=hint)
    return _load(directory)


def _load(directory: Path) -> PreTrainedModel:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    name = (config.get("architectures") or [""])[0]
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        hint = "its config.json names the class under `architectures`"
        raise UsageError(f"transformers has no model class {name!r}", where=str(directory), hint=hint)
    with no_progress_bar():
        return cls.from_pretrained(directory, use_safetensors=True).eval()


def check_out(out: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        UsageError: it does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        hint = "give a folder that does not exist yet"
        raise UsageError("this is where the model should go, and it is not empty", where=str(out), hint=hint)


def save_plain(model: PreTrainedModel, source: Path, out: Path) -> None:
    """Write weights, config and what else is beside the original model."""
    with no_progress_bar():
        model.save_pretrained(out)
    for pattern in ASSET_PATTERNS:
        for path in source.glob(pattern):
            shutil.copyfile(path, out / path.name)


def weights_bytes(directory: Path) -> int:
    """Size of all safetensors files."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


# ---------------------------------------------------------------------------------------------- quantization


@dataclass(frozen=True)
class Quantized:
    """What was done to the weights.

    Attributes:
        linear: linear layers that are integers now.
        embedding: embeddings that are.
        kept: parameters of two dimensions and more that stay as they were.
    """

    linear: int
    embedding: int
    kept: tuple[str, ...]


def check_quantizable() -> None:
    """Refuse where the library of the file format is missing.

    Raises:
        UsageError: it is.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise UsageError("quantization needs compressed-tensors", hint="pip install 'llmpipe_cli[compress]'")


def quantize_directory(source: Path, out: Path, bits: int) -> Quantized:
    """Write the model of `source` to `out` with integer weights.

    These are linear layers and embeddings. Weights that several modules share (a tied head), norms, biases and matrices
    with a side below 32 (heads of few labels) or, with 4 bits, rows that are no multiple of 32 stay as they are.

    Args:
        source: a plain model directory.
        out: an empty or new directory.
        bits: 8 or 4.

    Raises:
        UsageError: compressed-tensors is missing, or most weights are in layers that cannot be quantized.
    """
    check_quantizable()
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus

    model = load_plain(source)
    layers = _quantizable(model, bits)
    owned = {id(module.weight) for module in layers.values()}
    matrices = {name: value for name, value in model.named_parameters() if value.dim() >= 2}
    kept = tuple(name for name, value in matrices.items() if id(value) not in owned)
    if sum(matrices[name].numel() for name in kept) > 0.5 * sum(value.numel() for value in matrices.values()):
        raise UsageError(
            f"most weights of this {model.config.model_type} model cannot be quantized",
            where=str(source),
            hint=f"such as {kept[0]}; linear layers and embeddings can, where no other module shares their weights",
        )
    scheme = QuantizationScheme(**_SCHEMES[bits], targets=list(layers))
    for module in layers.values():
        module.quantization_scheme = scheme
        _set_scales(module)
        compress_module(module)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=scheme.format, quantization_status=QuantizationStatus.COMPRESSED
    )
    save_plain(model, source, out)
    file = out / "config.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    # Integers become numbers when the model is opened. transformers' other way, at the first forward pass of the whole
    # model, fails where `generate` runs an encoder first, and with packed embeddings.
    described["quantization_config"] = config.model_dump(mode="json") | {"dequantize": True}
    file.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    num_embeddings = sum(isinstance(module, nn.Embedding) for module in layers.values())
    return Quantized(len(layers) - num_embeddings, num_embeddings, kept)


def load_quantized(directory: Path) -> PreTrainedModel:
    """A quantized directory as `from_pretrained` opens it, with floating-point weights of the rounded values."""
    return _load(directory)


def save_rounded(quantized: PreTrainedModel, plain: Path, out: Path) -> None:
    """Write the rounded weights as floating-point numbers: an ordinary model that computes the same.

    Args:
        quantized: from `load_quantized`.
        plain: the directory that was quantized.
        out: a new directory.
    """
    model = load_plain(plain)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(quantized.get_parameter(name))
    save_plain(model, plain, out)


def _quantizable(model: PreTrainedModel, bits: int) -> dict[str, nn.Module]:
    """Linear layers and embeddings whose weight belongs to them alone, without small ones (heads of a few labels)."""
    owners: dict[int, list[tuple[str, nn.Linear | nn.Embedding]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | nn.Embedding):
            owners.setdefault(id(module.weight), []).append((name, module))
    layers = dict(owned[0] for owned in owners.values() if len(owned) == 1)
    multiple = _GROUP_SIZE if bits == 4 else 1
    return {
        name: layer
        for name, layer in layers.items()
        if min(layer.weight.shape) >= _GROUP_SIZE and layer.weight.shape[1] % multiple == 0
    }


def _set_scales(module: Any) -> None:
    """Scales that put the largest magnitude of each row or group at the end of the integers' range.

    They have the model's dtype; the weight becomes float32, so that it is rounded once.
    """
    from compressed_tensors.quantization.utils import calculate_qparams

    args, weight = module.quantization_scheme.weights, module.weight.detach().float()
    groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    module.weight_scale = nn.Parameter(scale.to(module.weight.dtype), requires_grad=False)
    module.weight = nn.Parameter(weight, requires_grad=False)


# ---------------------------------------------------------------------------------------------- speed


def forward_speeds(
    models: Sequence[PreTrainedModel], *, batch_size: int = 4, length: int = 128, rounds: int = 7
) -> list[float]:
    """Tokens a second of the same forward pass, the models in turn, median of the rounds.

    Args:
        models: on the same device; one forward of each warms it up.
        batch_size: sequences.
        length: tokens a sequence, at most what the models take.
        rounds: measurements of each.
    """
    limit = getattr(models[0].config, "max_position_embeddings", None) or length
    ids = torch.arange(batch_size * min(length, limit)).remainder(models[0].config.vocab_size).view(batch_size, -1)
    inputs = {"input_ids": ids}
    if models[0].config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    seconds: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for model in models:
            model(**inputs)
        for _ in range(rounds):
            for mine, model in zip(seconds, models, strict=True):
                started = time.perf_counter()
                model(**inputs)
                mine.append(time.perf_counter() - started)
    return [ids.numel() / statistics.median(mine) for mine in seconds]
