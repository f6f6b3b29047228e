"""Where to cut the model into stages."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence

from llmpipe_cli.engine.schedules import Placement


def balance(costs: Sequence[float], num_stages: int) -> list[int]:
    """Cut a row of segments into consecutive stages so that the costliest stage is as cheap as possible.

    Solved exactly by dynamic programming over (stage, first segments); among equal solutions the one whose costs have
    the smallest sum of squares, so that the other stages are even as well.

    Args:
        costs: cost of each segment, any unit.
        num_stages: stages, at most ``len(costs)``; each gets at least one segment.

    Returns:
        Bounds: stage s holds segments ``bounds[s]`` up to ``bounds[s + 1]``.
    """
    count = len(costs)
    if not 1 <= num_stages <= count:
        raise ValueError(f"{count} segments cannot make {num_stages} stages")
    bounds = balance_unequal([costs] * num_stages, largest=_smallest_largest(costs, num_stages))
    assert bounds is not None
    return bounds


def _smallest_largest(costs: Sequence[float], num_stages: int) -> float:
    """The cost of the costliest stage of the best cut, or a little more: bisection, filling stages up to a limit."""
    before = list(itertools.accumulate(costs, initial=0.0))

    def suffices(limit: float) -> bool:
        start = 0
        for _ in range(num_stages):
            start = bisect_right(before, before[start] + limit) - 1
            if start == len(costs):
                return True
        return False

    low = max(before[-1] / num_stages, max(costs))
    high = before[-1] / num_stages + max(costs)  # stages filled until they exceed the mean
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high * (1 + 1e-9)


def balance_parts(costs: Sequence[float], placement: Placement) -> list[int]:
    """Cut a row of segments into the parts of a placement with several of them a stage.

    Starting from the most even parts, bounds are moved as long as that makes the costliest stage cheaper or, among
    equal ones, the costliest part, or the stages more even.

    Args:
        costs: cost of each segment, any unit.
        placement: which stage holds which part; at most as many parts as segments.

    Returns:
        Bounds: part k holds segments ``bounds[k]`` up to ``bounds[k + 1]``.
    """
    bounds = balance(costs, placement.num_parts)
    if placement.num_chunks == 1:
        return bounds

    def badness(bounds: list[int]) -> tuple[float, float, float]:
        parts = [sum(costs[start:stop]) for start, stop in itertools.pairwise(bounds)]
        stages = [0.0] * placement.num_stages
        for part, cost in enumerate(parts):
            stages[placement.owner(part)[0]] += cost
        return max(stages), max(parts), sum(cost * cost for cost in parts)

    best = badness(bounds)
    while True:
        candidates = []
        for index in range(1, len(bounds) - 1):
            for moved in (bounds[index] - 1, bounds[index] + 1):
                if bounds[index - 1] < moved < bounds[index + 1]:
                    changed = [*bounds[:index], moved, *bounds[index + 1 :]]
                    candidates.append((badness(changed), changed))
        if not candidates or min(candidates)[0] >= best:
            return bounds
        best, bounds = min(candidates)


def balance_unequal(
    costs: Sequence[Sequence[float]],
    allowed: Callable[[int, int, int], bool] | None = None,
    *,
    largest: float = float("inf"),
) -> list[int] | None:
    """`balance` for stages of unequal speed, or with limits on what a stage can hold.

    Args:
        costs: for each stage the cost of every segment there.
        allowed: whether stage s can hold segments [start, stop); what it cannot, no longer range can either.
        largest: no stage of the best cut costs more, as far as that is known: fewer cuts are looked at.

    Returns:
        Bounds as `balance` gives them; None when no cut is allowed.
    """
    num_stages, count = len(costs), len(costs[0])
    worst = (float("inf"), float("inf"))
    best, cuts = [worst] * (count + 1), []
    best[0] = (0.0, 0.0)
    for stage in range(num_stages):
        before = list(itertools.accumulate(costs[stage], initial=0.0))
        found, cut = [worst] * (count + 1), [0] * (count + 1)
        rest = num_stages - 1 - stage
        for stop in range(stage + 1, count + 1 - rest):
            if before[stop] > (stage + 1) * largest or (rest and before[-1] - before[stop] > rest * largest):
                continue  # a stage before or behind would cost too much
            for start in range(stop - 1, stage - 1, -1):
                cost = before[stop] - before[start]
                if cost > largest or cost > found[stop][0] or (allowed is not None and not allowed(stage, start, stop)):
                    break  # longer ranges cost more and hold more
                costliest, squares = best[start]
                candidate = (max(costliest, cost), squares + cost * cost)
                if candidate < found[stop]:
                    found[stop], cut[stop] = candidate, start
        best = found
        cuts.append(cut)
    if best[count] == worst:
        return None
    bounds = [count]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return bounds[::-1]
