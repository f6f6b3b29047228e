"""A worker without torch, for tests of the launcher: does what SAMPLE_WORKER says, as real ranks do it.

The behaviour is a JSON object in the environment: {"0": ["sleep"], "1": ["raise"]}; a rank without an entry sleeps
until it is asked to stop.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path


def main() -> int:
    run, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    behaviours = json.loads(os.environ.get("SAMPLE_WORKER", "{}"))
    action = behaviours.get(str(rank), "wait")
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} does: {action}", flush=True)
    (run / "logs" / f"seen-{rank}.json").write_text(
        json.dumps({"argv": sys.argv[1:], "weird": os.environ.get("WEIRD"), "pid": os.getpid()}, ensure_ascii=False),
        encoding="utf-8",
        errors="surrogateescape",
    )
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    if action == "raise":
        time.sleep(0.3)
        return fail(run, rank, ValueError("the data of rank 1 is bad"))
    if action == "early follower":
        return fail(run, rank, RuntimeError("[gloo] Connection reset by peer"))
    if action == "die at once":
        raise SystemExit(11)
    if action == "done":
        return 0
    if action in ("ignore", "child"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if action == "child" and os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        (run / "logs" / "grandchild.pid").write_text(str(os.getpid()))
        time.sleep(600)
    while not stop and not ((run / "control" / "stop").exists() and action != "ignore"):
        time.sleep(0.02)
    # Ranks never end at the same moment, and an interpreter that is shutting down no longer handles signals.
    signal.signal(signal.SIGTERM, signal.SIG_IGN if action == "ignore" else signal.SIG_DFL)
    time.sleep(0.6 * rank)
    (run / "logs" / f"saved-{rank}").touch()
    return 75


def fail(run: Path, rank: int, error: Exception) -> int:
    """Write the error file as the real worker does."""
    try:
        raise error
    except Exception as caught:
        text = traceback.format_exc()
        record = {
            "exit_code": 4,
            "type": type(caught).__name__,
            "message": str(caught),
            "where": None,
            "hint": None,
            "traceback": text,
            "rank": rank,
            "host": socket.gethostname(),
            "stage": rank,
            "time": time.time(),
        }
    (run / "logs" / f"rank-{rank:05d}.error.json").write_text(json.dumps(record))
    print(text, flush=True)
    return 4


if __name__ == "__main__":
    sys.exit(main())
