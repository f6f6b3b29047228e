"""Schedules as data: order, memory, and completeness."""

import pytest

from llmpipe_cli.engine.schedules import SCHEDULES, Instruction, forward_only, one_f_one_b


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_stages", [1, 2, 4, 7])
@pytest.mark.parametrize("num_micro_batches", [1, 3, 8])
def test_every_micro_batch_once_forward_before_backward(name: str, num_stages: int, num_micro_batches: int) -> None:
    for stage in range(num_stages):
        order = SCHEDULES[name](stage, num_stages, num_micro_batches)
        assert sorted(order) == sorted(Instruction(kind, index) for kind in "FB" for index in range(num_micro_batches))
        for index in range(num_micro_batches):
            assert order.index(Instruction("F", index)) < order.index(Instruction("B", index))


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


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_deadlock_when_every_stage_waits_for_its_partner(name: str) -> None:
    """Run all stages' lists against each other: an instruction may start only when its input has been made."""
    num_stages, num_micro_batches = 4, 6
    lists = [SCHEDULES[name](stage, num_stages, num_micro_batches) for stage in range(num_stages)]
    done: set[tuple[int, str, int]] = set()
    while any(lists):
        progress = False
        for stage, order in enumerate(lists):
            if not order:
                continue
            kind, index = order[0]
            needs = (stage - 1, "F", index) if kind == "F" else (stage + 1, "B", index)
            at_the_end = needs[0] in (-1, num_stages)
            if at_the_end or needs in done:
                done.add((stage, kind, index))
                order.pop(0)
                progress = True
        assert progress, "the stages wait for each other"
