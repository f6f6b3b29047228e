"""Predicted beside measured peak memory of processor ranks, by counting the bytes of their tensors.

    python benchmarks/tracked_memory.py FOLDER [CASE ...]

Trains each case for two steps; every allocation and release that PyTorch's allocator reports is counted (`ranks.py`).
The peak during a step is what `torch.cuda.max_memory_allocated` would say on a GPU; the prediction's counterpart leaves
out the driver's context and the allocator's reserve. Repetitions differ by about 0.01 MB; see REPEATED for more.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from ranks import Ranks

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 512,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 256, "n_layer": 6, "n_head": 4, "vocab_size": 1024, "n_positions": 512,
        "bos_token_id": 0, "eos_token_id": 0,
    },
    "bert": {
        "model_type": "bert", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 4, "vocab_size": 1024, "max_position_embeddings": 512,
    },
    "t5": {
        "model_type": "t5", "d_model": 256, "d_ff": 1024, "d_kv": 64, "num_layers": 3, "num_decoder_layers": 3,
        "num_heads": 4, "vocab_size": 1024,
    },
    "wide": {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 8192, "max_position_embeddings": 512,
    },
}  # fmt: skip
# model, pipeline, data, schedule, checkpointing, ZeRO stage, dtype, micro-batch
CASES: dict[str, tuple[str, int, int, str, str, int, str, int]] = {
    "one": ("llama", 1, 1, "1f1b", "none", 0, "fp32", 2),
    "one-full": ("llama", 1, 1, "1f1b", "full", 0, "fp32", 4),
    "one-selective": ("llama", 1, 1, "1f1b", "selective", 0, "fp32", 4),
    "one-bf16": ("llama", 1, 1, "1f1b", "none", 1, "bf16", 4),
    "gpt2-one": ("gpt2", 1, 1, "1f1b", "none", 0, "fp32", 4),
    "wide-one": ("wide", 1, 1, "1f1b", "none", 0, "fp32", 4),
    "1f1b": ("llama", 2, 1, "1f1b", "none", 0, "fp32", 4),
    "1f1b-full": ("llama", 2, 1, "1f1b", "full", 0, "fp32", 4),
    "gpipe": ("llama", 2, 1, "gpipe", "none", 0, "fp32", 2),
    "zb-h1": ("llama", 2, 1, "zb-h1", "none", 0, "fp32", 4),
    "zb-h2": ("llama", 2, 1, "zb-h2", "none", 0, "fp32", 4),
    "zb-v": ("llama", 2, 1, "zb-v", "none", 0, "fp32", 4),
    "interleaved": ("llama", 2, 1, "interleaved", "none", 0, "fp32", 4),
    "bf16": ("llama", 2, 1, "1f1b", "none", 1, "bf16", 4),
    "fp16": ("llama", 2, 1, "1f1b", "none", 1, "fp16", 4),
    "one-fp16": ("llama", 1, 1, "1f1b", "none", 1, "fp16", 4),
    "zero-fp16": ("llama", 1, 2, "1f1b", "none", 1, "fp16", 4),
    "zero-bf16": ("llama", 1, 2, "1f1b", "none", 1, "bf16", 4),
    "replicas": ("llama", 1, 2, "1f1b", "none", 0, "fp32", 4),
    "zero": ("llama", 1, 2, "1f1b", "none", 1, "fp32", 4),
    "gpt2": ("gpt2", 2, 1, "1f1b", "none", 0, "fp32", 4),
    "wide": ("wide", 2, 1, "1f1b", "none", 0, "fp32", 4),
    "bert": ("bert", 2, 1, "1f1b", "none", 0, "fp32", 4),
    "wide-bf16": ("wide", 1, 1, "1f1b", "none", 1, "bf16", 4),
    "long": ("llama", 2, 1, "1f1b", "none", 0, "fp32", 2),
    "long-zb-v": ("llama", 2, 1, "zb-v", "none", 0, "fp32", 2),
    "gpt2-long": ("gpt2", 1, 1, "1f1b", "none", 0, "fp32", 2),
    "short": ("llama", 1, 2, "1f1b", "none", 0, "fp32", 1),
    "short-one": ("llama", 1, 1, "1f1b", "none", 0, "fp32", 1),
    "short-zero": ("llama", 1, 2, "1f1b", "none", 1, "fp32", 1),
    "short-bf16": ("llama", 2, 1, "1f1b", "none", 1, "bf16", 1),
    "short-zero-bf16": ("llama", 1, 2, "1f1b", "none", 1, "bf16", 1),
    "short-fp16": ("llama", 2, 1, "1f1b", "none", 1, "fp16", 1),
    "short-zero-fp16": ("llama", 1, 2, "1f1b", "none", 1, "fp16", 1),
    "t5-one": ("t5", 1, 1, "1f1b", "none", 0, "fp32", 4),
    "t5": ("t5", 2, 1, "1f1b", "none", 0, "fp32", 4),
}
LENGTHS, USUAL = {"long": 448, "short": 16}, 128
"""Tokens a sample: of cases with such a word in their name, and of the others."""
REPEATED = 3
"""Further runs of a case whose gradients are reduced, of which the least peak counts: a release by gloo's threads that
is not reported, and over which nothing is allocated, can only make a peak larger."""
TASKS = {"bert": "classification", "t5": "translation"}


def recipe(name: str) -> dict[str, Any]:
    """A case as a recipe."""
    model, pipeline, data, schedule, checkpointing, zero_stage, dtype, micro_batch = CASES[name]
    length = next((length for word, length in LENGTHS.items() if word in name), USUAL)
    return {
        "name": name,
        "task": TASKS.get(model, "causal-lm"),
        "model": {"config": MODELS[model], "dtype": dtype},
        "data": {"train": {"synthetic": True}, "sequence_len": length},
        "train": {"max_steps": 2, "global_batch_size": 4 * micro_batch * data, "micro_batch_size": micro_batch},
        "parallel": {
            "pipeline": pipeline, "data": data, "tensor": 1, "schedule": schedule, "zero_stage": zero_stage,
            "activation_checkpointing": checkpointing,
        },
    }  # fmt: skip


def compare(ranks: Ranks, folder: Path, name: str) -> list[tuple[int, float]]:
    """(measured, predicted) bytes of each stage."""
    from llmpipe_cli.plan.calibration import planned_candidate
    from llmpipe_cli.plan.plan import Plan
    from llmpipe_cli.plan.propose import this_machine

    run, peaks = ranks.run(folder, recipe(name), track=True)
    plan = Plan.load(run / "plan.json")
    if plan.layout.data > 1 or plan.zero_stage:
        for _ in range(REPEATED):
            peaks = [min(pair) for pair in zip(peaks, ranks.run(folder, recipe(name), track=True)[1], strict=True)]
    candidate = planned_candidate(plan, this_machine(2))
    assert candidate is not None
    data = plan.layout.data
    own = [max(peaks[first : first + data]) for first in range(0, len(peaks), data)]
    return [(peak, memory.allocated) for peak, memory in zip(own, candidate.memory, strict=True)]


def main() -> None:
    """Measure, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    errors = []
    with Ranks(2) as ranks:
        for name in arguments.cases:
            for stage, (measured, predicted) in enumerate(compare(ranks, arguments.folder, name)):
                errors.append(predicted / measured - 1)
                print(
                    f"{name:14s} stage {stage}: measured {measured / 1e6:7.2f} MB, predicted {predicted / 1e6:7.2f} MB "
                    f"({errors[-1]:+.1%})",
                    flush=True,
                )
    sizes = [abs(error) for error in errors]
    print(f"{len(sizes)} stages: median error {statistics.median(sizes):.1%}, largest {max(sizes):.1%}")


if __name__ == "__main__":
    main()
