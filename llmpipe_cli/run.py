"""A run directory: everything one job reads and writes, under one folder that is never reused.

    runs/<name>-<time>/  recipe.yaml · recipe.lock.yaml · plan.json · launch.sh · metrics.jsonl · status.json
      logs/rank-00003.log, logs/rank-00003.error.json, logs/launcher.log     what each process said
      control/stop, control/controller.json, control/rank-00003.json         how controller and ranks talk
      checkpoints/step-00001000/, checkpoints/latest                         what can be resumed or loaded
      timeline/                                                              per-instruction timings

The controller (`cli`), the ranks (`worker`) and the reports all find their files through `RunDirectory`. Files that are
replaced are written aside and renamed, so that a reader never sees half of one.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpipe_cli.errors import UsageError

_RUN_NAME = re.compile(r"^(?P<name>.+)-(?P<time>\d{8}-\d{6})(?:-(?P<copy>\d+))?$")
MANIFEST = "manifest.json"
"""The file that makes a checkpoint whole: it is written last."""
STEP_NAME = re.compile(r"step-(\d{8,})")
"""Name of a checkpoint's directory; see `checkpoint_name`."""


def write_text(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old content or the new one, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8", errors="surrogateescape")
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; see `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The parsed file, or None when it is missing or not (yet) JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside one run directory. Building it touches no file; `create` makes a new one."""

    path: Path

    @classmethod
    def create(cls, output_dir: Path | str, name: str) -> RunDirectory:
        """Make `output_dir/<name>-<YYYYmmdd-HHMMSS>`; when that exists, the same with -2, -3 and so on.

        Raises:
            UsageError: the folder cannot be made.
        """
        base = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        copy = 1
        while True:
            path = Path(output_dir) / (base if copy == 1 else f"{base}-{copy}")
            try:
                path.mkdir(parents=True, exist_ok=False)
                break
            except FileExistsError:
                if not path.is_dir():
                    raise UsageError(
                        f"{output_dir} is not a folder", hint="set `output_dir` to a folder that can be written"
                    ) from None
                copy += 1
            except OSError as error:
                raise UsageError(
                    f"the run directory {path} cannot be made: {error.strerror}",
                    hint="set `output_dir` to a folder that can be written",
                ) from error
        run = cls(path.absolute())
        for folder in (run.logs, run.checkpoints, run.timeline, run.control):
            folder.mkdir()
        return run

    @classmethod
    def find(cls, what: str, output_dir: Path | str = "runs") -> RunDirectory:
        """The run that `what` means: a path, a run's folder name, a recipe's name (its newest run) or ``latest``.

        Raises:
            UsageError: there is no such run.
        """
        direct = cls(Path(what).absolute())
        if direct.is_run():
            return direct
        runs = list_runs(output_dir)
        for run in reversed(runs):
            if what in (run.name, run.recipe_name, "latest"):
                return run
        known = ", ".join(run.name for run in runs[-3:])
        raise UsageError(
            f"there is no run '{what}' in {output_dir}",
            hint=f"newest runs: {known}" if known else f"`llmpipe runs ls --output-dir {output_dir}` lists the runs",
        )

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe_name(self) -> str:
        """The folder's name without its time."""
        match = _RUN_NAME.match(self.name)
        return match["name"] if match else self.name

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def recipe_lock(self) -> Path:
        return self.path / "recipe.lock.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def launch_script(self) -> Path:
        return self.path / "launch.sh"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def generations(self) -> Path:
        return self.path / "generations.jsonl"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def timeline(self) -> Path:
        return self.path / "timeline"

    @property
    def control(self) -> Path:
        return self.path / "control"

    @property
    def stop_file(self) -> Path:
        """Its existence asks all ranks to save and stop."""
        return self.control / "stop"

    @property
    def controller_file(self) -> Path:
        """Who supervises this run: {"pid", "host", "started"}."""
        return self.control / "controller.json"

    @property
    def launcher_log(self) -> Path:
        return self.logs / "launcher.log"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank:05d}.log"

    def rank_error(self, rank: int) -> Path:
        return self.logs / f"rank-{rank:05d}.error.json"

    def rank_record(self, rank: int) -> Path:
        """What the rank's guardian knows: its processes, and how the rank ended."""
        return self.control / f"rank-{rank:05d}.json"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / checkpoint_name(step)

    def is_run(self) -> bool:
        return self.control.is_dir() and self.logs.is_dir()

    def log_files(self) -> list[Path]:
        return sorted(self.logs.glob("rank-*.log"))

    def steps_saved(self) -> list[int]:
        """Steps with a complete checkpoint (a manifest is written last), rising."""
        return sorted(
            int(match[1])
            for path in self.checkpoints.glob("step-*")
            if (match := STEP_NAME.fullmatch(path.name)) and is_checkpoint(path)
        )

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint `latest` points to; without a whole one there, the newest whole one; None if there is none."""
        latest = self.checkpoints / "latest"
        if is_checkpoint(latest):
            return latest.resolve()
        steps = self.steps_saved()
        return self.checkpoint(steps[-1]) if steps else None

    def read_plan(self) -> dict[str, Any]:
        """plan.json as plain data; empty when there is none yet."""
        return read_json(self.plan) or {}

    def request_stop(self) -> None:
        """Ask the ranks to save and end with exit code 75 at the next step."""
        self.stop_file.write_text(time.strftime("%Y-%m-%dT%H:%M:%S%z\n"), encoding="utf-8")

    def write_controller(self) -> None:
        """Note this process as the one supervising the run."""
        write_json(
            self.controller_file,
            {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time(), "ticks": _start_ticks("self")},
        )

    def write_status(self, state: str, exit_code: int, **details: Any) -> None:
        """How the run ended: `state` is done, stopped or failed."""
        write_json(self.status_file, {"state": state, "exit_code": exit_code, **details, "time": time.time()})

    def status(self) -> dict[str, Any]:
        """How the run stands: {"state", "exit_code", ...}.

        States: done, stopped, failed (as written at the end), running, and lost: the controller is gone without
        having written how it ended.
        """
        ended = read_json(self.status_file)
        if isinstance(ended, dict) and "state" in ended:
            return ended
        controller = read_json(self.controller_file)
        if not isinstance(controller, dict):
            return {"state": "lost", "exit_code": None}
        here = controller.get("host") == socket.gethostname()
        alive = not here or _start_ticks(str(controller.get("pid"))) == controller.get("ticks")
        return {"state": "running" if alive else "lost", "exit_code": None}


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def is_checkpoint(path: Path) -> bool:
    """Whether `path` holds a checkpoint that was written to its end (its content is checked when it is read)."""
    has_model = (path / "config.json").is_file() or (path / "adapter_config.json").is_file()
    return (path / MANIFEST).is_file() and has_model


def list_runs(output_dir: Path | str = "runs") -> list[RunDirectory]:
    """All runs in a folder, oldest first."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    runs = [RunDirectory(path.absolute()) for path in folder.iterdir() if path.is_dir()]
    return sorted((run for run in runs if run.is_run()), key=_age_key)


class MetricsReader:
    """Reads metrics.jsonl while it grows: each `read` returns the complete lines that are new since the last one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """New lines as dicts; a last line without its newline waits for the next call, a broken one is left out."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return list(_parse_lines(complete))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics.jsonl."""
    return MetricsReader(path).read()


def read_metrics_summary(path: Path, num_steps: int = 50) -> list[dict[str, Any]]:
    """All events and the last steps of a metrics.jsonl, without parsing the many steps before them."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    wanted = [line for line in lines[:-num_steps] if b'"event"' in line] + lines[-num_steps:]
    return list(_parse_lines(b"\n".join(wanted)))


def _parse_lines(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _age_key(run: RunDirectory) -> tuple[str, int, str]:
    match = _RUN_NAME.match(run.name)
    if match:
        return match["time"], int(match["copy"] or 1), run.name
    modified = run.control.stat().st_mtime
    return time.strftime("%Y%m%d-%H%M%S", time.localtime(modified)), 1, run.name


def _start_ticks(pid: str) -> str | None:
    """Start time of a process in clock ticks since boot: with the pid it names one process for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return stat[stat.rfind(")") + 2 :].split()[19]
