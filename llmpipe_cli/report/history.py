"""The loss curve of a training job over all the runs it was resumed in.

Resuming makes a new run directory whose plan names the checkpoint it went on from, so a curve is followed backwards
from run to run. Steps that an earlier run did after that checkpoint were thrown away and are not part of it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmpipe_cli.report import formats
from llmpipe_cli.report.progress import Point, Progress
from llmpipe_cli.run import RunDirectory, read_metrics

_STEP = re.compile(r"step-(\d+)$")
_MAX_RESUMES = 1000


@dataclass(frozen=True)
class Part:
    """Steps done in one run: after `after_step`, on one layout."""

    run: RunDirectory
    after_step: int
    layout: str


@dataclass
class History:
    """(step, loss) points over all parts, rising in step; losses that are no numbers are left out."""

    label: str
    train: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


def load_history(run: RunDirectory, *, without_own: bool = False) -> History:
    """The curve that ends in `run`, or where `run` was resumed; runs that are gone are left out."""
    history = History(run.name)
    before = math.inf
    for _ in range(_MAX_RESUMES):
        plan = run.read_plan()
        progress = Progress(run.name)
        for line in [] if without_own and not history.parts else read_metrics(run.metrics):
            progress.add(line)
        train = [point for point in progress.loss_points() if point[0] <= before]
        history.train = train + history.train
        history.validation = [point for point in progress.validation_points() if point[0] <= before] + (
            history.validation
        )
        checkpoint = (plan.get("training") or {}).get("resume_from")
        after = _step_of(checkpoint, train)
        history.parts.insert(0, Part(run, after, formats.layout(plan.get("layout") or {})))
        if not checkpoint:
            break
        before = after
        run = RunDirectory(Path(checkpoint).parent.parent)
        if not run.is_run():
            break
    return history


def compare_histories(one: History, other: History) -> dict[str, Any]:
    """How far two curves are apart at the steps they share.

    Returns:
        {"other", "num_steps", "max_difference", "max_relative_difference"}; the differences are None without any
        common step.
    """
    mine, theirs = dict(one.train), dict(other.train)
    common = sorted(mine.keys() & theirs.keys())
    differences = [abs(mine[step] - theirs[step]) for step in common]
    relative = [
        difference / max(abs(theirs[step]), 1e-12) for difference, step in zip(differences, common, strict=True)
    ]
    return {
        "other": other.label,
        "num_steps": len(common),
        "max_difference": max(differences, default=None),
        "max_relative_difference": max(relative, default=None),
    }


def _step_of(checkpoint: str | None, train: list[Point]) -> int:
    match = _STEP.search(checkpoint or "")
    if match:
        return int(match[1])
    return int(train[0][0]) - 1 if checkpoint and train else 0
