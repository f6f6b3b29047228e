"""A sweep's directory: what is searched, and a line for every trial that began or ended.

    <output_dir>/<name>-sweep-<time>/
      sweep.json       what is searched, and how
      trials.jsonl     {"trial": 3, "event": "start", ...}, {"trial": 3, "event": "end", "state": "complete", ...}
      trials/0003/     the runs of one trial: one, or more when the sweep was stopped while it ran
      sweep.png        the result

The two files alone decide what comes next, so a sweep goes on after its process was killed at any moment. Lines are
synced to disk as they are written; a last line that was cut off is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmpipe_cli.errors import UsageError
from llmpipe_cli.run import RunDirectory, list_runs, read_json, read_metrics, write_json

Report = tuple[int, float]
"""A step, and the metric at it."""


@dataclass
class Trial:
    """One recipe of the sweep.

    Attributes:
        number: counted from 0.
        values: what the recipe's fields are set to, as ``--set`` takes it.
        state: running, complete, pruned or failed. Only a running one is ever gone on with.
        value: the metric at its end; for a pruned one its last, for a failed one None.
        reports: the metric on the way.
        step: the last step.
        seconds: time it took.
        run: its newest run directory.
        message: why it was pruned or failed.
    """

    number: int
    values: dict[str, str]
    state: str = "running"
    value: float | None = None
    reports: list[Report] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0
    run: str | None = None
    message: str | None = None

    @property
    def overrides(self) -> list[str]:
        return [f"{name}={value}" for name, value in self.values.items()]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "reports": [list(report) for report in self.reports]}


class SweepDirectory:
    """Files of one sweep.

    Args:
        path: the folder; `create` makes a new one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @classmethod
    def create(cls, output_dir: Path, name: str, definition: dict[str, Any]) -> SweepDirectory:
        """A new directory with its sweep.json.

        Raises:
            UsageError: the folder cannot be made.
        """
        base, copy = f"{name}-sweep-{time.strftime('%Y%m%d-%H%M%S')}", 1
        while True:
            path = output_dir / (base if copy == 1 else f"{base}-{copy}")
            try:
                (path / "trials").mkdir(parents=True)
                break
            except FileExistsError:
                copy += 1
            except OSError as error:
                message = f"the sweep's directory {path} cannot be made: {error.strerror}"
                raise UsageError(message, hint="set `output_dir` to a folder that can be written") from error
        directory = cls(path)
        write_json(directory.definition_file, definition)
        return directory

    @classmethod
    def find(cls, what: str, output_dir: Path, name: str) -> SweepDirectory | None:
        """The sweep to go on with.

        Args:
            what: a sweep's folder, or ``auto`` for the newest one of this recipe.
            output_dir: where sweeps are.
            name: the recipe's name.

        Returns:
            None when `auto` finds none.

        Raises:
            UsageError: there is no sweep in this folder.
        """
        if what != "auto":
            directory = cls(Path(what))
            if directory.definition() is None:
                raise UsageError("there is no sweep in this folder (no sweep.json)", where=what)
            return directory
        found = [path.parent for path in output_dir.glob("*/sweep.json") if (read_json(path) or {}).get("name") == name]
        return cls(max(found, key=lambda path: path.stat().st_ctime)) if found else None

    @property
    def definition_file(self) -> Path:
        return self.path / "sweep.json"

    @property
    def plot(self) -> Path:
        return self.path / "sweep.png"

    @property
    def _trials(self) -> Path:
        return self.path / "trials.jsonl"

    def folder(self, number: int) -> Path:
        """Where the runs of a trial are."""
        return self.path / "trials" / f"{number:04d}"

    def runs(self, number: int) -> list[RunDirectory]:
        """The trial's runs, oldest first."""
        return list_runs(self.folder(number))

    def definition(self) -> dict[str, Any] | None:
        """What is searched; None when there is no sweep here."""
        content = read_json(self.definition_file)
        return content if isinstance(content, dict) else None

    def trials(self) -> list[Trial]:
        """All trials that began, in their order; those without an end are running."""
        trials: dict[int, Trial] = {}
        for line in read_metrics(self._trials):
            if line["event"] == "start":
                trials.setdefault(line["trial"], Trial(line["trial"], line["values"]))
            elif line["event"] == "end" and line["trial"] in trials:
                fields = {name: line[name] for name in ("state", "value", "step", "seconds", "run", "message")}
                reports = [(int(step), float(value)) for step, value in line["reports"]]
                trials[line["trial"]] = Trial(line["trial"], line["values"], reports=reports, **fields)
        return [trials[number] for number in sorted(trials)]

    def begin(self, trial: Trial) -> None:
        self._append({"trial": trial.number, "event": "start", "time": time.time(), "values": trial.values})

    def end(self, trial: Trial) -> None:
        content = trial.to_json()
        del content["number"]
        self._append({"trial": trial.number, "event": "end", "time": time.time(), **content})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of this sweep; a line that was cut off is dropped first.

        Raises:
            UsageError: another process runs it.
        """
        with self._trials.open("ab+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError("this sweep is running already", where=str(self.path)) from None
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            yield

    def _append(self, line: dict[str, Any]) -> None:
        with self._trials.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
