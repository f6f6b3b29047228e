"""How a job ended, from what its ranks left behind.

Every rank leaves a record of its process (`control/rank-N.json`, by its guardian) and, when the worker itself saw the
failure, an error file (`logs/rank-N.error.json`). When one rank fails the others fail after it, because their partner
is gone; what counts is the first failure that has a cause of its own.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpipe_cli.cluster.processes import is_running
from llmpipe_cli.errors import (
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    CheckpointError,
    LlmpipeError,
    NodeError,
    NumericsError,
    PreflightError,
    RankError,
    UsageError,
)
from llmpipe_cli.run import RunDirectory, read_json

_ERRORS: dict[int, type[LlmpipeError]] = {
    2: UsageError,
    3: PreflightError,
    4: RankError,
    5: NodeError,
    6: CheckpointError,
    7: NumericsError,
}
# What a rank says when its partner has gone: a cause elsewhere, if another rank names one.
_FOLLOWER_SIGNS = (
    "closed by peer",
    "connection closed",
    "connection reset",
    "connection refused",
    "broken pipe",
    "disterror",
    "distbackenderror",
    "distnetworkerror",
    "diststoreerror",
    "gloo",
    "nccl",
    "socket timeout",
    "timed out waiting",
)
_TAIL_LINES = 12


@dataclass(frozen=True)
class Outcome:
    """The end of a job.

    Args:
        exit_code: see the exit codes of the project; 0 and EXIT_STOPPED are good ends.
        error: what to show, None for a good end.
        rank: the rank that failed first, None if it was no rank.
        traceback: that rank's traceback or the last lines of its log, None if there is nothing to show.
        followed: every rank that failed says that another one was gone: the cause lies elsewhere.
    """

    exit_code: int
    error: LlmpipeError | None = None
    rank: int | None = None
    traceback: str | None = None
    followed: bool = False


@dataclass(frozen=True)
class _Failure:
    rank: int
    time: float
    follower: bool
    error: LlmpipeError
    traceback: str | None


def write_status(run: RunDirectory, outcome: Outcome) -> None:
    """Write how a run ended into its directory."""
    error = outcome.error
    if error is not None:
        run.write_status(
            "failed", error.exit_code, message=error.message, where=error.where, hint=error.hint, rank=outcome.rank
        )
    elif outcome.exit_code == EXIT_INTERRUPTED:
        run.write_status("failed", outcome.exit_code, message="killed by the user")
    else:
        run.write_status("stopped" if outcome.exit_code == EXIT_STOPPED else "done", outcome.exit_code)


def ended_ranks(run: RunDirectory, num_ranks: int) -> dict[int, dict[str, Any]]:
    """The records of the ranks that have ended, by rank."""
    records = {rank: read_json(run.rank_record(rank)) for rank in range(num_ranks)}
    return {rank: record for rank, record in records.items() if record and "returncode" in record}


def has_failed(run: RunDirectory, num_ranks: int) -> bool:
    """Whether a rank ended badly so far, or wrote an error."""
    if any(record["returncode"] not in (0, EXIT_STOPPED) for record in ended_ranks(run, num_ranks).values()):
        return True
    return any(run.rank_error(rank).exists() for rank in range(num_ranks))


def vanished_guardians(run: RunDirectory, ranks: Iterable[int]) -> list[int]:
    """Ranks on this machine whose guardian is gone without having noted the end: it was killed by SIGKILL itself."""
    vanished = []
    for rank in ranks:
        record = read_json(run.rank_record(rank))
        if record and "returncode" not in record and not is_running(record["pid"]):
            # Its last act may have come between the two looks.
            record = read_json(run.rank_record(rank))
            if record and "returncode" not in record:
                vanished.append(rank)
    return vanished


def judge(run: RunDirectory, stages: Sequence[int], agent_code: int | None, vanished: Sequence[int] = ()) -> Outcome:
    """The outcome after all processes are gone.

    Args:
        run: the run directory.
        stages: pipeline stage of each rank; its length is the number of ranks.
        agent_code: how the node's agent ended; None if it was killed by the controller.
        vanished: ranks whose guardian was seen to be gone, without a record of the end, before anything was killed.
    """
    num_ranks = len(stages)
    records = ended_ranks(run, num_ranks)
    failures = [failure for rank in range(num_ranks) if (failure := _failure(run, rank, stages[rank], records))]
    if failures:
        first = min(failures, key=lambda failure: (failure.follower, failure.time))
        return Outcome(first.error.exit_code, first.error, first.rank, first.traceback, first.follower)
    if len(records) == num_ranks and not any(record["agent_lost"] for record in records.values()):
        stopped = any(record["returncode"] == EXIT_STOPPED for record in records.values())
        return Outcome(EXIT_STOPPED if stopped else 0)
    if vanished:
        error = RankError(
            "the process that guards the rank was killed (SIGKILL)",
            where=_place(vanished[0], read_json(run.rank_record(vanished[0])) or {}, stages[vanished[0]]),
            hint=f"see {run.rank_log(vanished[0])}; {_go_on(run)}",
        )
        return Outcome(error.exit_code, error, vanished[0], _tail(run, vanished[0]))
    if agent_code is None:
        ending = "was killed"
    elif agent_code < 0:
        ending = f"ended by signal {_signal_name(-agent_code)}"
    else:
        ending = f"ended with code {agent_code}"
    node_error = NodeError(
        f"the agent of this node (torchrun) {ending} before its ranks were done",
        hint=f"see {run.launcher_log}; {_go_on(run)}",
    )
    return Outcome(node_error.exit_code, node_error, None, last_lines(run.launcher_log))


def _failure(run: RunDirectory, rank: int, stage: int, records: dict[int, dict[str, Any]]) -> _Failure | None:
    record = records.get(rank, {})
    written = read_json(run.rank_error(rank))
    if isinstance(written, dict):
        return _written_failure(run, rank, stage, record, written)
    returncode = record.get("returncode", 0)
    if returncode in (0, EXIT_STOPPED) or record["agent_lost"]:
        return None
    # Ended by the agent because another rank failed, or by somebody who told the agent to end.
    told = bool(record["told_to_end"]) and returncode in (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT)
    hint = f"see {run.rank_log(rank)}; {_go_on(run)}"
    tail = _tail(run, rank)
    if returncode < 0:
        name = _signal_name(-returncode)
        message = f"the rank was killed by signal {-returncode} ({name})"
        if returncode == -signal.SIGKILL:
            tail = None
            hint = f"SIGKILL often means that the machine ran out of memory (`dmesg | tail`); {hint}"
    else:
        message = f"the rank ended with code {returncode} without saying why"
    error = RankError(message, where=_place(rank, record, stage), hint=hint)
    return _Failure(rank, record["ended"], told, error, tail)


def _written_failure(
    run: RunDirectory, rank: int, stage: int, record: dict[str, Any], written: dict[str, Any]
) -> _Failure:
    kind, message = str(written.get("type", "")), str(written.get("message", ""))
    error_class = _ERRORS.get(written.get("exit_code", 4), RankError)
    own_error = kind.endswith("Error") and error_class is not RankError
    text = f"{kind}: {message}".lower()
    place = _place(rank, written | record, written.get("stage", stage))
    where = written.get("where")
    error = error_class(
        message if own_error or not kind or kind == "RankError" else f"{kind}: {message}",
        where=str(where) if where else place,
        hint=written.get("hint") or f"see {run.rank_log(rank)}; {_go_on(run)}",
    )
    follower = not own_error and any(sign in text for sign in _FOLLOWER_SIGNS)
    traceback = None if own_error else written.get("traceback")
    return _Failure(rank, float(written.get("time", 0.0)), follower, error, traceback)


def _go_on(run: RunDirectory) -> str:
    checkpoint = run.latest_checkpoint()
    return f"`--resume auto` goes on from {checkpoint.name}" if checkpoint else "no checkpoint was saved yet"


def _place(rank: int, record: dict[str, Any], stage: object) -> str:
    return f"rank {rank} (host {record.get('host', 'unknown')}, stage {stage})"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _tail(run: RunDirectory, rank: int) -> str | None:
    return last_lines(run.rank_log(rank))


def last_lines(path: Path) -> str | None:
    """The end of a log file; None when there is nothing."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return "\n".join(lines[-_TAIL_LINES:]) or None
