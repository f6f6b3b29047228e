"""Prepares a recipe and prints the peak of anonymous memory (bytes) of this process and of all processes together.

python tests/data_memory_worker.py RECIPE.json CACHE
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

from llmpipe_cli.data.prepare import prepare
from llmpipe_cli.recipe.schema import Recipe


def anonymous_bytes(process: str) -> int:
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def main() -> None:
    recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
    peak_own, peak_all, done = 0, 0, False

    def watch() -> None:
        nonlocal peak_own, peak_all
        while not done:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            own = anonymous_bytes("self")
            peak_own = max(peak_own, own)
            peak_all = max(peak_all, own + sum(anonymous_bytes(child) for child in children))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        data = prepare(recipe, Path.cwd(), Path(sys.argv[2]))
    finally:
        done = True
        watcher.join()
    assert data.train is not None
    print(json.dumps({"own": peak_own, "all": peak_all, "num_tokens": data.train.num_tokens}))


if __name__ == "__main__":
    main()
