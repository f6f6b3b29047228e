"""Predictions against published training runs: one fixed set of constants for all of them."""

from __future__ import annotations

import csv
import importlib
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
Run = Callable[..., int]


@pytest.fixture(scope="module")
def published() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("published_runs")


@pytest.fixture
def run_script(published: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the script with these arguments."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["published_runs.py", *map(str, arguments)])
        return published.main()

    return run


# Runs that ran out of memory and are said to fit: the source of h078 shows 67 GiB for a model of nearly its size in the
# same layout (r130); that of h088 shows 15 GiB with micro-batches half as large (r179)
@pytest.mark.parametrize(
    ("name", "speeds", "memories", "out_of_memory", "wrongly"),
    [
        ("published_runs.csv", 84, 51, 4, set()),
        ("published_runs_unseen.csv", 105, 69, 6, {"h078", "h088"}),
    ],
)
def test_published_runs(
    published: ModuleType, name: str, speeds: int, memories: int, out_of_memory: int, wrongly: set[str]
) -> None:
    results, left_out = published.compare_all(published.read_rows(FOLDER / name))
    assert not left_out
    errors = sorted(abs(one.time_error) for one in results if one.time_error is not None)
    memory = [abs(one.memory_error) for one in results if one.memory_error is not None]
    assert (len(errors), len(memory)) == (speeds, memories)
    assert statistics.median(errors) <= 0.08
    assert published.percentile_90(errors) <= 0.20
    assert errors[-1] <= 0.35
    assert statistics.median(memory) <= 0.10
    assert {one.run.id for one in results if not one.fits_as_published} == wrongly
    assert sum(one.run.out_of_memory for one in results) == out_of_memory


def test_tables_share_no_run(published: ModuleType) -> None:
    rows = [row for table in published.TABLES for row in published.read_rows(table)]
    facts = (
        "layers",
        "hidden",
        "heads",
        "gpu",
        "gpus",
        "precision",
        "recompute",
        "zero",
        "tp",
        "pp",
        "vpp",
        "mbs",
        "gbs",
    )
    seen = [tuple(row[name] for name in (*facts, "step_s", "tflops_gpu", "mem_gb")) for row in rows]
    assert len(set(seen)) == len(rows)
    assert len({row["id"] for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"layers": ""}, "layers is empty"),
        ({"mbs": "two"}, "mbs is no whole number"),
        ({"dp": "0"}, "dp is below 1"),
        ({"step_s": "nan"}, "step_s is no number above 0"),
        ({"zero": "3"}, "ZeRO stage unknown, or neither 0, 1 nor FSDP"),
        ({"zero": "?"}, "ZeRO stage unknown, or neither 0, 1 nor FSDP"),
        ({"precision": "fp8"}, "not known to be in 16 bit"),
        ({"recompute": ""}, "recomputation unknown"),
        ({"cp": "2"}, "context or expert parallelism"),
        ({"gpus": "96"}, "tp x pp x dp is not the number of devices"),
        ({"pp": "96", "dp": "1"}, "more stages than layers"),
        ({"heads": "7"}, "width, heads and tensor shards do not divide"),
        ({"gbs": "2049"}, "the batch is no whole number of micro-batches"),
        ({"gpu": "TPU"}, "no such device in the table: TPU"),
        ({"gpu": "V100-32GB", "precision": "bf16"}, "a device that does not compute in bf16"),
        ({"framework": "JAX"}, "no profile of the engine JAX"),
        ({"step_s": "", "tflops_gpu": "", "mem_gb": ""}, "nothing was measured"),
        ({"step_s": "", "tflops_kind": "?"}, "how its TFLOP/s were counted is unknown"),
    ],
)
def test_row_left_out(
    published: ModuleType,
    run_script: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    cells: dict[str, str],
    reason: str,
) -> None:
    rows = {row["id"]: row for row in published.read_rows(FOLDER / "published_runs.csv")}
    row = {"cp": "", **rows["r098"], **cells}  # tp 4, pp 12, dp 8
    assert run_script(_table(tmp_path, [row])) == 0
    assert f"left out, 1 of 1: 1 x {reason}\n" in capsys.readouterr().out


def test_row_of_an_unknown_source(
    published: ModuleType, run_script: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = published.read_rows(FOLDER / "published_runs.csv")[0] | {"source": "a blog", "tflops_gpu": "", "mem_gb": "60"}
    assert run_script(_table(tmp_path, [row], encoding="utf-8-sig")) == 0
    shown = capsys.readouterr().out
    assert "links of a blog unknown, 1 x: 2400 Gbit/s a device inside nodes of 8 and 200 between" in shown
    assert "60 GiB, predicted" in shown
    assert "out of memory;" not in shown


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file or directory"),
        (b"a,b\n1,2\n", "is no table of runs: it has no column id, source"),
        (b"\xff\xfe\x00", "is no CSV file"),
    ],
)
def test_table_that_cannot_be_read(
    run_script: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, complaint: str
) -> None:
    table = tmp_path / "runs.csv"
    if content is not None:
        table.write_bytes(content)
    assert run_script(table) == 2
    shown = capsys.readouterr().err
    assert complaint in shown
    assert shown.count("\n") == 1


def test_both_tables_by_default(run_script: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script("--source", "torchtitan") == 0
    shown = capsys.readouterr().out
    assert shown.index("published_runs.csv: 2 of 2 rows") < shown.index("published_runs_unseen.csv: 2 of 2 rows")


def _table(folder: Path, rows: list[dict[str, str]], encoding: str = "utf-8") -> Path:
    path = folder / "runs.csv"
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
