"""Cutting a row of segment costs into stages."""

import itertools
import random

import pytest

from llmpipe_cli.plan.partition import balance


def _brute_force(costs: list[float], num_stages: int) -> float:
    cuts = itertools.combinations(range(1, len(costs)), num_stages - 1)
    bounds = ([0, *cut, len(costs)] for cut in cuts)
    return min(max(sum(costs[a:b]) for a, b in itertools.pairwise(bound)) for bound in bounds)


@pytest.mark.parametrize("seed", range(20))
def test_largest_stage_is_as_small_as_possible(seed: int) -> None:
    rng = random.Random(seed)
    costs = [rng.choice([0.0, 1.0, 2.0, 5.0]) for _ in range(rng.randint(3, 9))]
    num_stages = rng.randint(1, len(costs))
    bounds = balance(costs, num_stages)
    assert bounds[0] == 0
    assert bounds[-1] == len(costs)
    assert all(a < b for a, b in itertools.pairwise(bounds))
    largest = max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))
    assert largest == pytest.approx(_brute_force(costs, num_stages))


def test_embedding_is_free_and_head_counts() -> None:
    # embedding, eight layers, a head worth two layers: 5 layers against 3 layers + head
    assert balance([0, 1, 1, 1, 1, 1, 1, 1, 1, 2], 2) == [0, 6, 10]


def test_equal_solutions_prefer_even_stages() -> None:
    # the head of 4 decides the largest stage; the other eight layers still go 4 + 4
    assert balance([1] * 8 + [4], 3) == [0, 4, 8, 9]


def test_more_stages_than_segments() -> None:
    with pytest.raises(ValueError, match="2 segments cannot make 3 stages"):
        balance([1, 1], 3)
