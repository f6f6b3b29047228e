"""Pretraining beside an n-gram: is what a small Llama learns at two stages more than the statistics of five bytes?

    python benchmarks/pretraining.py TRAIN.jsonl VALIDATION.jsonl [--steps 3000] [--order 5]

Both files hold `{"text": ...}` a line. The Llama starts from random weights with a tokenizer trained on the same file,
and is measured by `llmpipe evaluate` (bits per byte of the validation texts). The n-gram is an interpolated modified
Kneser-Ney model over bytes (Chen and Goodman 1998, with their three discounts an order), trained and measured on the
same texts. Exits with 1 unless the Llama needs fewer bits.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from commands import llmpipe, read_rows, write_recipe

_BITS = 9  # of a symbol: a byte, or the start of a text
_START = 256
_BATCH = 8
Symbols = np.ndarray
"""int64 [positions, order]: each byte of the texts, last, behind the symbols before it."""


def main() -> int:
    """Measure both and print one JSON line; returns the exit code."""
    arguments = _arguments()
    train, validation = (
        [row["text"].encode() for row in read_rows(path)] for path in (arguments.train, arguments.validation)
    )
    n_gram = n_gram_bits(train, validation, arguments.order)
    print(f"Kneser-Ney byte {arguments.order}-gram: {n_gram:.4f} bits per byte", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        recipe = write_recipe(folder, _recipe(arguments))
        trained = llmpipe("train", recipe, "--devices", "2", "--resume", "auto", folder=folder)
        metrics = llmpipe("evaluate", recipe, "--checkpoint", trained["checkpoint"], folder=folder)["metrics"]
    figures = {"llmpipe": metrics["bits_per_byte"], f"kneser-ney-{arguments.order}": n_gram}
    print(json.dumps({"bits_per_byte": figures, "steps": trained["step"], **metrics}))
    return 0 if figures["llmpipe"] < n_gram else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=lambda name: Path(name).resolve(), help="JSON Lines with `text`")
    parser.add_argument("validation", type=lambda name: Path(name).resolve(), help="the same, never trained on")
    parser.add_argument("--steps", type=int, default=3000, help=f"optimizer steps of {_BATCH} samples of 128 tokens")
    parser.add_argument("--order", type=int, default=5, help="of the n-gram, in bytes")
    parser.add_argument(
        "--folder", type=lambda name: Path(name).resolve(), help="keep recipe and runs here, and go on with them"
    )
    return parser.parse_args()


def _recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "name": "pretraining",
        "task": "causal-lm",
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 128,
                "intermediate_size": 352,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
                "tie_word_embeddings": False,
            }
        },
        "tokenizer": {"train": {"vocab_size": 4096}},
        "data": {
            "train": {"files": str(arguments.train)},
            "validation": {"files": str(arguments.validation)},
            "sequence_len": 128,
        },
        "train": {
            "max_steps": arguments.steps,
            "global_batch_size": _BATCH,
            "micro_batch_size": 2,
            "learning_rate": 3e-3,
            "adam_beta2": 0.98,
            "weight_decay": 0.1,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.06,
            "min_lr_ratio": 0.1,
        },
        "parallel": {"pipeline": 2},
        "checkpoint": {"every_steps": 500, "keep": 1},
    }


def n_gram_bits(train: list[bytes], validation: list[bytes], order: int) -> float:
    """Bits per byte of the validation texts under an interpolated modified Kneser-Ney model of the training texts."""
    seen, asked = _symbols(train, order), _symbols(validation, order)
    probability = np.full(len(asked), 1 / 256)
    counted = _Counts(_keys(seen, order), np.ones(len(seen), dtype=np.int64))
    levels = [counted]
    for length in range(order - 1, 0, -1):  # how many different symbols stand before each shorter n-gram
        counted = _Counts(_shorter(counted.keys, length), np.ones(len(counted.keys), dtype=np.int64))
        levels.append(counted)
    for length, counted in enumerate(reversed(levels), start=1):
        probability = counted.interpolate(_keys(asked, length), probability)
    return float(-np.log2(probability).mean())


def _symbols(texts: list[bytes], order: int) -> Symbols:
    """Every byte behind the `order - 1` symbols before it; starts of a text stand before its first byte."""
    parts = []
    for text in texts:
        symbols = np.concatenate([np.full(order - 1, _START), np.frombuffer(text, dtype=np.uint8)])
        parts.append(np.lib.stride_tricks.sliding_window_view(symbols.astype(np.int64), order))
    return np.concatenate(parts)


def _keys(symbols: Symbols, length: int) -> np.ndarray:
    """One number for the last `length` symbols of each row, int64."""
    keys = np.zeros(len(symbols), dtype=np.int64)
    for column in range(symbols.shape[1] - length, symbols.shape[1]):
        keys = keys << _BITS | symbols[:, column]
    return keys


def _shorter(keys: np.ndarray, length: int) -> np.ndarray:
    """The last `length` symbols of each key."""
    shorter: np.ndarray = keys & ((1 << _BITS * length) - 1)
    return shorter


class _Counts:
    """Counts of the n-grams of one length, with what interpolation needs of their contexts.

    Args:
        keys: n-grams, repeated or not.
        amounts: how often each counts.
    """

    def __init__(self, keys: np.ndarray, amounts: np.ndarray) -> None:
        self.keys, where = np.unique(keys, return_inverse=True)
        self.counts = np.bincount(where, weights=amounts).astype(np.int64)
        of_counts = [int((self.counts == number).sum()) for number in range(1, 5)]
        share = of_counts[0] / (of_counts[0] + 2 * of_counts[1])
        # D1, D2 and D3+ of Chen and Goodman (1998), equation 26; a bigger count is discounted like a three
        self.discounts = np.zeros(4)
        for n in (1, 2, 3):
            self.discounts[n] = n - (n + 1) * share * of_counts[n] / of_counts[n - 1]
        taken = self.discounts[np.minimum(self.counts, 3)]
        self.contexts, of_context = np.unique(self.keys >> _BITS, return_inverse=True)
        self.totals = np.bincount(of_context, weights=self.counts)
        self.left_over = np.bincount(of_context, weights=taken) / self.totals

    def interpolate(self, asked: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Probabilities of n-grams' last symbols, from those that the order below gives them, float64."""
        place = np.minimum(np.searchsorted(self.keys, asked), len(self.keys) - 1)
        counts = np.where(self.keys[place] == asked, self.counts[place], 0)
        context = np.minimum(np.searchsorted(self.contexts, asked >> _BITS), len(self.contexts) - 1)
        known = self.contexts[context] == asked >> _BITS
        discounted = counts - self.discounts[np.minimum(counts, 3)]
        probability = discounted / self.totals[context] + self.left_over[context] * lower
        return np.where(known, probability, lower)


if __name__ == "__main__":
    sys.exit(main())
