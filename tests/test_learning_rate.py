"""Learning rates against closed forms."""

import math

import pytest

from llmpipe_cli.engine.learning_rate import learning_rate_curve
from llmpipe_cli.recipe.schema import TrainSection

PEAK, STEPS, WARMUP = 2e-3, 100, 10


def _curve(kind: str, **options: float):
    train = TrainSection(learning_rate=PEAK, lr_scheduler_type=kind, **options)
    return learning_rate_curve(train, STEPS, WARMUP)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "inverse_sqrt"])
def test_warm_up_rises_linearly_from_zero(kind: str) -> None:
    curve = _curve(kind)
    assert [curve(step) for step in (0, 5, 10)] == pytest.approx([0.0, PEAK / 2, PEAK])


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("linear", {}, PEAK * (100 - 55) / 90),
        ("cosine", {}, PEAK * 0.5),
        ("cosine", {"min_lr_ratio": 0.1}, PEAK * 0.55),
        ("constant", {}, PEAK),
        ("inverse_sqrt", {}, PEAK * math.sqrt(10 / 55)),
        ("wsd", {}, PEAK),
    ],
)
def test_halfway(kind: str, options: dict[str, float], expected: float) -> None:
    assert _curve(kind, **options)(55) == pytest.approx(expected, rel=1e-6)


def test_wsd_falls_over_its_last_share() -> None:
    curve = _curve("wsd", decay_ratio=0.2, min_lr_ratio=0.1)
    assert curve(80) == pytest.approx(PEAK)
    assert curve(90) == pytest.approx(PEAK * 0.55)
    assert curve(100) == pytest.approx(PEAK * 0.1)


def test_any_step_can_be_asked_first() -> None:
    assert _curve("cosine")(70) == _curve("cosine")(70)
    forward = _curve("cosine")
    values = [forward(step) for step in range(STEPS)]
    backward = _curve("cosine")
    assert [backward(step) for step in reversed(range(STEPS))] == values[::-1]
