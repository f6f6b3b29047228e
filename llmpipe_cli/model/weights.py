"""Weights in and out of a Hugging Face model directory, one stage at a time.

Reading opens the safetensors files lazily and takes only the tensors that this stage's parameters are made of, through
transformers' own renaming and fusing. Pickles (pytorch_model.bin) are read only when that is asked for. Writing gives
the names and tensors that `save_pretrained` would write.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig, remove_tied_weights_from_state_dict
from transformers.utils import logging as transformers_logging

from llmpipe_cli.errors import CheckpointError, UsageError
from llmpipe_cli.model.initialise import initialise
from llmpipe_cli.model.skeleton import all_names, replace_parameter


def read_weights(
    model: PreTrainedModel,
    names: Iterable[str],
    directory: str | Path,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    allow_pickle: bool = False,
) -> list[str]:
    """Read parameters, and all buffers that a checkpoint contains, from a model directory.

    Parameters get the dtype that they have in `model`, where they may be on meta, and come to lie on `device`.

    Args:
        model: the model; parameters other than the named ones stay as they are.
        names: first names of the parameters to read.
        directory: folder with `model.safetensors`, or its shards.
        seed: draws what the files do not contain, such as a new classification head.
        allow_pickle: read pytorch_model.bin where there are no safetensors.

    Returns:
        Names that the files do not contain and that were initialised instead.

    Raises:
        UsageError: the directory holds no weights that may be read.
        CheckpointError: a file cannot be read, or a tensor has another shape than the config says.
    """
    wanted = list(names)
    groups = all_names(model)
    with _opened(weight_files(Path(directory), allow_pickle=allow_pickle)) as stored:
        _convert(model, stored, {alias for name in wanted for alias in groups[name]}, device, directory)
        mapped = {address for tensor in stored.values() for address in tensor.addresses}
        return _complete(model, wanted, groups, mapped, device, seed)


def missing_names(model: PreTrainedModel, directory: str | Path, *, allow_pickle: bool = False) -> list[str]:
    """First names of the parameters that a model directory does not contain; reads no tensor.

    Args:
        model: the model, its parameters on meta.
        directory: see `read_weights`.
        allow_pickle: see `read_weights`.

    Raises:
        UsageError, CheckpointError: see `read_weights`.
    """
    groups = all_names(model)
    with _opened(weight_files(Path(directory), allow_pickle=allow_pickle)) as stored:
        shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}
        missing = _convert(model, shapes, {alias for names in groups.values() for alias in names}, "meta", directory)
    return [name for name, aliases in groups.items() if all(alias in missing for alias in aliases)]


def _convert(
    model: PreTrainedModel,
    stored: dict[str, Any],
    names: set[str],
    device: torch.device | str,
    directory: str | Path,
) -> set[str]:
    """Put stored tensors into the model through transformers' renaming and fusing; returns the names not found."""
    if hasattr(model, "_weight_conversions"):
        del model._weight_conversions
    conversions: Any = get_model_conversion_mapping(model)
    settings = LoadStateDictConfig(device_map={"": device}, weight_mapping=conversions)
    with no_progress_bar():
        info, _ = convert_and_load_state_dict_in_model(_StageView(model, names), stored, settings)  # type: ignore[arg-type]
    # later saves use the current library's names, whatever form these files had
    del model._weight_conversions
    if info.mismatched_keys:
        name, found, expected = sorted(info.mismatched_keys)[0]
        raise CheckpointError(
            f"{name} has shape {tuple(found)}, the config asks for {tuple(expected)}", where=str(directory)
        )
    if info.conversion_errors:
        name, message = sorted(info.conversion_errors.items())[0]
        raise CheckpointError(f"{name} cannot be converted: {message.strip().splitlines()[-1]}", where=str(directory))
    return set(info.missing_keys)


def _complete(
    model: PreTrainedModel,
    wanted: list[str],
    groups: dict[str, tuple[str, ...]],
    mapped: set[int],
    device: torch.device | str,
    seed: int,
) -> list[str]:
    """Tie again what was tied, and initialise what no file contained."""
    current = dict(model.named_parameters(remove_duplicate=False))
    missing = []
    for name in wanted:
        found = next((alias for alias in groups[name] if not current[alias].is_meta), None)
        if found is None:
            missing.append(name)
            parameter = nn.Parameter(torch.empty_like(current[name], device=device))
            parameter.__dict__.update(current[name].__dict__)
        else:
            parameter = current[found]
            if hasattr(parameter, "_is_hf_initialized"):
                del parameter._is_hf_initialized
            if parameter.untyped_storage().data_ptr() in mapped:
                # a view of the mapped file, which would break if the file were overwritten
                parameter.data = parameter.data.clone()
        replace_parameter(model, groups[name], parameter)
    initialise(model, missing, seed)
    return missing


class _StoredTensor:
    """A lazy slice of a tensor in a file, which remembers the addresses of the data that it has handed out."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored
        self.addresses: list[int] = []

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self._stored[index]
        self.addresses.append(tensor.untyped_storage().data_ptr())
        return tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape; reads nothing."""
        return tuple(self._stored.shape if isinstance(self._stored, Tensor) else self._stored.get_shape())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stored, name)


class _StageView:
    """The model as transformers' loader should see it: with the stage's own parameters only."""

    def __init__(self, model: PreTrainedModel, names: set[str]) -> None:
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_names", names)

    def state_dict(self) -> dict[str, Tensor]:
        foreign = {name for name, _ in self._model.named_parameters(remove_duplicate=False)} - self._names
        return {name: tensor for name, tensor in self._model.state_dict().items() if name not in foreign}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)


def weight_files(directory: Path, *, allow_pickle: bool = False) -> list[Path]:
    """The weight files of a model directory: safetensors, or pickles where those are allowed and alone.

    Raises:
        UsageError: there are none.
        CheckpointError: an index cannot be read, or a file that it names is missing.
    """
    for name in ("model.safetensors", *(("pytorch_model.bin",) if allow_pickle else ())):
        index = directory / f"{name}.index.json"
        if index.is_file():
            return _indexed_files(index)
        if (directory / name).is_file():
            return [directory / name]
    if any(directory.glob("pytorch_model*.bin")):
        raise UsageError(
            "the weights are pickles (pytorch_model.bin), which are not read unless the recipe says so",
            where=str(directory),
            hint="write allow_pickle: true under model: (only tensors are taken), or convert them once with "
            "AutoModel.from_pretrained(...).save_pretrained(...)",
        )
    raise UsageError("no model.safetensors found", where=str(directory))


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the index cannot be read: {error}", where=str(index)) from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing", where=str(index.parent))
    return [index.parent / name for name in names]


@contextlib.contextmanager
def _opened(files: list[Path]) -> Iterator[dict[str, _StoredTensor]]:
    """All tensors in the files by name, as lazy slices or mapped into memory; nothing is read yet."""
    stored: dict[str, _StoredTensor] = {}
    with contextlib.ExitStack() as stack:
        for path in files:
            if path.suffix == ".bin":
                stored.update({name: _StoredTensor(tensor) for name, tensor in _read_pickle(path).items()})
                continue
            try:
                handle = stack.enter_context(safe_open(path, framework="pt"))
                stored.update({name: _StoredTensor(handle.get_slice(name)) for name in handle.keys()})  # noqa: SIM118 - the handle is no mapping
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"the weights cannot be read: {error}", where=str(path)) from error
        yield stored


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pytorch_model.bin; `weights_only` lets nothing but tensors be made from it."""
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format of before 2020 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the weights cannot be read: {reason}", where=str(path)) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError("the file holds something other than named tensors", where=str(path))
    return state


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers shows no bars meanwhile."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def stage_state_dict(
    model: PreTrainedModel, names: Iterable[str], tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The named parameters and buffers as `save_pretrained` would write them.

    Fused parameters are taken apart again and get the names of the published checkpoints; of tied names one is kept.

    Args:
        model: the model; the named ones are real.
        names: first names of parameters and names of buffers (see `stage.saved_names`).
        tensors: what to write under these names instead of what the model holds: the whole of divided parameters.
    """
    groups = all_names(model)
    if tensors is None:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state: dict[str, Tensor] = {}
    for name in names:
        tensor = tensors[name]
        for alias in groups.get(name, (name,)):
            state[alias] = tensor.detach()
    for ignored in model._keys_to_ignore_on_save or ():
        state.pop(ignored, None)
    state = remove_tied_weights_from_state_dict(state, model)
    return revert_weight_conversion(model, state)
