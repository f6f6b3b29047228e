"""Schedules as data: order, memory, and completeness."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from llmpipe_cli.engine.schedules import SCHEDULES, Instruction, Placement, forward_only, one_f_one_b, zb_h1
from llmpipe_cli.plan.simulate import StageCosts, simulate, simulate_schedule


def memory_formula(name: str, stage: int, p: int, m: int, v: int) -> int:
    """The most activations a stage keeps, in micro-batches of one chunk: the papers' formulas."""
    return {
        "1f1b": min(p - stage, m),
        "gpipe": m,
        "interleaved": min(2 * (p - stage - 1) + (v - 1) * p + 1, v * m),
        "zb-h1": min(p, m),
        "zb-h2": min(2 * p - 1, m),
        "zb-v": min(2 * p, 2 * m),
    }[name]


@pytest.mark.parametrize("name", SCHEDULES)
def test_random_sizes(name: str) -> None:
    """Any numbers of stages, micro-batches and chunks, uneven costs: every pass exactly once and in a legal order, no
    deadlock, never faster than the busiest stage, memory within the formula."""
    generator, schedule = random.Random(name), SCHEDULES[name]
    for _ in range(80):
        p, m, v = generator.randint(1, 9), generator.randint(1, 40), schedule.chunks or generator.randint(2, 4)
        orders = [schedule(stage, p, m, v) for stage in range(p)]
        for stage, order in enumerate(orders):
            halves = Counter({(chunk, index): 0 for chunk in range(v) for index in range(m)})
            for kind, index, chunk in order:  # F, then B or I and W
                assert halves[chunk, index] == {"F": 0, "B": 1, "I": 1, "W": 2}[kind], (p, m, v, stage)
                halves[chunk, index] += 2 if kind == "B" else 1
            assert set(halves.values()) == {3}
        costs = [StageCosts(*(generator.uniform(0.5, 2.0) for _ in range(3))) for _ in range(p * v)]
        played = simulate_schedule(schedule, costs, m, generator.uniform(0.0, 0.5), v)
        placement = schedule.placement(p, v)
        work = [sum(costs[placement.part(stage, chunk)].total for chunk in range(v)) * m for stage in range(p)]
        assert played.step >= max(work) - 1e-9
        for stage, peak in enumerate(played.peak_activations):
            assert peak <= memory_formula(name, stage, p, m, v), (p, m, v, stage)


@pytest.mark.parametrize("name", SCHEDULES)
def test_memory_is_the_formula_when_the_pipeline_is_full(name: str) -> None:
    for p, v in ((1, 2), (2, 2), (4, 2), (4, 3), (8, 2)):
        v = SCHEDULES[name].chunks or v
        peaks = simulate_schedule(SCHEDULES[name], [StageCosts(1, 1, 1)] * (p * v), 4 * p, num_chunks=v)
        assert peaks.peak_activations == [memory_formula(name, stage, p, 4 * p, v) for stage in range(p)]


def test_1f1b_of_the_first_of_two_stages() -> None:
    order = one_f_one_b(0, 2, 3)
    assert "".join(f"{kind}{index}" for kind, index, _ in order) == "F0F1B0F2B1B2"


def test_zb_h1_of_the_last_of_three_stages() -> None:
    order = zb_h1(2, 3, 4)
    assert "".join(f"{kind}{index}" for kind, index, _ in order) == "F0I0F1I1F2I2W0F3I3W1W2W3"


def test_interleaved_of_the_first_of_two_stages() -> None:
    """Figure 4 of Narayanan et al. 2021, for two stages: chunks in lower case are the second ones."""
    order = SCHEDULES["interleaved"](0, 2, 4, 2)
    text = "".join(f"{kind.lower() if chunk else kind}{index}" for kind, index, chunk in order)
    assert text == "F0F1f0f1F2b0F3b1f2B0f3B1b2b3B2B3"


def test_placements() -> None:
    loop, turn = Placement(3, 2), Placement(3, 2, turns=True)
    assert [loop.owner(part) for part in range(6)] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    assert [turn.owner(part) for part in range(6)] == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]
    assert all(one.part(*one.owner(part)) == part for one in (loop, turn) for part in range(6))


@pytest.mark.parametrize("placement", [Placement(1), Placement(4), Placement(4, 3), Placement(3, 2, turns=True)])
def test_forward_only(placement: Placement) -> None:
    orders = [forward_only(stage, placement.num_stages, 9, placement) for stage in range(placement.num_stages)]
    everything = [Instruction("F", index, chunk) for index in range(9) for chunk in range(placement.num_chunks)]
    assert all(sorted(order) == everything for order in orders)
    played = simulate(orders, [StageCosts(1, 0, 0)] * placement.num_parts, 0.0, placement)
    assert played.step <= 9 * placement.num_chunks + 2 * placement.num_parts
