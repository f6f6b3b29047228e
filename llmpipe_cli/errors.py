"""Every failure a user can meet, each with its exit code.

An error says what is wrong (`message`), where (`where`: ``file:line:column``, a host, a rank) and what to do (`hint`).
`cli` prints these three and exits with `exit_code`; nothing else in the project prints an error or calls `sys.exit`.
The module imports nothing, so that any part of the project, also the fast `--help` path, can use it.
"""

from __future__ import annotations


class LlmpipeError(Exception):
    """Base of all errors shown to users.

    Args:
        message: what is wrong, one sentence without a trailing full stop.
        where: the place, for example ``recipe.yaml:12:5`` or ``rank 3 (host b, stage 1)``.
        hint: what to write or do instead.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class UsageError(LlmpipeError):
    """A flag, a recipe, a data file or a layout that cannot work; found before any rank starts."""

    exit_code = 2


class RecipeError(UsageError):
    """One or more mistakes in a recipe.

    Args:
        problems: the single mistakes, in file order; the first gives this error its own message, place and hint.
    """

    def __init__(self, problems: list[UsageError]) -> None:
        first = problems[0]
        super().__init__(first.message, where=first.where, hint=first.hint)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class PreflightError(LlmpipeError):
    """The machines cannot run the plan: a node, a version, a port, devices or memory."""

    exit_code = 3


class RankError(LlmpipeError):
    """A rank failed while the job was running."""

    exit_code = 4


class NodeError(LlmpipeError):
    """A node was lost or the launcher itself failed."""

    exit_code = 5


class CheckpointError(LlmpipeError):
    """A checkpoint that is missing, broken or cannot be written."""

    exit_code = 6


class NumericsError(LlmpipeError):
    """The loss or the gradients are no longer numbers."""

    exit_code = 7


EXIT_STOPPED = 75  # stopped on request, state saved, can be resumed
EXIT_INTERRUPTED = 130  # second Ctrl-C
