"""The timeline of a step: written by real ranks, aligned, drawn, exported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import Job
from rank_pool import RankPool
from typer.testing import CliRunner

from llmpipe_cli.cli.app import app
from llmpipe_cli.engine.schedules import zb_h1
from llmpipe_cli.errors import UsageError
from llmpipe_cli.report.timeline import load_timeline, parse_timeline, plot, render, steps_recorded, summary
from llmpipe_cli.run import RunDirectory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDirectory]:
    """Four steps of a two-stage ZB-H1 training."""
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    recipe: dict[str, Any] = {
        "name": "timeline",
        "model": {"config": {"model_type": "llama", "vocab_size": 100, **fields}},
        "data": {"train": {"synthetic": True}, "sequence_len": 16},
        "train": {"max_steps": 4, "global_batch_size": 4, "micro_batch_size": 1},
        "parallel": {"pipeline": 2, "schedule": "zb-h1"},
    }
    job = Job(tmp_path_factory.mktemp("timeline"), recipe)
    with RankPool(2) as pool:
        yield job.train(pool)


def test_recorded_instructions_are_the_schedule(run: RunDirectory) -> None:
    assert steps_recorded(run) == [3, 4]
    timeline = load_timeline(run)
    assert (timeline.step, timeline.schedule) == (4, "zb-h1")
    for rank in timeline.ranks:
        assert [bar.instruction for bar in rank.instructions()] == zb_h1(rank.stage, 2, 4)
        assert all(a.end <= b.start for a, b in zip(rank.bars, rank.bars[1:], strict=False))
    assert [rank.stage for rank in timeline.ranks] == [0, 1]


def test_a_forward_pass_starts_after_the_one_it_needs(run: RunDirectory) -> None:
    first, second = load_timeline(run).ranks
    ends = {bar.micro_batch: bar.start for bar in first.instructions() if bar.kind == "F"}
    starts = {bar.micro_batch: bar.end for bar in second.instructions() if bar.kind == "F"}
    assert all(starts[index] > ends[index] for index in range(4))


def test_summary_accounts_for_the_step(run: RunDirectory) -> None:
    facts = summary(load_timeline(run))
    for rank in facts["ranks"]:
        assert 0.0 < sum(rank["seconds"].values()) <= facts["step_seconds"] + 1e-6
        assert {"F", "data", "optimizer"} <= rank["seconds"].keys()
    assert 0.0 < facts["bubble_fraction"] < 1.0
    assert facts["simulated_pipeline_seconds"] > 0.0


def test_command_draws_and_exports(run: RunDirectory, tmp_path: Path) -> None:
    png, svg, trace = tmp_path / "t.png", tmp_path / "t.svg", tmp_path / "t.json"
    result = CliRunner().invoke(app, ["runs", "timeline", str(run.path), "--png", str(png), "--trace", str(trace)])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("stage ")]
    assert len([line for line in lines if "F" in line and "W" in line]) >= 1
    assert png.read_bytes().startswith(b"\x89PNG")
    plot(load_timeline(run), svg)
    assert "<svg" in svg.read_text()
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert sum(event["cat"] == "F" for event in events) == 8
    as_json = CliRunner().invoke(app, ["runs", "timeline", str(run.path), "--step", "3", "--json"])
    assert json.loads(as_json.stdout)["step"] == 3


def _written(records: list[list[tuple[str, int | None, float, float, float]]]) -> dict[str, Any]:
    names = ("kind", "micro_batch", "begin", "start", "end")
    ranks = [
        {"rank": i, "stage": i, "replica": 0, "records": [dict(zip(names, row, strict=True)) for row in rows]}
        for i, rows in enumerate(records)
    ]
    return {"step": 1, "schedule": "1f1b", "ranks": ranks}


def test_ranks_are_laid_over_each_other_where_they_ended() -> None:
    timeline = parse_timeline(
        _written(
            [
                [("F", 0, 0.0, 0.0, 1.0), ("B", 0, 1.0, 5.0, 7.0), ("exchange", None, 7.0, 8.0, 8.0)],
                [("F", 0, 10.0, 11.0, 12.0), ("B", 0, 12.0, 12.0, 15.0), ("exchange", None, 15.0, 18.0, 18.0)],
            ]
        )
    )
    first, second = timeline.ranks
    assert first.bars[0].start == 10.0
    assert second.seconds("wait") == 4.0
    assert timeline.seconds == 18.0
    facts = summary(timeline)
    assert facts["pipeline_seconds"] == 7.0
    assert facts["bubble_fraction"] == pytest.approx(1 - 3.5 / 7.0)
    assert facts["simulated_pipeline_seconds"] == 7.0


def test_terminal_columns_show_what_took_most_time() -> None:
    rows = [("F", 0, 0.0, 0.0, 2.0), ("B", 0, 2.0, 6.0, 10.0)]
    text = render(parse_timeline(_written([rows])), width=29).plain.splitlines()
    assert text[1] == "stage 0  FFFF········BBBBBBBB"


def test_no_timeline_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no timeline"):
        load_timeline(RunDirectory.create(tmp_path, "empty"))
