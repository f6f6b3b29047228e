"""What a failing rank leaves behind for the controller."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback

from llmpipe_cli.errors import LlmpipeError, RankError
from llmpipe_cli.run import RunDirectory, write_json


def write_failure(run: RunDirectory, rank: int, error: BaseException, stack: str = "") -> int:
    """Write the rank's error file and its traceback to the log.

    Args:
        run: the run directory.
        rank: this rank.
        error: what went wrong.
        stack: for an error that was never raised: where the rank was.

    Returns:
        The exit code: the error's own, or that of a failed rank for any other exception.
    """
    text = "".join(traceback.format_exception(error))
    print(f"{stack}{text}", file=sys.stderr, flush=True)
    known = error if isinstance(error, LlmpipeError) else _out_of_memory(error)
    exit_code = known.exit_code if known else RankError.exit_code
    stage = os.environ.get("LLMPIPE_STAGE")
    record = {
        "exit_code": exit_code,
        "type": type(error).__name__,
        "message": known.message if known else str(error),
        "where": known.where if known else None,
        "hint": known.hint if known else None,
        "traceback": text if error.__traceback__ is not None else stack or None,
        "rank": rank,
        "host": socket.gethostname(),
        "time": time.time(),
    }
    if stage is not None:  # known once the plan has been read
        record["stage"] = int(stage)
    write_json(run.rank_error(rank), record)
    return exit_code


def _out_of_memory(error: BaseException) -> RankError | None:
    """What to do about an accelerator whose memory is full; None for any other exception. torch may not be there."""
    if type(error).__name__ != "OutOfMemoryError":
        return None
    sentences = str(error).split(". ")
    return RankError(
        ". ".join(sentences[:2]).rstrip("."),  # the others are about the allocator
        hint="set train.micro_batch_size lower or parallel.activation_checkpointing to full, or use more stages; "
        "`llmpipe plan` tells what each layout needs",
    )
