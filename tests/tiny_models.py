"""Tiny models and pipelines of stages in one process, for tests; see `llmpipe_cli.model.parity`."""

from __future__ import annotations

import torch

from llmpipe_cli.model.parity import (
    Outcome,
    Pipeline,
    copy_stage,
    difference,
    run_whole,
    tiny_inputs,
    tiny_model,
)
from llmpipe_cli.model.tiny import tiny_config

__all__ = [
    "Outcome",
    "Pipeline",
    "assert_same",
    "copy_stage",
    "run_whole",
    "tiny_config",
    "tiny_inputs",
    "tiny_model",
]


def assert_same(found: Outcome, expected: Outcome) -> None:
    """Loss to 1e-6 relative, each gradient to 1e-5 of its largest element."""
    assert torch.isfinite(expected.loss)
    assert difference(found, expected) is None
