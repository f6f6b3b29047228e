"""The table of architectures: checks every type that transformers registers and writes what came of it.

    python benchmarks/models.py [--tasks masked-lm,translation] [--types llama,t5] [--jobs 2]

Each type runs as a tiny random model, whole and cut at every layer (`llmpipe_cli.model.parity`), with transformers'
default attention and, where that is not eager attention, with eager attention too. The result goes to
`llmpipe_cli/model/table.json`, which the planner reads, and to `docs/models.md`. With `--tasks` or `--types` the other
rows stay as they are. Exits with 1 if a type gives other numbers than undivided.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from llmpipe_cli.model.parity import Verdict, check_split, check_type
from llmpipe_cli.model.table import TABLE, TASKS, read_table, registered_types, render, write_table

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"


def check(task: str, model_type: str) -> dict[str, Any]:
    """The row of one type and task."""
    verdict = check_type(model_type, task)
    row = {"status": verdict.status}
    if verdict.status != "pass":
        return row | {"reason": verdict.reason}
    attention = [verdict.attention]
    if verdict.attention != "eager":
        second: Verdict = check_type(model_type, task, attn_implementation="eager")
        if second.status == "pass":
            attention.append("eager")
        elif second.status != "untested":
            return {"status": second.status, "reason": f"with eager attention: {second.reason}"}
    return row | {"attention": attention, "split": check_split(model_type, task).status == "pass"}


def prepare_process() -> None:
    """One thread a process, and no warnings about configs that nobody trained."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()


def main() -> int:
    """Check, write, count; returns the exit code."""
    parser = argparse.ArgumentParser(description="Check all architectures and write docs/models.md.")
    parser.add_argument("--tasks", default=",".join(TASKS), help="tasks to check, separated by commas")
    parser.add_argument("--types", default="", help="types to check, separated by commas; all if empty")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args()
    chosen = set(options.types.split(",")) - {""}
    cases = [
        (task, model_type)
        for task in options.tasks.split(",")
        for model_type in registered_types(task)
        if not chosen or model_type in chosen
    ]
    old = read_table() if TABLE.exists() else {"tasks": {}}
    rows = {task: dict(old["tasks"].get(task, {})) for task in TASKS}
    for task in TASKS:  # types that transformers no longer has
        rows[task] = {name: row for name, row in rows[task].items() if name in registered_types(task)}
    started = time.perf_counter()
    with concurrent.futures.ProcessPoolExecutor(options.jobs, initializer=prepare_process) as pool:
        for (task, model_type), row in zip(cases, pool.map(check, *zip(*cases, strict=True), chunksize=8), strict=True):
            rows[task][model_type] = row
            if row["status"] != "pass":
                print(f"{task:24} {model_type:28} {row['status']}: {row['reason']}", flush=True)
    write_table({"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0], "tasks": rows})
    DOCUMENT.write_text(render(read_table()))
    differing = [name for name in cases if rows[name[0]][name[1]]["status"] == "differs"]
    print(f"{len(cases)} checked in {time.perf_counter() - started:.0f} s, {len(differing)} differ")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
