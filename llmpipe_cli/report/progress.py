"""What is known about a running job, gathered line by line from its metrics.jsonl.

The live view, the plain lines and the summary all draw this one state, so a picture of a finished run is made the same
way as the view that was seen while it ran.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

_RECENT_STEPS = 20

Point = tuple[float, float]


@dataclass(frozen=True)
class StageUse:
    """How a pipeline stage spent the last steps; shares of the step's time, peak memory in bytes."""

    busy: float
    waiting: float
    memory_bytes: int


@dataclass
class Progress:
    """The state of one job.

    Args:
        title: the run's name.
        subtitle: a few words on what runs where.
        max_steps: steps of the whole job; None until known.
        job: train, evaluate or generate.
        earlier_train: (step, loss) points of the runs that this one was resumed from.
        earlier_validation: the same for validation.
    """

    title: str
    subtitle: str = ""
    max_steps: int | None = None
    job: str = "train"
    earlier_train: list[Point] = field(default_factory=list)
    earlier_validation: list[Point] = field(default_factory=list)
    phase: str = "starting the ranks"
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    first_step: int = 0
    done: int = 0
    total: int | None = None
    ended: str = ""
    """How the run stands if it does not go on: done, stopped, failed or lost."""

    def add(self, line: dict[str, Any]) -> None:
        """Take in one line of metrics.jsonl; unknown kinds of line are left aside."""
        event = line.get("event")
        if event is None:
            if "step" in line and "loss" in line:
                self.phase = "training"
                self.steps.append(line)
        elif event == "start":
            self.max_steps = line.get("max_steps") or None
            self.first_step = int(line.get("step") or 0)
            self.phase = "running"
        elif event == "progress":
            self.phase = str(line.get("name") or line.get("what") or self.phase)
            self.done, self.total = int(line.get("done", 0)), line.get("total")
        elif event == "token":
            self.phase, self.done, self.total = "generating", int(line.get("step", 0)), self.max_steps
        elif event == "evaluation":
            self.evaluations.append(line)
        elif event == "checkpoint":
            self.checkpoint = line
        elif event in ("warning", "fault"):
            self.warnings.append(str(line.get("message", event)))
        elif event == "end":
            self.phase = "done"

    @property
    def last(self) -> dict[str, Any]:
        """The newest step line; empty before the first step."""
        return self.steps[-1] if self.steps else {}

    @property
    def step(self) -> int:
        return int(self.last.get("step", self.first_step))

    @property
    def fraction(self) -> float:
        """Share of the job that is done, 0 to 1."""
        if self.total and not self.steps:
            return min(1.0, self.done / self.total)
        return min(1.0, self.step / self.max_steps) if self.max_steps else 0.0

    def tokens_per_second(self) -> float | None:
        """Rate over the recent steps."""
        recent = self._recent()
        seconds = sum(_number(line, "step_seconds") for line in recent)
        tokens = sum(_number(line, "tokens_per_second") * _number(line, "step_seconds") for line in recent)
        return tokens / seconds if seconds > 0 else None

    def seconds_left(self) -> float | None:
        """Steps still to do at the median pace of the recent ones."""
        recent = [_number(line, "step_seconds") for line in self._recent()]
        if not recent or not self.max_steps:
            return None
        return max(0, self.max_steps - self.step) * statistics.median(recent)

    def stages(self) -> list[StageUse]:
        """Use of each stage over the recent steps."""
        recent = [line["stages"] for line in self._recent() if line.get("stages")]
        if not recent:
            return []
        uses = []
        for stage in range(len(recent[-1])):
            entries = [stages[stage] for stages in recent if stage < len(stages)]
            busy = sum(_number(entry, "busy_seconds") for entry in entries)
            waiting = sum(_number(entry, "wait_seconds") for entry in entries)
            whole = busy + waiting
            memory_bytes = max(int(_number(entry, "memory_bytes")) for entry in entries)
            uses.append(StageUse(busy / whole if whole else 0.0, waiting / whole if whole else 0.0, memory_bytes))
        return uses

    def loss_points(self) -> list[Point]:
        """(step, training loss), those of earlier runs first, finite ones only."""
        points = [(float(line["step"]), float(line["loss"])) for line in self.steps if line["loss"] is not None]
        return self.earlier_train + [point for point in points if math.isfinite(point[1])]

    def validation_points(self) -> list[Point]:
        """(step, validation loss), those of earlier runs first, finite ones only."""
        points = [
            (float(line["step"]), float(line["metrics"]["loss"]))
            for line in self.evaluations
            if "step" in line and line.get("metrics", {}).get("loss") is not None
        ]
        return self.earlier_validation + [point for point in points if math.isfinite(point[1])]

    def _recent(self) -> list[dict[str, Any]]:
        # The first step of a process includes compiling and warming up.
        steps = self.steps[1:] if len(self.steps) > 2 else self.steps
        return steps[-_RECENT_STEPS:]


def _number(mapping: dict[str, Any], key: str) -> float:
    value = mapping.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0
