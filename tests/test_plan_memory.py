"""Predicted peak memory against the tensors' bytes that PyTorch's allocator reports on real ranks: exact numbers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
CASES = ("1f1b-full", "zb-h1", "zb-v", "bf16", "zero", "gpt2", "t5", "short-zero-fp16")


@pytest.fixture(scope="module")
def tracked() -> ModuleType:
    for name in ("ranks", "tracked_memory"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("allocations", "peak"),
    [
        ([(1, 100, 8), (2, 108, 4), (3, 100, -8), (4, 200, 6)], 12),
        # a release that no one reported: the next block at the place tells of it, also where it begins elsewhere
        ([(1, 100, 8), (2, 100, 8), (3, 200, 1)], 9),
        ([(1, 100, 8), (2, 104, 16), (3, 200, 1)], 17),
        # one dated too late, and one that is the new block's own
        ([(1, 100, 8), (2, 100, 8), (3, 100, -8), (4, 200, 1)], 9),
        ([(1, 100, 8), (2, 100, 8), (2_000_000, 100, -8), (2_000_001, 200, 1)], 8),
        ([(1, 100, -8), (2, 200, 1)], 1),  # of an earlier job
        ([(1, 100, 8), (2, 300, 64), (40_000_000, 300, -64)], 72),
    ],
)
def test_bytes_alive_are_counted(tracked: ModuleType, allocations: list[tuple[int, int, int]], peak: int) -> None:
    assert sys.modules["ranks"].peak_bytes(reversed(allocations), [(0, 30_000_000)]) == peak


def test_peak_of_tensors(tracked: ModuleType, tmp_path: Path) -> None:
    """Every stage within a tenth of what was allocated."""
    found = {}
    with tracked.Ranks(2) as ranks:
        for name in CASES:
            found[name] = tracked.compare(ranks, tmp_path, name)
    wrong = {
        name: [f"{predicted / measured - 1:+.1%}" for measured, predicted in stages]
        for name, stages in found.items()
        if any(abs(predicted / measured - 1) > 0.10 for measured, predicted in stages)
    }
    assert not wrong
    # the comparison can tell layouts apart: recomputing saves activations
    assert found["1f1b-full"][0][0] < 0.8 * found["zb-h1"][0][0]
