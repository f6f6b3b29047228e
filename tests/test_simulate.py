"""The simulator against closed forms and published bubble rates."""

from __future__ import annotations

import random

import pytest

from llmpipe_cli.engine.schedules import SCHEDULES, Instruction
from llmpipe_cli.plan.simulate import StageCosts, simulate, simulate_schedule

# Qi et al. 2023, "Zero Bubble Pipeline Parallelism": stages, micro-batches, milliseconds of F, B, W and of a transfer,
# bubble rates of 1F1B and ZB-H1.
PUBLISHED = [
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585),
    (8, 32, 18.513, 18.086, 9.331, 0.626, 0.1985, 0.1242),
    (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0674),
    (8, 24, 29.718, 29.444, 19.927, 0.527, 0.2347, 0.1323),
    (8, 32, 29.802, 29.428, 19.530, 0.577, 0.1898, 0.1045),
    (8, 64, 29.935, 29.621, 19.388, 0.535, 0.1091, 0.0554),
    (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552, 0.1397),
    (16, 64, 11.307, 11.254, 8.101, 0.379, 0.2082, 0.1088),
    (16, 128, 11.325, 11.308, 8.109, 0.378, 0.1251, 0.0576),
    (32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646, 0.1421),
    (32, 128, 10.408, 10.204, 7.703, 0.408, 0.2168, 0.1106),
    (32, 256, 10.402, 10.248, 7.698, 0.460, 0.1352, 0.0594),
]


@pytest.mark.parametrize(("p", "m", "f", "b", "w", "transfer", "published_1f1b", "published_h1"), PUBLISHED)
def test_published_bubble_rates(
    p: int, m: int, f: float, b: float, w: float, transfer: float, published_1f1b: float, published_h1: float
) -> None:
    costs = [StageCosts(f, b, w)] * p
    for name, published in (("1f1b", published_1f1b), ("zb-h1", published_h1)):
        simulation = simulate_schedule(SCHEDULES[name], costs, m, transfer)
        assert simulation.bubble_fraction == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 8])
@pytest.mark.parametrize("costs", [StageCosts(1, 1, 1), StageCosts(3, 4, 2)])
def test_closed_forms(num_stages: int, costs: StageCosts) -> None:
    """Bubbles of the Zero Bubble paper's table 2, when there are enough micro-batches."""
    num_micro_batches, waits = 4 * num_stages, num_stages - 1
    f, b, w = costs.forward, costs.input_gradient, costs.weight_gradient
    bubbles = {"1f1b": f + b + w, "gpipe": f + b + w, "zb-h1": f + b - w, "zb-h2": f + b - 2 * w}
    for name, bubble in bubbles.items():
        simulation = simulate_schedule(SCHEDULES[name], [costs] * num_stages, num_micro_batches)
        assert max(simulation.stage_spans) == pytest.approx(num_micro_batches * costs.total + waits * bubble)


def test_activation_memory() -> None:
    peaks = {
        name: simulate_schedule(schedule, [StageCosts(1, 1, 1)] * 4, 12).peak_activations
        for name, schedule in SCHEDULES.items()
    }
    assert peaks == {"1f1b": [4, 3, 2, 1], "gpipe": [12] * 4, "zb-h1": [4] * 4, "zb-h2": [7] * 4}


def test_random_schedules_play_through() -> None:
    """Any number of stages and micro-batches, uneven costs: never a deadlock, never less than the longest stage."""
    generator = random.Random(0)
    for _ in range(200):
        costs = [StageCosts(*(generator.uniform(0.5, 2.0) for _ in range(3))) for _ in range(generator.randint(1, 8))]
        num_micro_batches = generator.randint(1, 20)
        simulation = simulate_schedule(
            generator.choice(list(SCHEDULES.values())), costs, num_micro_batches, generator.uniform(0.0, 0.5)
        )
        longest = max(stage.total for stage in costs) * num_micro_batches
        assert simulation.step >= longest - 1e-9
        assert len(simulation.stage_spans) == len(costs)


def test_a_wait_without_end_is_told() -> None:
    f, b = Instruction("F", 0), Instruction("B", 0)
    with pytest.raises(ValueError, match="wait for each other"):
        simulate([[b, f], [f, b]], [StageCosts(1, 1, 1)] * 2)
