"""The sample order and the batches made of it: the seed decides, and no layout does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from llmpipe_cli.data.batches import BatchPlan
from llmpipe_cli.data.dataset import Samples, open_split
from llmpipe_cli.data.order import SampleOrder
from llmpipe_cli.data.prepared import PreparedData, PreparedSplit
from llmpipe_cli.errors import UsageError
from llmpipe_cli.tasks.base import Task
from llmpipe_cli.tasks.registry import get_task


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_each_epoch_draws_each_sample_once(num_samples: int) -> None:
    order = SampleOrder(num_samples, seed=7)
    for epoch in range(3):
        drawn = order.indices(epoch * num_samples, (epoch + 1) * num_samples)
        assert drawn.dtype == np.int64
        assert sorted(drawn.tolist()) == list(range(num_samples))


def test_epochs_and_seeds_differ_and_look_random() -> None:
    first = SampleOrder(10_000, seed=1).indices(0, 30_000)
    other_seed = SampleOrder(10_000, seed=2).indices(0, 10_000)
    for other in (first[10_000:20_000], first[20_000:], other_seed, np.arange(10_000)):
        # of two independent permutations about one place agrees; 10 is beyond any chance
        assert (first[:10_000] == other).sum() < 10
        assert abs(np.corrcoef(first[:10_000], other)[0, 1]) < 0.05  # five standard deviations
    steps = np.diff(first[:10_000])
    assert 3000 < np.abs(steps).mean() < 3700  # a third of the range, as for independent draws


def test_any_range_is_read_without_state() -> None:
    order = SampleOrder(37, seed=3)
    whole = order.indices(0, 200)
    for start, stop in [(0, 1), (30, 45), (36, 38), (74, 74), (73, 200)]:
        assert order.indices(start, stop).tolist() == whole[start:stop].tolist()


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    assert SampleOrder(10, seed=1234).indices(0, 20).tolist() == [
        5,
        7,
        2,
        3,
        0,
        1,
        9,
        6,
        8,
        4,
        4,
        9,
        5,
        1,
        2,
        0,
        8,
        6,
        7,
        3,
    ]
    assert SampleOrder(10, seed=1234, shuffle=False).indices(8, 13).tolist() == [8, 9, 0, 1, 2]


def synthetic(task: str = "causal-lm", num_samples: int = 50) -> tuple[Samples, Task]:
    split = PreparedSplit(
        kind="synthetic",
        directory="",
        fingerprint="0f",
        task=task,
        sequence_len=16,
        target_sequence_len=16,
        vocab_size=100,
        num_samples=num_samples,
    )
    data = PreparedData(task=task, tokenizer_dir=None, vocab_size=100, train=split)
    return open_split(split), get_task(data)


def plan(micro_batch_size: int, task: str = "causal-lm") -> BatchPlan:
    samples, made = synthetic(task)
    return BatchPlan(samples, made, global_batch_size=12, micro_batch_size=micro_batch_size, seed=5)


def seen_by(batches: BatchPlan, step: int, replicas: int) -> torch.Tensor:
    """The global batch of a step, read by replicas that each take a run of micro-batches."""
    share = batches.num_micro_batches // replicas
    parts: Sequence[torch.Tensor] = [
        batches.micro_batch(step, replica * share + index)["input_ids"]
        for replica in range(replicas)
        for index in range(share)
    ]
    return torch.cat(list(parts))


@pytest.mark.parametrize("step", [0, 4, 11])
def test_layouts_see_the_same_global_batch(step: int) -> None:
    reference = seen_by(plan(2), step, replicas=1)
    assert reference.shape == (12, 16)
    for replicas in (2, 3, 6):
        assert torch.equal(seen_by(plan(2), step, replicas), reference)
    for micro_batch_size in (1, 3, 4):
        assert torch.equal(seen_by(plan(micro_batch_size), step, replicas=1), reference)


def test_steps_walk_through_the_epoch() -> None:
    batches = plan(2)
    assert batches.steps_per_epoch == 50 / 12
    drawn = [int(sample) for step in range(25) for index in range(6) for sample in batches.sample_indices(step, index)]
    assert len(drawn) == 300
    assert {drawn.count(sample) for sample in range(50)} == {6}


def test_masking_depends_on_seed_step_and_micro_batch() -> None:
    batches = plan(4, "masked-lm")
    one, again = batches.micro_batch(3, 1), plan(4, "masked-lm").micro_batch(3, 1)
    assert torch.equal(one["labels"], again["labels"])
    assert torch.equal(one["input_ids"], again["input_ids"])
    for other in (batches.micro_batch(3, 2), batches.micro_batch(4, 1)):
        assert not torch.equal(one["labels"], other["labels"])


def test_sizes_must_divide() -> None:
    samples, task = synthetic()
    with pytest.raises(UsageError) as caught:
        BatchPlan(samples, task, global_batch_size=10, micro_batch_size=4, seed=0)
    assert caught.value.where == "train.global_batch_size"
    with pytest.raises(IndexError):
        plan(4).micro_batch(0, 3)
