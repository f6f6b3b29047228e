"""Which parameters learn.

`train.freeze` and `train.trainable` hold patterns over Hugging Face parameter names, as a shell matches file names: `*`
stands for any text (dots too), `?` for one character, `[0-3]` for one of a set. A pattern that matches a module's name
means all its parameters. A parameter with several names (tied weights) is meant by each of them. With `trainable` all
else is frozen; `freeze` then takes away.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.skeleton import all_names
from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.recipe.names import nearest


def select_trainable(
    model: nn.Module, plan: SlicePlan, *, freeze: Iterable[str] = (), trainable: Iterable[str] = ()
) -> list[str]:
    """Names of the parameters that learn, in model order.

    Args:
        model: the model; its parameters may be on meta.
        plan: its slice plan.
        freeze: patterns of parameters that stay as they are.
        trainable: patterns of the only parameters that learn; none means all.

    Raises:
        UsageError: a pattern matches nothing, or nothing is left to learn.
    """
    groups = all_names(model)
    only, without = list(trainable), list(freeze)
    chosen = _matched(groups, only, "train.trainable") if only else set(groups)
    chosen -= _matched(groups, without, "train.freeze")
    constant = {*plan.replicated, *plan.unused}
    names = [name for name in groups if name in chosen and name not in constant]
    if not names:
        raise UsageError(
            "every parameter is frozen: there is nothing to train",
            where="train.trainable" if only else "train.freeze",
            hint="freeze fewer parameters",
        )
    return names


def _matched(groups: dict[str, tuple[str, ...]], patterns: list[str], where: str) -> set[str]:
    found: set[str] = set()
    for index, pattern in enumerate(patterns):
        matches = re.compile(f"{fnmatch.translate(pattern)}|{fnmatch.translate(pattern + '.*')}").match
        hits = {name for name, aliases in groups.items() if any(matches(alias) for alias in aliases)}
        if not hits:
            raise UsageError(
                f"the pattern {pattern!r} matches no parameter of the model",
                where=f"{where}[{index}]",
                hint=_hint(groups, pattern),
            )
        found |= hits
    return found


def _hint(groups: dict[str, tuple[str, ...]], pattern: str) -> str:
    """The nearest name, or the pattern with its unknown parts replaced by the nearest known ones."""
    names = [alias for aliases in groups.values() for alias in aliases]
    known = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    parts = [part if part in known or set(part) & set("*?[") or part.isdigit() else nearest(part, known) or part
             for part in pattern.split(".")]  # fmt: skip
    near = ".".join(parts)
    if near != pattern:
        return f"did you mean {near}?"
    return f"names look like {names[0]} and {names[-1]}; * stands for any text"


def without_needless_gradients(plan: SlicePlan, trainable: Iterable[str]) -> SlicePlan:
    """The plan without gradients that would travel to segments before which nothing learns."""
    learning = set(trainable)
    used = [segment for segment in range(plan.num_segments) if learning & set(plan.segments[segment].parameters)]
    first = min(used, default=plan.num_segments)
    boundaries = tuple(
        boundary
        if index + 1 > first
        else replace(boundary, carried=tuple(replace(item, gradient=False) for item in boundary.carried))
        for index, boundary in enumerate(plan.boundaries)
    )
    sides = tuple(side if side.first >= first else replace(side, gradient=False) for side in plan.sides)
    return replace(plan, boundaries=boundaries, sides=sides)
