"""Records of work that is handed over before it is done, as on an accelerator, with a clock that is set by hand."""

from __future__ import annotations

from typing import Any

import pytest

from llmpipe_cli.engine.recorder import Clock, Record, Recorder


class HandedOver(Clock):
    """A moment is a place in the queue; `times` says when the queue came there, as far as it has come."""

    def __init__(self) -> None:
        self.count = 0
        self.times: dict[int, float] = {}
        self.waited_for: list[int] = []

    def moment(self) -> int:
        self.count += 1
        return self.count - 1

    def seconds(self, start: Any, end: Any) -> float:
        return self.times[end] - self.times[start]

    def is_past(self, moment: Any) -> bool:
        return moment in self.times

    def wait(self, moment: Any) -> None:
        self.waited_for.append(moment)
        self.times = {place: self.times.get(place, float(place)) for place in range(moment + 1)} | self.times


def test_times_are_those_of_the_device() -> None:
    clock = HandedOver()
    recorder = Recorder(clock)
    recorder.restart()  # place 1
    recorder.begin("F", 0)  # 2
    recorder.arrived()
    recorder.end()
    recorder.begin("reduce")  # 5
    recorder.end()
    clock.times = {1: 10.0, 2: 10.5, 3: 12.5, 4: 13.0, 5: 13.0, 6: 13.25}
    assert recorder.records() == [Record("F", 0, 0, 0.5, 2.5, 3.0), Record("reduce", None, 0, 3.0, 3.0, 3.25)]
    parts = recorder.seconds()
    assert parts["wait_activations"] == pytest.approx(2.0)
    assert (parts["busy"], parts["reduce"]) == (pytest.approx(0.5), pytest.approx(0.25))


def test_the_open_piece_is_the_one_that_the_device_is_at() -> None:
    clock = HandedOver()
    recorder = Recorder(clock)
    for index in range(3):
        recorder.begin("F", index)
        recorder.arrived()
        recorder.end()
    clock.times = dict.fromkeys(range(5), 0.0)  # the first pass is done, the second awaits its input
    piece = recorder.open_piece()
    assert piece is not None
    assert (piece.micro_batch, piece.waiting) == (1, True)
    clock.times[5] = 0.0
    piece = recorder.open_piece()
    assert piece is not None
    assert (piece.micro_batch, piece.waiting) == (1, False)
    clock.times |= dict.fromkeys(range(10), 0.0)
    assert recorder.open_piece() is None


def test_the_host_is_not_far_ahead() -> None:
    """A piece that does not end is to be noticed before the step's other pieces have been handed over."""
    clock = HandedOver()
    recorder = Recorder(clock)
    ends = []
    for index in range(10):
        recorder.begin("F", index)
        recorder.arrived()
        recorder.end()
        ends.append(clock.count - 1)
    assert clock.waited_for == ends[:6]
