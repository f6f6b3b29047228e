"""Predictions against published training runs: one fixed set of constants for all of them."""

from __future__ import annotations

import csv
import importlib.util
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def published() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published_runs", FOLDER / "published_runs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_published_runs(published: ModuleType) -> None:
    rows = [row for row in csv.DictReader((FOLDER / "published_runs.csv").open()) if published.is_counted(row)]
    results = [published.compare(row) for row in rows]
    errors = sorted(abs(one.time_error) for one in results if one.time_error is not None)
    memory = [abs(one.memory_error) for one in results if one.memory_error is not None]
    assert len(errors) == 84
    assert len(memory) == 51
    assert statistics.median(errors) <= 0.08
    assert errors[int(0.9 * len(errors))] <= 0.20
    assert errors[-1] <= 0.35
    assert statistics.median(memory) <= 0.10
    assert all(one.fits_as_published for one in results)
    assert sum(not one.fits for one in results) == 4
