"""Saving and loading a training run as a Hugging Face model directory.

Every stage writes its own weights as safetensors shards under Hugging Face's names, every rank the optimizer slices it
owns; rank 0 adds config, tokenizer, index, position and manifest, and renames the directory into place when all ranks
have written and synced. With LoRA the adapters alone are saved, as the one file that peft reads: every stage writes its
part, rank 0 puts the parts together. All ranks learn of a failure on any of them, so a full disk on one node ends the
save everywhere, with the earlier checkpoints untouched. Nodes without shared storage send rank 0 what they wrote
(`engine.collect`).

Writing starts from a snapshot, so that training can go on meanwhile (`engine.saver`).
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmpipe_cli.engine import collect, manifest
from llmpipe_cli.engine.exchange import gather_json
from llmpipe_cli.engine.pipeline import Engine
from llmpipe_cli.engine.state import local_slices, restore, scalars
from llmpipe_cli.errors import CheckpointError
from llmpipe_cli.model.adapters import WEIGHTS_FILE, Adapters, adapter_state_dict
from llmpipe_cli.model.stage import saved_names
from llmpipe_cli.model.tensor.gather import gather_whole
from llmpipe_cli.model.tensor.parts import Part
from llmpipe_cli.model.weights import stage_state_dict
from llmpipe_cli.run import checkpoint_name

INDEX = "model.safetensors.index.json"
TRAINING = "training"

Files = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Snapshot:
    """Copies, in main memory, of everything that one rank saves.

    Attributes:
        shards: its weights or adapters under the names of the files' format, one dictionary a file.
        optimizer: its slices of optimizer state, by ``parameter|key|start``.
        parts: JSON of the part that this tensor shard holds, of each divided parameter in `optimizer`.
        adapters: whether `shards` hold adapters.
    """

    shards: list[dict[str, torch.Tensor]]
    optimizer: dict[str, torch.Tensor]
    parts: dict[str, Any]
    adapters: bool


class HostCopies:
    """Copies of a rank's tensors in main memory, in buffers that are kept from one save to the next.

    Memory that a process touches for the first time costs several times the copy itself, so only the first save pays
    for it. Between saves the buffers hold as many bytes as this rank saves; they are page-locked where the tensors lie
    on an accelerator, which then copies by itself.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy tensors, contiguously; what an earlier call returned is overwritten, and freed where it is not needed.

        Args:
            tensors: by names that are the same at every save; shapes and dtypes may change.
        """
        old, self._buffers = self._buffers, {}
        devices = set()
        for name, tensor in tensors.items():
            buffer = old.pop(name, None)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer.copy_(tensor.detach(), non_blocking=True)
            if tensor.is_cuda:
                devices.add(tensor.device)
        for device in devices:
            torch.cuda.synchronize(device)
        return dict(self._buffers)


def take_snapshot(engine: Engine, max_shard_size: str, copies: HostCopies) -> Snapshot:
    """Copy what this rank saves; all ranks call it between the same two steps.

    Args:
        engine: the engine.
        max_shard_size: size of one weights file, such as "5GB".
        copies: where to copy to; nothing may be reading an earlier snapshot that lies there.
    """
    adapters = engine.adapters
    shards = _own_weight_shards(engine, max_shard_size) if adapters is None else _own_adapters(engine, adapters)
    slices = list(local_slices(engine))
    states = {f"{item.parameter}|{item.key}|{item.start}": item.values for item in slices}
    # Names of weights hold no "|", so the two kinds cannot be taken for each other.
    copied = copies.take({name: tensor for tensors in (*shards, states) for name, tensor in tensors.items()})
    return Snapshot(
        shards=[{name: copied[name] for name in tensors} for tensors in shards],
        optimizer={name: copied[name] for name in states},
        parts={item.parameter: item.part.to_json() for item in slices if item.part is not None},
        adapters=adapters is not None,
    )


def write_checkpoint(
    snapshot: Snapshot,
    directory: Path,
    step: int,
    state: dict[str, Any],
    write_assets: Callable[[Path], None],
    group: dist.ProcessGroup | None = None,
    tidy: Callable[[Path], None] | None = None,
) -> Path:
    """Write one checkpoint; called by all ranks.

    Args:
        snapshot: what this rank saves, after `step` optimizer steps.
        directory: the run's ``checkpoints`` directory; the checkpoint ends up whole in rank 0's, whoever sees it.
        step: optimizer steps done.
        state: position and settings for ``training/state.json``; used on rank 0.
        write_assets: rank 0: writes config and tokenizer files into the given directory.
        group: a group of all ranks instead of the default one.
        tidy: rank 0: called with the finished checkpoint, to move links and remove old ones.

    Returns:
        The finished checkpoint.

    Raises:
        CheckpointError: on every rank, when any rank could not write.
    """
    final = directory / checkpoint_name(step)
    partial = final.with_name(final.name + manifest.PARTIAL)
    is_first = dist.get_rank() == 0

    def prepare() -> str:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / TRAINING).mkdir(parents=True)
        token = secrets.token_hex(8)
        collect.mark(partial, token)
        return token

    token = _together(prepare if is_first else None, final, group)[0]
    shards, adapters = snapshot.shards, snapshot.adapters
    counts = gather_json(len(shards), group)
    first_shard, num_shards = sum(counts[: dist.get_rank()]), sum(counts)

    def write_own() -> dict[str, Any]:
        files: Files = {}
        own = collect.own_folder(partial, token)
        (own / TRAINING).mkdir(exist_ok=True)
        weight_map: dict[str, str] = {}
        for offset, tensors in enumerate(shards):
            name = _part_name(dist.get_rank()) if adapters else _shard_name(first_shard + offset, num_shards)
            _save(own / name, tensors, {"format": "pt"}, files, name)
            weight_map.update(dict.fromkeys(tensors, name))
        if snapshot.optimizer:
            name = f"{TRAINING}/optimizer-{dist.get_rank():05d}.safetensors"
            metadata = {_PARTS: json.dumps(snapshot.parts)} if snapshot.parts else {}
            _save(own / name, snapshot.optimizer, metadata, files, name)
        size = sum(tensor.numel() * tensor.element_size() for tensors in shards for tensor in tensors.values())
        return {"files": files, "weight_map": weight_map, "bytes": size, "own": str(own), "away": own != partial}

    def remove_partial() -> None:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)

    try:
        written = _together(write_own, final, group)
        files, away = [entry["files"] for entry in written], [entry["away"] for entry in written]
        own = Path(written[dist.get_rank()]["own"])
        _together(lambda: collect.send_away(own, partial, files, away, group), final, group)
    except CheckpointError:
        remove_partial()
        raise

    def finish() -> None:
        collect.unmark(partial)
        files: Files = {}
        for entry in written:
            files.update(entry["files"])
        if adapters:
            _join_parts(partial, files)
        elif num_shards > 1:
            _write_index(partial / INDEX, written)
        (partial / TRAINING / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        write_assets(partial)
        for path in sorted(partial.rglob("*")):
            name = path.relative_to(partial).as_posix()
            if path.is_file() and name not in files:
                manifest.sync_file(path)
                files[name] = manifest.file_entry(path)
        manifest.write_manifest(partial, step, files)
        manifest.sync_file(partial / TRAINING)
        manifest.sync_file(partial)
        replaced = final.with_name(final.name + ".replaced" + manifest.PARTIAL)
        if final.exists():  # a resumed run came past the same step again
            shutil.rmtree(replaced, ignore_errors=True)  # of a save that was killed here
            final.rename(replaced)
        partial.rename(final)
        manifest.point(directory / "latest", final.name)
        shutil.rmtree(replaced, ignore_errors=True)
        if tidy is not None:
            tidy(final)

    try:
        _together(finish if is_first else None, final, group)
    except CheckpointError:
        remove_partial()
        raise
    return final


def training_scalars(engine: Engine) -> dict[str, Any]:
    """Shared optimizer scalars and the loss scale, for ``training/state.json``."""
    result: dict[str, Any] = {"optimizer": scalars(engine)}
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and getattr(scaler, "dynamic", False):
        result["loss_scaler"] = {key: getattr(scaler, key) for key in _SCALER_FIELDS if hasattr(scaler, key)}
    return result


def load_training_state(engine: Engine, checkpoint: Path, saved: dict[str, Any]) -> None:
    """Give this rank's optimizer the state saved in a checkpoint of any layout.

    Args:
        engine: a fresh engine whose parameters hold the checkpoint's weights.
        checkpoint: the checkpoint directory.
        saved: `training_scalars` as saved.
    """
    reader = SliceReader(sorted((checkpoint / TRAINING).glob("optimizer-*.safetensors")))
    restore(engine, reader.keys(), saved["optimizer"], reader.read)
    for key, value in saved.get("loss_scaler", {}).items():
        setattr(engine.optimizer.loss_scaler, key, value)


# Metadata of a file of optimizer state: JSON of which part of each parameter its tensor shard holds.
_PARTS = "tensor_parts"
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class SliceReader:
    """Reads state slices of any layout by parameter, key and range.

    Args:
        paths: all ``optimizer-*.safetensors`` files of a checkpoint.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._pieces: dict[tuple[str, str], list[_Piece]] = {}
        for path in paths:
            file = safe_open(path, framework="pt")
            parts = json.loads((file.metadata() or {}).get(_PARTS, "{}"))
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                parameter, key, start = name.rsplit("|", 2)
                part = Part.from_json(parts[parameter]) if parameter in parts else None
                self._pieces.setdefault((parameter, key), []).append(_Piece(int(start), file, name, part))

    def keys(self) -> dict[str, set[str]]:
        """State keys of each parameter."""
        result: dict[str, set[str]] = {}
        for parameter, key in self._pieces:
            result.setdefault(parameter, set()).add(key)
        return result

    def read(self, parameter: str, key: str, start: int, count: int, part: Part | None) -> torch.Tensor:
        """Elements [start, start + count) of the flattened state of a part of a parameter; all of it when count is -1.

        Where the files hold other parts than the one asked for, the whole state of this one parameter is put together.

        Args:
            parameter: name.
            key: state key.
            start: first element, counted within the part.
            count: number of elements.
            part: what a tensor shard holds; None for the whole parameter.

        Raises:
            CheckpointError: the slices in the files do not cover the range.
        """
        pieces = self._pieces.get((parameter, key), [])
        same = [piece for piece in pieces if piece.part == part]
        if same:
            return _read_range(same, start, count, f"{key} of {parameter}")
        whole = self._whole(pieces, f"{key} of {parameter}")
        values = (part.take(whole.view(part.shape)) if part is not None else whole).flatten()
        return values[start:] if count == -1 else values[start : start + count]

    def _whole(self, pieces: list[_Piece], what: str) -> torch.Tensor:
        parts = {piece.part for piece in pieces}
        if parts <= {None}:
            return _read_range(pieces, 0, -1, what)
        shape = next(part.shape for part in parts if part is not None)
        whole = torch.empty(shape, dtype=torch.float32)
        filled = 0
        for part in parts - {None}:
            assert part is not None
            values = _read_range(
                [piece for piece in pieces if piece.part == part], 0, math.prod(part.local_shape), what
            )
            part.put(whole, values)
            filled += values.numel()
        if filled != whole.numel():
            raise CheckpointError(f"the saved {what} is incomplete: {whole.numel() - filled} elements are missing")
        return whole


@dataclass(frozen=True)
class _Piece:
    """A slice of state in a file: elements from `start` on, of a tensor shard's part or of the whole parameter."""

    start: int
    file: Any
    name: str
    part: Part | None


def _read_range(pieces: list[_Piece], start: int, count: int, what: str) -> torch.Tensor:
    """Elements [start, start + count) from pieces of the same part; all when count is -1."""
    pieces = sorted(pieces, key=lambda piece: piece.start)
    if count == -1 and len(pieces) == 1:
        return pieces[0].file.get_tensor(pieces[0].name)
    parts, position = [], start
    end = None if count == -1 else start + count
    for piece in pieces:
        view = piece.file.get_slice(piece.name)
        piece_end = piece.start + view.get_shape()[0]
        stop = piece_end if end is None else min(piece_end, end)
        if piece.start <= position < stop:
            parts.append(view[position - piece.start : stop - piece.start])
            position = stop
    if not parts or (end is not None and position < end):
        raise CheckpointError(f"the saved {what} is incomplete: elements from {position} are missing")
    return torch.cat(parts)


def _own_weight_shards(engine: Engine, max_shard_size: str) -> list[dict[str, torch.Tensor]]:
    """The tensors this rank saves, under Hugging Face's names, cut into files; empty on replicas but the first."""
    if engine.grid.get_data_parallel_rank() != 0:
        return []
    module = engine.module
    names = saved_names(module.slice_plan, module.segments)
    whole = None
    if module.tensor_group is not None:
        whole = gather_whole(module.skeleton, module.slice_plan, names, module.tensor_group)
        names = list(whole)
    tensors = stage_state_dict(module.skeleton, names, whole)
    if not tensors:
        return []
    # Sizes alone are looked at: without data no two tensors are taken for views of the same memory.
    sizes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    return [{name: tensors[name] for name in group} for group in split.filename_to_tensors.values()]


def _own_adapters(engine: Engine, adapters: Adapters) -> list[dict[str, torch.Tensor]]:
    """The adapters and whole modules that this rank saves, under peft's names, as one file; none on later replicas."""
    if engine.grid.get_data_parallel_rank() != 0:
        return []
    module = engine.module
    wanted = {*adapters.names, *adapters.saved}
    names = [name for name in saved_names(module.slice_plan, module.segments) if name in wanted]
    if module.tensor_group is not None:
        tensors = gather_whole(module.skeleton, module.slice_plan, names, module.tensor_group)
    else:
        tensors = {name: module.skeleton.get_parameter(name) for name in names}
    return [adapter_state_dict(tensors)] if tensors else []


def _join_parts(partial: Path, files: Files) -> None:
    """One file of adapters instead of a part a rank."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(partial.glob(_part_name("*"))):
        tensors.update(load_file(path))
        path.unlink()
        del files[path.name]
    _save(partial / WEIGHTS_FILE, dict(sorted(tensors.items())), {"format": "pt"}, files, WEIGHTS_FILE)


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], files: Files, name: str) -> None:
    save_file(tensors, path, metadata=metadata)
    manifest.sync_file(path)
    files[name] = manifest.file_entry(path)


def _shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _part_name(rank: int | str) -> str:
    return f"adapter-part-{rank:05d}.safetensors" if isinstance(rank, int) else f"adapter-part-{rank}.safetensors"


def _write_index(path: Path, written: list[dict[str, Any]]) -> None:
    weight_map: dict[str, str] = {}
    for entry in written:
        weight_map.update(entry["weight_map"])
    index = {
        "metadata": {"total_size": sum(entry["bytes"] for entry in written)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    path.write_text(json.dumps(index, indent=2) + "\n")


def _together(work: Callable[[], Any] | None, final: Path, group: dist.ProcessGroup | None) -> list[Any]:
    """Do one phase on the ranks that have work; every rank gets every result, or every rank raises."""
    result, problem = None, None
    try:
        result = work() if work is not None else None
    except OSError as error:
        problem = f"{error.strerror or error}: {error.filename or final}"
    except Exception as error:  # safetensors raises its own class when the disk is full
        problem = f"{type(error).__name__}: {error}"
    outcomes = gather_json({"result": result, "problem": problem}, group)
    for rank, outcome in enumerate(outcomes):
        if outcome["problem"] is not None:
            raise CheckpointError(
                f"rank {rank} could not write the checkpoint: {outcome['problem']}",
                where=str(final),
                hint="earlier checkpoints are untouched; free space or choose another output_dir, then --resume auto",
            )
    return [outcome["result"] for outcome in outcomes]
