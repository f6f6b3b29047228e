"""Tables of runs and of one run's facts."""

from __future__ import annotations

import time
from typing import Any

from rich.table import Table
from rich.text import Text

from llmpipe_cli.report import formats
from llmpipe_cli.report.history import load_history
from llmpipe_cli.report.progress import Progress
from llmpipe_cli.run import RunDirectory, read_json, read_metrics_summary

_STATE_STYLES = {"done": "green", "running": "cyan", "stopped": "yellow", "failed": "red", "lost": "red"}


def progress_of(run: RunDirectory, *, with_earlier: bool = True) -> Progress:
    """A state with the run's title and the curve it was resumed from; its own metrics are still to be added."""
    plan = run.read_plan()
    words = [
        (plan.get("recipe") or {}).get("task"),
        plan.get("model_type"),
        formats.layout(plan["layout"]) if plan.get("layout") else None,
        plan.get("device"),
    ]
    job, training = plan.get("job", "train"), plan.get("training") or {}
    progress = Progress(run.name, " · ".join(str(word) for word in words if word), job=job)
    if job in ("train", "bench"):
        progress.max_steps = training.get("max_steps")
    if with_earlier and training.get("resume_from"):
        before = load_history(run, without_own=True)
        progress.earlier_train, progress.earlier_validation = before.train, before.validation
    return progress


def describe_run(run: RunDirectory) -> dict[str, Any]:
    """The facts of one run, as `runs ls --json` and `runs show --json` print them."""
    plan, status = run.read_plan(), run.status()
    progress = progress_of(run, with_earlier=False)
    for line in read_metrics_summary(run.metrics):
        progress.add(line)
    checkpoint = run.latest_checkpoint()
    training = plan.get("training") or {}
    return {
        "name": run.name,
        "path": str(run.path),
        "job": plan.get("job", "train"),
        "state": status["state"],
        "exit_code": status.get("exit_code"),
        "message": status.get("message"),
        "layout": plan.get("layout"),
        "step": progress.step,
        "max_steps": progress.max_steps,
        "loss": progress.last.get("loss"),
        "tokens_per_second": progress.tokens_per_second(),
        "validation": progress.evaluations[-1]["metrics"] if progress.evaluations else read_evaluation(run),
        "checkpoint": str(checkpoint) if checkpoint else None,
        "resumed_from": training.get("resume_from"),
        "started": (read_json(run.controller_file) or {}).get("started"),
        "ended": status.get("time"),
    }


def read_evaluation(run: RunDirectory) -> dict[str, Any]:
    """Metrics of an evaluate job; empty for others."""
    return (read_json(run.evaluation) or {}).get("metrics") or {}


def runs_table(rows: list[dict[str, Any]]) -> Table:
    """One line a run, from `describe_run`."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    for name in ("job", "state", "layout"):
        table.add_column(name, no_wrap=True)
    for name in ("step", "loss", "val loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        of = f"/{row['max_steps']}" if row["max_steps"] and row["job"] == "train" else ""
        table.add_row(
            row["name"],
            row["job"],
            Text(row["state"], style=_STATE_STYLES.get(row["state"], "")),
            formats.layout(row["layout"]) if row["layout"] else "–",
            f"{row['step']}{of}" if row["step"] or of else "–",
            formats.loss(row["loss"]),
            formats.loss(row["validation"].get("loss")),
        )
    return table


def run_details(run: RunDirectory) -> Table:
    """Name and value lines of one run."""
    facts = describe_run(run)
    state = Text(facts["state"], style=_STATE_STYLES.get(facts["state"], ""))
    if facts["exit_code"]:
        state.append(f" (exit code {facts['exit_code']})", style="dim")
    started, ended = facts["started"], facts["ended"]
    rows: list[tuple[str, Any]] = [("run", str(run.path)), ("state", state)]
    if facts["message"]:
        rows.append(("reason", facts["message"]))
    elif facts["state"] == "lost":
        goes_on = "; --resume auto goes on from its checkpoint" if facts["checkpoint"] else ""
        rows.append(("reason", f"the process that started it is gone, and its ranks with it{goes_on}"))
    if started:
        rows.append(("started", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started))))
        if ended:
            rows.append(("took", formats.duration(ended - started)))
    if facts["resumed_from"]:
        rows.append(("went on from", facts["resumed_from"]))
    rows.append(("checkpoint", facts["checkpoint"] or "none"))
    return key_value_table(rows)


def key_value_table(rows: list[tuple[str, Any]]) -> Table:
    """Two columns without lines; values are never shortened."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value if isinstance(value, Text) else Text(str(value)))
    return table
