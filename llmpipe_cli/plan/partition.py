"""Where to cut the model into stages."""

from __future__ import annotations

from collections.abc import Sequence


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
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    worst = (float("inf"), float("inf"))
    # best[s][n]: (largest cost, sum of squares) of the first n segments in s stages; cut[s][n]: where stage s began
    best = [[worst] * (count + 1) for _ in range(num_stages + 1)]
    cut = [[0] * (count + 1) for _ in range(num_stages + 1)]
    best[0][0] = (0.0, 0.0)
    for stage in range(1, num_stages + 1):
        for stop in range(stage, count + 1):
            for start in range(stage - 1, stop):
                largest, squares = best[stage - 1][start]
                cost = before[stop] - before[start]
                candidate = (max(largest, cost), squares + cost * cost)
                if candidate < best[stage][stop]:
                    best[stage][stop], cut[stage][stop] = candidate, start
    bounds = [count]
    for stage in range(num_stages, 0, -1):
        bounds.append(cut[stage][bounds[-1]])
    return bounds[::-1]
