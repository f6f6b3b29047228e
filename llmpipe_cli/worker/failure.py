"""What a failing rank leaves behind for the controller."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback

from llmpipe_cli.errors import LlmpipeError, RankError
from llmpipe_cli.run import RunDirectory, write_json


def write_failure(run: RunDirectory, rank: int, error: BaseException) -> int:
    """Write the rank's error file and its traceback to the log.

    Returns:
        The exit code: the error's own, or that of a failed rank for any other exception.
    """
    text = "".join(traceback.format_exception(error))
    print(text, file=sys.stderr, flush=True)
    known = error if isinstance(error, LlmpipeError) else None
    exit_code = known.exit_code if known else RankError.exit_code
    stage = os.environ.get("LLMPIPE_STAGE")
    record = {
        "exit_code": exit_code,
        "type": type(error).__name__,
        "message": known.message if known else str(error),
        "where": known.where if known else None,
        "hint": known.hint if known else None,
        "traceback": text,
        "rank": rank,
        "host": socket.gethostname(),
        "time": time.time(),
    }
    if stage is not None:  # known once the plan has been read
        record["stage"] = int(stage)
    write_json(run.rank_error(rank), record)
    return exit_code
