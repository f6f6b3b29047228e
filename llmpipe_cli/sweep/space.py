"""The fields that a sweep changes, and the values that each may take.

Values stay text as ``--set`` takes it, so that a trial is a recipe with a few ``--set`` and is checked like any other.

    --grid train.learning_rate=1e-4,3e-4      a choice among values; [ ] { } and quotes keep their commas
    --uniform model.dropout=0.0:0.3           any number between two; whole ones if both are written as such
    --log train.weight_decay=1e-4:1e-1        the same, evenly spread over the orders of magnitude
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmpipe_cli.errors import UsageError

_FIELD = re.compile(r"[A-Za-z_][\w.\[\]-]*\Z")
_WHOLE = re.compile(r"[-+]?\d+\Z")
_SWEEP_FIELDS = ("name", "output_dir")  # a sweep gives each trial its own


@dataclass(frozen=True)
class Choice:
    """One of several values.

    Attributes:
        field: dotted name of the recipe's field.
        values: as ``--set`` takes them.
        flag: as the user wrote it, the place of its mistakes.
    """

    field: str
    values: tuple[str, ...]
    flag: str

    def at(self, share: float) -> str:
        """The value at a share of the way through all of them, 0 <= share < 1."""
        return self.values[int(share * len(self.values))]

    def samples(self) -> tuple[str, ...]:
        """Values that have to be valid for all to be."""
        return self.values

    def to_json(self) -> dict[str, Any]:
        return {"field": self.field, "values": list(self.values)}


@dataclass(frozen=True)
class Range:
    """A number between two bounds, both included.

    Attributes:
        field: dotted name of the recipe's field.
        low: smallest value.
        high: largest value.
        log: spread evenly over the logarithm.
        whole: whole numbers only.
        flag: as the user wrote it, the place of its mistakes.
    """

    field: str
    low: float
    high: float
    log: bool
    whole: bool
    flag: str

    def at(self, share: float) -> str:
        """The value at a share of the way from low to high, 0 <= share < 1."""
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        elif self.whole:
            value = math.floor(self.low + share * (self.high - self.low + 1))
        else:
            value = self.low + share * (self.high - self.low)
        return self.text(value)

    def text(self, value: float) -> str:
        """A number as ``--set`` takes it, with six significant digits, inside the bounds."""
        value = min(max(value, self.low), self.high)
        return str(round(value)) if self.whole else f"{value:.6g}"

    def samples(self) -> tuple[str, ...]:
        """Values that have to be valid for all to be."""
        return self.text(self.low), self.text(self.high)

    def to_json(self) -> dict[str, Any]:
        return {"field": self.field, "low": self.low, "high": self.high, "log": self.log, "whole": self.whole}


Parameter = Choice | Range


def parse_parameters(grid: Sequence[str], uniform: Sequence[str], log: Sequence[str]) -> list[Parameter]:
    """The parameters of the flags, choices first.

    Raises:
        UsageError: a flag that is not FIELD=..., bounds that are none, a field named twice, no flag at all.
    """
    parameters: list[Parameter] = [_choice(entry) for entry in grid]
    parameters += [_range(entry, "--uniform", log=False) for entry in uniform]
    parameters += [_range(entry, "--log", log=True) for entry in log]
    if not parameters:
        raise UsageError(
            "there is nothing to search over", hint="for example --grid train.learning_rate=1e-4,3e-4,1e-3"
        )
    seen: dict[str, Parameter] = {}
    for parameter in parameters:
        if parameter.field in _SWEEP_FIELDS:
            hint = "give it with --set; each trial gets its own below it"
            raise UsageError(f"`{parameter.field}` cannot be searched over", where=parameter.flag, hint=hint)
        if parameter.field in seen:
            hint = f"it is also in {seen[parameter.field].flag}"
            raise UsageError(f"`{parameter.field}` is given twice", where=parameter.flag, hint=hint)
        seen[parameter.field] = parameter
    return parameters


def _choice(entry: str) -> Choice:
    field, values = _split(entry, "--grid", "FIELD=A,B")
    items = split_values(values)
    flag = f"--grid {entry}"
    if not all(items):
        raise UsageError("--grid needs FIELD=A,B", where=flag, hint="leave out the comma with nothing beside it")
    if len(set(items)) < len(items):
        raise UsageError("--grid has a value twice", where=flag)
    return Choice(field, tuple(items), flag)


def _range(entry: str, name: str, *, log: bool) -> Range:
    field, bounds = _split(entry, name, "FIELD=LOW:HIGH")
    flag = f"{name} {entry}"
    words = [word.strip() for word in bounds.split(":")]
    try:
        low, high = (float(word) for word in words)
    except ValueError:
        example = f"for example {name} {field}=1e-5:1e-3"
        raise UsageError(f"{name} needs two numbers, FIELD=LOW:HIGH", where=flag, hint=example) from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"{name} needs LOW below HIGH", where=flag, hint="both are included")
    if log and low <= 0:
        raise UsageError("--log needs bounds above 0", where=flag, hint=f"or --uniform {entry}")
    return Range(field, low, high, log, all(_WHOLE.match(word) for word in words), flag)


def _split(entry: str, name: str, form: str) -> tuple[str, str]:
    field, equals, rest = entry.partition("=")
    if not equals or not rest or not _FIELD.match(field.strip()):
        raise UsageError(f"{name} needs {form}", where=f"{name} {entry}")
    return field.strip(), rest


def split_values(text: str) -> list[str]:
    """The values between commas; brackets and quotes keep theirs: ``[a,b],[a]`` are two."""
    values, start, depth, quote = [], 0, 0, ""
    for index, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == "," and depth == 0:
            values.append(text[start:index].strip())
            start = index + 1
    return [*values, text[start:].strip()]
