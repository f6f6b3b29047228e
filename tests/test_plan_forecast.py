"""What a training is expected to take: kept, compared with the first steps, refused when it cannot fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmpipe_cli.plan.forecast import Comparison, Forecast, compare

EXPECTED = Forecast(2.0, [0.8, 0.9], [4 * 2**30, 3 * 2**30], 0.1)


def _step(busy: list[float], seconds: float = 2.0, gib: float = 4.0) -> dict[str, Any]:
    stages = [{"busy_seconds": value} for value in busy]
    return {"step_seconds": seconds, "stages": stages, "memory_bytes": [round(gib * 2**30), 3 * 2**30]}


def test_warnings_name_the_stage() -> None:
    said = compare(EXPECTED, [_step([0.8, 0.95])])
    assert not any("warning" in sentence for sentence in said)
    assert any("2.000 s, predicted 2.000 s" in sentence for sentence in said)
    said = compare(EXPECTED, [_step([0.8, 1.8], 3.0, gib=8.0)])
    assert "warning: stage 1 computes 100% more than predicted" in said
    assert "warning: stage 0 holds 8.0 GiB, predicted 4.0 GiB" in said


def test_what_is_presumed_is_said_and_only_shares_are_judged() -> None:
    expected = replace(EXPECTED, presumed="rates of the table", noisy=True)
    said = compare(expected, [_step([8.0, 9.0], 20.0, gib=1.0)])
    assert said == [
        "a step takes 20.000 s, predicted 2.000 s (-90%; presumed: rates of the table)",
        "of it the stages compute (predicted, scaled to the same mean): "
        "stage 0 8.000 s (8.000), stage 1 9.000 s (9.000)",
    ]
    # Of two stages neither can be told to be the one that is as predicted: both are off by the same factor.
    assert compare(expected, [_step([1.0, 9.0])])[-1] == "warning: stage 0 computes 65% less than predicted"
    three = replace(expected, stage_seconds=[1.0, 1.0, 1.0])
    said = compare(three, [_step([4.0, 1.0, 1.0])])
    assert said[-1] == "warning: stage 0 computes 152% more than predicted"


def test_processors_are_given_more_room_than_accelerators() -> None:
    half_as_much_again = [_step([0.8, 1.35], gib=8.0)]
    assert compare(EXPECTED, half_as_much_again)[-1] == "warning: stage 1 computes 50% more than predicted"
    assert len(compare(replace(EXPECTED, noisy=True), half_as_much_again)) == 2
    assert compare(replace(EXPECTED, noisy=True), [_step([0.8, 1.8])])[-1].startswith("warning: stage 1 computes 100%")


def test_said_once_after_the_first_steps() -> None:
    comparison = Comparison(EXPECTED)
    assert comparison.add([{"event": "start"}, *[_step([0.8, 0.9])] * 7]) == []
    assert comparison.add([_step([0.8, 0.9])])
    assert comparison.add([_step([0.8, 0.9])] * 20) == []
