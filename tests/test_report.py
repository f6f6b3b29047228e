"""What people look at: the live view fits its terminal and shows the run's numbers, plots and tables hold the data."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from llmpipe_cli.report import curve, formats
from llmpipe_cli.report.history import compare_histories, load_history
from llmpipe_cli.report.live import LiveView, PlainView, export_svg, make_view, render
from llmpipe_cli.report.plots import plot_loss
from llmpipe_cli.report.progress import Progress
from llmpipe_cli.report.summary import evaluation_table, training_summary
from llmpipe_cli.report.tables import describe_run, progress_of, run_details, runs_table
from llmpipe_cli.run import RunDirectory, write_json
from tests.sample_metrics import metrics_lines, write_metrics


def progress_at(step: int, num_stages: int = 2, max_steps: int = 300) -> Progress:
    progress = Progress("demo-20260101-120000", "causal-lm · llama · 2 stages · cpu")
    for line in metrics_lines(step, num_stages, max_steps=max_steps):
        progress.add(line)
    return progress


def text_of(renderable: object, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("height", [15, 23, 50])
@pytest.mark.parametrize(("step", "num_stages"), [(0, 2), (1, 1), (170, 2), (170, 64)])
def test_view_fits_the_terminal(width: int, height: int, step: int, num_stages: int) -> None:
    lines = text_of(render(progress_at(step, num_stages), width, height), width).splitlines()
    assert len(lines) <= height
    assert max(len(line) for line in lines) <= min(width, 120)


def test_view_shows_the_numbers_of_the_run() -> None:
    progress = progress_at(170)
    view = text_of(render(progress, 80, 23), 80)
    last = progress.steps[-1]
    assert "step 170 of 300" in view
    assert " 57%" in view
    assert f"loss {last['loss']:.3f}" in view
    assert "learning rate 3.00e-4" in view
    assert f"grad norm {last['grad_norm']:.3f}" in view
    assert "validation  loss 4.552 perplexity 94.84  at step 150" in view
    assert "checkpoint  step-00000150  saved in 1.2 s" in view
    # Means of the last 20 steps.
    recent = progress.steps[-20:]
    rate = sum(4096 for _ in recent) / sum(line["step_seconds"] for line in recent)
    assert f"tokens/s {rate:,.0f}" in view
    for stage in (0, 1):
        busy = sum(line["stages"][stage]["busy_seconds"] for line in recent)
        whole = sum(line["step_seconds"] for line in recent)
        row = re.search(rf"stage {stage} (█+)(░+) +(\d+)% busy +(\d+)% waiting +(\d+) MiB", view)
        assert row is not None
        assert int(row[3]) == round(100 * busy / whole)
        assert int(row[3]) + int(row[4]) in (99, 100, 101)
        assert int(row[5]) == 310 + 12 * stage
        assert len(row[1]) / (len(row[1]) + len(row[2])) == pytest.approx(busy / whole, abs=0.03)


def test_time_left_is_the_median_pace_of_the_steps_to_come() -> None:
    progress = Progress("run")
    progress.add({"event": "start", "step": 0, "max_steps": 100})
    for step in range(1, 41):
        seconds = 60.0 if step in (1, 30) else 2.0
        progress.add({"step": step, "loss": 1.0, "step_seconds": seconds, "tokens_per_second": 10.0})
    assert progress.seconds_left() == 120.0


def test_resumed_run_counts_from_its_checkpoint() -> None:
    progress = Progress("run")
    progress.add({"event": "start", "step": 50, "max_steps": 100})
    assert (progress.step, progress.fraction) == (50, 0.5)


def test_progress_of_evaluation_and_generation() -> None:
    progress = Progress("run", job="evaluate")
    progress.add({"event": "start", "step": 0, "max_steps": 0})
    progress.add({"event": "progress", "name": "blocks", "done": 3, "total": 12})
    assert progress.fraction == 0.25
    assert "blocks" in text_of(render(progress, 80, 23))
    progress = Progress("run", job="generate")
    progress.add({"event": "start", "step": 0, "max_steps": 8})
    progress.add({"event": "token", "step": 6, "active": 2})
    assert progress.fraction == 0.75


def test_curve_draws_where_the_values_are() -> None:
    falling = [(float(step), 10.0 - step) for step in range(10)]
    rows = [row.plain for row in curve.draw(falling, [], 40, 6, line_style="", mark_style="")]
    assert {len(row) for row in rows} == {40}
    assert [row.split("┤")[0].strip() for row in rows if "┤" in row] == ["10.0", "5.50", "1.00"]
    cells = [row[7:] for row in rows[:6]]
    first_column = ["".join(cells[row][0]) for row in range(6)]
    assert first_column[0] != " "
    assert first_column[1:] == [" "] * 5
    assert cells[5][-1] != " "
    assert all(any(cell != " " for cell in row) for row in cells), "a straight line passes through every row"
    assert rows[-1].endswith("step 9")


@pytest.mark.parametrize("points", [[], [(5.0, 2.0)], [(1.0, 3.0), (2.0, 3.0)], [(0.0, 0.0), (1.0, 0.0)]])
def test_curve_of_little_data(points: list[tuple[float, float]]) -> None:
    rows = curve.draw(points, [], 40, 5, line_style="", mark_style="")
    assert {len(row.plain) for row in rows} == {40}
    labels = [row.plain.split("┤")[0].strip() for row in rows if "┤" in row.plain]
    assert len(set(labels)) == 3


def test_plain_view_writes_lines_without_control_characters() -> None:
    console = Console(file=io.StringIO(), width=80)
    view = make_view(Progress("demo", "2 stages"), console)
    assert isinstance(view, PlainView)
    view.start()
    view.add(metrics_lines(60, max_steps=60))
    view.add([{"event": "warning", "message": "a [bold]warning[/bold]"}])
    view.stop()
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "demo: 2 stages"
    assert lines[1].startswith("step 1/60  loss 8.9")
    assert lines[2].startswith("step 50/60  loss 6.182  learning rate 3.00e-4  grad norm ")
    assert lines[3] == "validation  loss 6.280 perplexity 533.54  at step 50"
    assert lines[4] == "checkpoint  step-00000050  saved in 1.2 s"
    assert lines[5].startswith("step 60/60  loss 5.875  ")
    assert lines[6] == "warning: a [bold]warning[/bold]"
    assert "\x1b" not in console.file.getvalue()


@pytest.mark.parametrize(("environment", "live"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_which_view(environment: dict[str, str], live: bool) -> None:
    class Utf8(io.StringIO):
        encoding = "utf-8"

    console = Console(
        file=Utf8(), force_terminal=True, width=80, height=24, _environ={"TERM": "xterm-256color", **environment}
    )
    assert isinstance(make_view(Progress("demo"), console), LiveView) is live


def test_the_cursor_rests_on_an_empty_line() -> None:
    """What the terminal itself writes there, such as ^C, must not move the lines that are drawn again."""
    file = io.StringIO()
    console = Console(file=file, width=80, height=24, force_terminal=True, legacy_windows=False)
    view = LiveView(progress_at(170), console)
    view.start()
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).split("\n")
    view.stop()
    assert (drawn[-1], drawn[-2].strip() != "") == ("", True)
    assert len(drawn) <= 24, "the view does not scroll the terminal"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (7500, "2 h 05 min"), (280000, "3 d 5 h"), (None, "–")],
)
def test_duration(value: float | None, text: str) -> None:
    assert formats.duration(value) == text


def test_number_formats() -> None:
    assert [formats.loss(value) for value in (10.4249, 4.2131, 0.03121, math.nan)] == [
        "10.42",
        "4.213",
        "0.0312",
        "nan",
    ]
    assert [formats.memory(value) for value in (0, 312 * 2**20, 3 * 2**29)] == ["–", "312 MiB", "1.5 GiB"]
    assert [formats.count(value) for value in (953.4, 18930, 1.89e6)] == ["953", "18,930", "1.89 M"]
    assert [formats.learning_rate(value) for value in (3e-4, 0, None)] == ["3.00e-4", "0", "–"]
    assert formats.layout({"pipeline": 2, "tensor": 1, "data": 2}) == "2 stages × 2 replicas"
    assert formats.layout({"pipeline": 1, "tensor": 1, "data": 1}) == "1 device"


Layout = tuple[int, int, int]


def make_run(
    folder: Path, name: str, layout: Layout, first: int, last: int, resumed: Path | None = None
) -> RunDirectory:
    """A run directory as a training job of 60 steps leaves it."""
    run = RunDirectory.create(folder, name)
    plan = {
        "job": "train",
        "model_type": "llama",
        "device": "cpu",
        "recipe": {"task": "causal-lm"},
        "layout": dict(zip(("pipeline", "tensor", "data"), layout, strict=True)),
        "training": {"max_steps": 60, "resume_from": str(resumed) if resumed else None},
    }
    write_json(run.plan, plan)
    write_metrics(run.metrics, metrics_lines(last, layout[0], first=first, max_steps=60, evaluate_every=20))
    run.write_status("done", 0)
    return run


@pytest.fixture
def reshaped(tmp_path: Path) -> RunDirectory:
    """Three runs, each resumed from the one before at step 20 and 40; the second went on to 43 before it was lost."""
    first = make_run(tmp_path, "reshaped", (2, 1, 1), 1, 20)
    second = make_run(tmp_path, "reshaped", (1, 1, 1), 21, 43, first.checkpoint(20))
    return make_run(tmp_path, "reshaped", (2, 1, 2), 41, 60, second.checkpoint(40))


def test_history_follows_resumed_runs(reshaped: RunDirectory, tmp_path: Path) -> None:
    history = load_history(reshaped)
    assert [step for step, _ in history.train] == list(range(1, 61))
    assert [step for step, _ in history.validation] == [20, 40, 60]
    assert [(part.after_step, part.layout) for part in history.parts] == [
        (0, "2 stages"),
        (20, "1 device"),
        (40, "2 stages × 2 replicas"),
    ]
    before = progress_of(reshaped)
    assert before.loss_points() == history.train[:40]
    assert before.validation_points() == history.validation[:2]
    undisturbed = make_run(tmp_path, "undisturbed", (1, 1, 1), 1, 60)
    same = compare_histories(history, load_history(undisturbed))
    assert same == {
        "other": undisturbed.name,
        "num_steps": 60,
        "max_difference": 0.0,
        "max_relative_difference": 0.0,
    }
    lines = metrics_lines(60, 1)
    next(line for line in lines if line.get("step") == 30)["loss"] += 0.5
    write_metrics(undisturbed.metrics, lines)
    other = compare_histories(history, load_history(undisturbed))
    assert other["max_difference"] == pytest.approx(0.5)


def test_plot_holds_each_part_in_its_colour(reshaped: RunDirectory, tmp_path: Path) -> None:
    from matplotlib import image

    undisturbed = make_run(tmp_path, "undisturbed", (1, 1, 1), 1, 60)
    histories = [load_history(reshaped), load_history(undisturbed)]
    path = plot_loss(histories, tmp_path / "plots" / "loss.png")
    pixels = image.imread(path)[..., :3]
    assert pixels.shape == (900, 1350, 3)

    def where(color: str) -> np.ndarray:
        wanted = np.array([int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)])
        return np.argwhere(np.abs(pixels - wanted).max(axis=-1) < 0.02)

    columns = [where(color)[:, 1] for color in ("#0f7c90", "#d1603d", "#5b4b9a")]
    for found in columns:
        assert len(found) > 200
    # Text and legend aside, the parts lie side by side from left to right.
    assert np.median(columns[1]) < np.median(columns[2])
    beneath = where("#b9c0c7")
    assert len(beneath) > 1000
    alone = image.imread(plot_loss(histories[:1], tmp_path / "alone.png"))
    assert alone.shape[:2] == (750, 1350)


def test_svg_of_a_run(reshaped: RunDirectory, tmp_path: Path) -> None:
    path = tmp_path / "view.svg"
    export_svg(progress_at(170), path)
    text = path.read_text().replace("&#160;", " ")
    assert text.startswith("<svg")
    assert "demo-20260101-120000" in text
    assert "stage 1" in text


def test_tables_and_summary(reshaped: RunDirectory, tmp_path: Path) -> None:
    facts = describe_run(reshaped)
    assert (facts["state"], facts["step"], facts["max_steps"]) == ("done", 60, 60)
    assert facts["resumed_from"].endswith("step-00000040")
    json.dumps(facts)
    table = text_of(runs_table([facts]), 120)
    assert re.search(rf"{reshaped.name} +train +done +2 stages × 2 replicas +60/60 +\d\.\d+ +\d\.\d+", table)
    details = text_of(run_details(reshaped), 200)
    assert "went on from" in details
    progress = progress_at(100)
    first, last = progress.loss_points()[0][1], progress.loss_points()[-1][1]
    summary = text_of(training_summary(reshaped, progress, Path("c"), Path("p.png"), 0), 200)
    assert f"{first:.3f} → {last:.3f}  ({100 * (1 - last / first):.0f} % lower)" in summary
    assert "done after step 100" in summary
    result = {"task": "causal-lm", "metrics": {"loss": 3.1234567, "perplexity": 22.7}, "num_samples": 1000}
    printed = text_of(evaluation_table(result))
    assert "3.123457" in printed
    assert "1,000 samples" in printed
