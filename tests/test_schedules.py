"""Schedules as data: order, memory, and completeness."""

import pytest

from llmpipe_cli.engine.schedules import SCHEDULES, Instruction, forward_only, one_f_one_b, zb_h1


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_stages", [1, 2, 4, 7])
@pytest.mark.parametrize("num_micro_batches", [1, 3, 8])
def test_every_micro_batch_once_in_order(name: str, num_stages: int, num_micro_batches: int) -> None:
    for stage in range(num_stages):
        order = SCHEDULES[name](stage, num_stages, num_micro_batches)
        for index in range(num_micro_batches):
            kinds = [instruction.kind for instruction in order if instruction.micro_batch == index]
            assert kinds in (["F", "B"], ["F", "I", "W"])
        assert len({instruction.micro_batch for instruction in order}) == num_micro_batches


@pytest.mark.parametrize("stage", range(4))
def test_1f1b_keeps_as_many_micro_batches_as_stages_follow(stage: int) -> None:
    alive = most = 0
    for instruction in one_f_one_b(stage, 4, 16):
        alive += 1 if instruction.kind == "F" else -1
        most = max(most, alive)
    assert most == 4 - stage


def test_1f1b_of_the_first_of_two_stages() -> None:
    order = one_f_one_b(0, 2, 3)
    assert "".join(f"{kind}{index}" for kind, index in order) == "F0F1B0F2B1B2"


def test_forward_only() -> None:
    assert forward_only(1, 2, 2) == [Instruction("F", 0), Instruction("F", 1)]


def test_zb_h1_of_the_last_of_three_stages() -> None:
    order = zb_h1(2, 3, 4)
    assert "".join(f"{kind}{index}" for kind, index in order) == "F0I0F1I1F2I2W0F3I3W1W2W3"
