"""`llmpipe bench`: combinations of fields, and figures from real runs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, steps
from rank_pool import RankPool
from rich.console import Console
from typer.testing import CliRunner

from llmpipe_cli.cli.app import app
from llmpipe_cli.cli.bench import combinations
from llmpipe_cli.errors import UsageError
from llmpipe_cli.report.bench import Contender, bench_rows, bench_tables, plot, split_table


def test_combinations() -> None:
    assert combinations([]) == [[]]
    assert combinations(["a.b=1,2", "c=x"]) == [["a.b=1", "c=x"], ["a.b=2", "c=x"]]
    for wrong in ("a", "=1", "a=1,,2", "a="):
        with pytest.raises(UsageError, match="FIELD=A,B"):
            combinations([wrong])


def test_a_narrow_terminal_gets_two_tables_with_nothing_cut_off() -> None:
    row = {
        "system": "pipeline=1 schedule=zb-h1", "layout": {"pipeline": 1, "tensor": 1, "data": 1}, "schedule": "zb-h1",
        "tokens_per_second": 12345.6, "step_seconds": 0.123, "speedup": 1.0, "speedup_range": [0.9, 1.1], "mfu": None,
        "efficiency": 1.0, "bubble_fraction": 0.2, "simulated_bubble_fraction": 0.2, "memory_bytes": [2**29, 2**29],
    }  # fmt: skip
    assert len(bench_tables([row], 0, 200)) == 1
    narrow = Console(width=80, file=io.StringIO())
    narrow.print(*bench_tables([row], 0, 80))
    assert isinstance(narrow.file, io.StringIO)
    printed = narrow.file.getvalue()
    assert "\u2026" not in printed, "nothing is cut off"
    assert "512 MiB 512 MiB" in printed


def test_rows_of_real_runs(tmp_path: Path) -> None:
    # Passes of milliseconds: a stage that loses its core in between is not taken for one that waits.
    fields = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    recipe: dict[str, Any] = {
        "name": "bench",
        "model": {"config": {"model_type": "llama", "vocab_size": 100, **fields}},
        "data": {"train": {"synthetic": True}, "sequence_len": 128},
        "train": {"max_steps": 3, "global_batch_size": 4, "micro_batch_size": 1},
    }
    job = Job(tmp_path, recipe)
    contenders = []
    with RankPool(2) as pool:
        for parallel in ({"pipeline": 1}, {"pipeline": 2, "schedule": "zb-h1"}):
            plan = job.plan(job="bench", parallel=parallel)
            run = job.start(plan)
            pool.run_well(run, plan.layout.num_ranks)
            contenders.append(Contender(str(parallel), plan.layout.model_dump(), plan.schedule, [run]))
            assert len(steps(run)) == 3
            assert not list(run.checkpoints.iterdir()), "a bench saves nothing"
        stopped = job.start(plan)
        stopped.request_stop()
        assert pool.run(stopped, 2) == [75, 75]
        assert len(steps(stopped)) == 1
    one, two = bench_rows(contenders, baseline=0, warmup=1)
    seconds = sorted(line["step_seconds"] for line in steps(contenders[1].runs[0])[1:])
    assert two["step_seconds"] == pytest.approx(sum(seconds) / 2)
    assert one["speedup"] == one["efficiency"] == 1.0
    assert two["speedup"] == pytest.approx(two["tokens_per_second"] / one["tokens_per_second"])
    assert two["efficiency"] == pytest.approx(two["speedup"] / 2)
    assert len(two["memory_bytes"]) == 2
    assert 0.0 <= one["bubble_fraction"] < two["bubble_fraction"] < 1.0
    assert bench_tables([one, two], 0, 200)[0].row_count == split_table([one, two]).row_count == 2
    for row in (one, two):
        assert sum(row["step_split"].values()) == pytest.approx(1.0, abs=1e-6)
        assert row["step_split"]["busy"] > 0.0
        assert row["mfu"] is None, "a core's peak is not known"
    assert one["step_split"]["wait_activations"] < 0.01 < two["step_split"]["wait_activations"]
    assert plot([one, two], tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    known = Contender("x", contenders[1].layout, "zb-h1", contenders[1].runs, flops_per_token=6e5, peak_flops=1e9)
    (row,) = bench_rows([known], baseline=0, warmup=1)
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 6e5 / 2e9)


def test_dry_run_starts_nothing_and_measures_each_work_once(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 64}
    values = {
        "name": "b",
        "model": {"config": config},
        "data": {"train": {"synthetic": True}, "sequence_len": 16},
        "train": {"global_batch_size": 4},
        "output_dir": str(tmp_path / "runs"),
    }
    recipe.write_text(json.dumps(values))
    compare = ["--compare", "parallel.pipeline=1,2", "--compare", "parallel.schedule=1f1b,zb-h1"]
    result = CliRunner().invoke(app, ["bench", str(recipe), *compare, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("layout: ") == 3  # one stage has only one order
    result = CliRunner().invoke(app, ["bench", str(recipe), *compare, "--dry-run", "--json"])
    assert len(json.loads(result.stdout)["runs"]) == 3
    assert not (tmp_path / "runs").exists()
