"""What replaying a stage costs: a stage's forward and backward pass beside the same layers called by hand.

    python benchmarks/replay.py [--pairs 40]

By hand means what one would write for this stage of a Llama alone: rotary tables once a micro-batch, then the layers
one after the other, on the last stage the norm, the head and the loss. Replay runs transformers' own forward from its
beginning, with stand-ins for the layers of other stages. The two alternate; the median of the ratios of each pair is
reported, with its quartiles. One process, one thread, fp32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from llmpipe_cli.model.auto import model_class
from llmpipe_cli.model.slicing import SlicePlan, StageReplay, trace_config
from llmpipe_cli.model.stage import build_stage

VOCAB = 4096
BATCH, LENGTH = 2, 256
MODELS = {"8 layers": 8, "24 layers": 24}
TASK = "causal-lm"


def by_hand(model: PreTrainedModel, layers: range, inputs: dict[str, Tensor], last: bool) -> Callable[[Tensor], Tensor]:
    """A function from the hidden states that the stage gets to those that it sends, or to the loss."""
    body = model.model
    positions = torch.arange(LENGTH)[None]

    def run(hidden: Tensor) -> Tensor:
        tables = body.rotary_emb(hidden, position_ids=positions)
        for layer in layers:
            hidden = body.layers[layer](hidden, attention_mask=None, position_embeddings=tables)
        if last:
            logits = model.lm_head(body.norm(hidden))
            return model.loss_function(logits=logits, labels=inputs["labels"], vocab_size=VOCAB)
        return hidden

    return run


def seconds(forward: Callable[[Tensor], Tensor], hidden: Tensor, gradient: Tensor) -> float:
    """Time of one forward and backward pass."""
    received = hidden.clone().requires_grad_()
    started = time.perf_counter()
    result = forward(received)
    result.backward(None if result.dim() == 0 else gradient)
    return time.perf_counter() - started


def compare(model: PreTrainedModel, plan: SlicePlan, start: int, stop: int, pairs: int) -> list[float]:
    """Time by replay over time by hand, of each pair."""
    last = stop == plan.num_segments
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH))
    inputs = {"input_ids": ids, "labels": ids}
    hidden, gradient = (torch.randn(BATCH, LENGTH, model.config.hidden_size) for _ in range(2))
    manual = by_hand(model, range(start - 1, stop - (2 if last else 1)), inputs, last)
    expected = manual(hidden)  # before the replay puts its hooks in
    untouched = build_stage(type(model), model.config, plan, range(start, stop), seed=0)
    manual = by_hand(untouched, range(start - 1, stop - (2 if last else 1)), inputs, last)
    replay = StageReplay(model, plan, start, stop)

    def replayed(carry: Tensor) -> Tensor:
        result: Any = replay((carry,), inputs)
        return result.loss if last else result[0]

    torch.testing.assert_close(replayed(hidden), expected)
    ratios = []
    for pair in range(pairs + 3):
        first, second = (replayed, manual) if pair % 2 else (manual, replayed)
        times = {first: seconds(first, hidden, gradient), second: seconds(second, hidden, gradient)}
        ratios.append(times[replayed] / times[manual])
    return ratios[3:]


def main() -> None:
    """Measure the middle and the last of three stages."""
    parser = argparse.ArgumentParser(description="What replaying a stage costs.")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of steps a stage")
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| model | stage of 3 | replay / by hand | quartiles |\n|---|---|---|---|")
    for name, num_layers in MODELS.items():
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=256, intermediate_size=704, num_hidden_layers=num_layers,
            num_attention_heads=4,
        )  # fmt: skip
        cls = model_class(config, TASK)
        plan = trace_config(cls, config, TASK, sequence_len=LENGTH)
        third = num_layers // 3
        for stage, start, stop in (("2", 1 + third, 1 + 2 * third), ("3", 1 + 2 * third, plan.num_segments)):
            model = build_stage(cls, config, plan, range(start, stop), seed=0)
            ratios = compare(model, plan, start, stop, pairs)
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"| {name} | {stage} | {middle:.4f} | {low:.3f} to {high:.3f} |", flush=True)


if __name__ == "__main__":
    main()
