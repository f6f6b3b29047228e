"""The batches of a run: which samples form which micro-batch of which step, for every layout alike.

A global batch is an ordered list of micro-batches. Layouts only decide which replica computes which of them, so neither
the number of stages nor that of replicas changes what a step learns from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmpipe_cli.data.dataset import MixedSamples, Samples
from llmpipe_cli.data.order import MixtureOrder, SampleOrder
from llmpipe_cli.errors import UsageError

if TYPE_CHECKING:
    from llmpipe_cli.tasks.base import Batch, Task


class BatchPlan:
    """Micro-batches by (step, index); no state, so resuming needs only the step's number.

    Args:
        samples: the training split.
        task: makes micro-batches of samples.
        global_batch_size: samples a step over all replicas.
        micro_batch_size: samples a micro-batch; divides `global_batch_size`.
        seed: decides the order of samples and everything random in a batch (masking).
        shuffle: off reads the samples in their own order, epoch after epoch.

    Raises:
        UsageError: when the sizes do not divide.
    """

    def __init__(
        self,
        samples: Samples,
        task: Task,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        if global_batch_size % micro_batch_size:
            raise UsageError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size}",
                where="train.global_batch_size",
            )
        self.samples = samples
        self.task = task
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.order: SampleOrder | MixtureOrder = (
            MixtureOrder(samples.sizes, samples.split.draws, seed)
            if isinstance(samples, MixedSamples)
            else SampleOrder(len(samples), seed, shuffle)
        )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a global batch, over all replicas."""
        return self.global_batch_size // self.micro_batch_size

    @property
    def steps_per_epoch(self) -> float:
        """Steps in one pass over the samples; the last step of an epoch may run on into the next."""
        return len(self.samples) / self.global_batch_size

    def sample_indices(self, step: int, index: int) -> npt.NDArray[np.int64]:
        """Samples of micro-batch `index` of step `step` (both from 0), int64 [micro_batch_size]."""
        if not 0 <= index < self.num_micro_batches:
            raise IndexError(index)
        start = step * self.global_batch_size + index * self.micro_batch_size
        return self.order.indices(start, start + self.micro_batch_size)

    def micro_batch(self, step: int, index: int) -> Batch:
        """Micro-batch `index` (from 0, over all replicas) of step `step` (from 0): keyword arguments of the model,
        int64 tensors on the CPU."""
        samples = [self.samples[int(sample)] for sample in self.sample_indices(step, index)]
        return self.task.collate(samples, seed=(self.seed, step, index))
