"""What the benchmarks on data of one's own share: running `llmpipe` as a user does, and reading what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def llmpipe(*arguments: str | Path, folder: Path) -> dict[str, Any]:
    """Run one `llmpipe` command in `folder` and give its JSON document.

    Raises:
        SystemExit: the command failed; what it said is on stderr.
    """
    command = [sys.executable, "-m", "llmpipe_cli", *map(str, arguments), "--json"]
    finished = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        sys.exit(f"exit code {finished.returncode}: llmpipe {' '.join(map(str, arguments))}")
    document: dict[str, Any] = json.loads(finished.stdout)
    return document


def full_path(name: str) -> Path:
    """The path of a command-line argument, whatever folder commands are run in."""
    return Path(name).resolve()


def write_recipe(folder: Path, values: dict[str, Any]) -> Path:
    """A recipe file of these values (JSON is YAML too), named like the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{values['name']}.yaml"
    path.write_text(json.dumps(values, indent=2) + "\n")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
