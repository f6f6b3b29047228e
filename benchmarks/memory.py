"""Memory of ranks that load their stages of a large checkpoint.

    python benchmarks/memory.py FOLDER [--gigabytes 2] [--ranks 4]

Writes a random Llama checkpoint of the wanted size in fp32 into FOLDER, shard by shard, then starts one process a rank,
each of which builds its stage from the files as training does. Reported is the peak of each process's anonymous memory
(RssAnon in /proc: files mapped into memory do not count), the same of a process that only imports what the others
import, and the difference as a share of the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig

from llmpipe_cli.model.auto import model_class
from llmpipe_cli.model.skeleton import build_skeleton
from llmpipe_cli.model.slicing import trace_config
from llmpipe_cli.model.stage import build_stage
from llmpipe_cli.plan.partition import balance

HIDDEN, INNER, VOCAB = 1024, 2816, 8192
TASK = "causal-lm"


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write the checkpoint, one file a layer; returns its size in bytes."""
    layer_bytes = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_attention_heads=16,
        num_hidden_layers=round((gigabytes * 1e9 - 8 * VOCAB * HIDDEN) / layer_bytes),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in build_skeleton(model_class(config, TASK), config).named_parameters():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = parameter.shape
    total, weight_map = 0, {}
    for file, shapes in files.items():
        tensors = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        total += sum(tensor.numel() * 4 for tensor in tensors.values())
        weight_map.update(dict.fromkeys(tensors, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def anonymous_bytes() -> int:
    """Anonymous memory of this process now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def load(folder: Path, ranks: int, rank: int) -> None:
    """One rank: build its stage (none for rank -1) and print the peak of the anonymous memory."""
    peak, done = anonymous_bytes(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if rank >= 0:
        config = AutoConfig.from_pretrained(folder)
        cls = model_class(config, TASK)
        plan = trace_config(cls, config, TASK, sequence_len=128)
        bounds = balance(plan.flops(128), ranks)
        model = build_stage(cls, config, plan, range(bounds[rank], bounds[rank + 1]), weights=folder)
        assert sum(not parameter.is_meta for parameter in model.parameters()) > 0
    done.set()
    watcher.join()
    print(max(peak, anonymous_bytes()))


def main() -> None:
    """Write, load on every rank, report."""
    parser = argparse.ArgumentParser(description="Memory of ranks that load a large checkpoint.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        load(options.folder, options.ranks, options.rank)
        return
    size = write_checkpoint(options.folder, options.gigabytes)
    peaks = []
    for rank in range(-1, options.ranks):
        command = [sys.executable, __file__, str(options.folder), "--ranks", str(options.ranks), "--rank", str(rank)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
    bare = peaks[0]
    print(f"checkpoint of {size / 1e9:.2f} GB, {options.ranks} ranks; a bare process has {bare / 1e6:.0f} MB")
    for rank, peak in enumerate(peaks[1:]):
        share = (peak - bare) / size
        print(f"rank {rank}: peak {peak / 1e6:.0f} MB, {share:.3f} of the checkpoint above the bare process")


if __name__ == "__main__":
    main()
