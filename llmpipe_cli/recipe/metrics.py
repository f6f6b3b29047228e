"""Which way a metric gets better; asked by early stopping, kept checkpoints and sweeps."""

from __future__ import annotations

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"})


def is_lower_better(metric: str) -> bool:
    """True for losses and perplexities; every other metric is a score, and higher is better."""
    return metric in LOWER_IS_BETTER
