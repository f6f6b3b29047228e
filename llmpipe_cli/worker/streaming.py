"""Micro-batches of streamed data: rank 0 reads, and gives each step's global batch to all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from llmpipe_cli.data.prepared import PreparedSplit
from llmpipe_cli.data.stream import SampleStream, positions_of
from llmpipe_cli.tasks.base import Batch, Task


class StreamBatches:
    """Micro-batches by (step, index), as `data.batches.BatchPlan` has them; all ranks ask for the same steps in turn.

    Args:
        split: of the kind "stream".
        task: makes micro-batches of samples.
        device: where the process group's tensors live.
        global_batch_size: samples a step over all replicas.
        micro_batch_size: samples a micro-batch.
        seed: decides the order of samples and everything random in a batch.
        shuffle: off keeps the source's order.
    """

    def __init__(
        self,
        split: PreparedSplit,
        task: Task,
        device: torch.device,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.split, self.task, self.device = split, task, device
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.seed, self.shuffle = seed, shuffle
        self.resume_state: dict[str, int] | None = None
        self._stream: SampleStream | None = None
        self._step = -1
        self._rows: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def skipped(self) -> tuple[int, list[str]]:
        """Records left out so far, and the first of them; on rank 0."""
        log = self._stream.skipped if self._stream is not None else None
        return (log.num_skipped, log.examples) if log is not None else (0, [])

    def micro_batch(self, step: int, index: int) -> Batch:
        """Micro-batch `index` of step `step`; the first one of a step waits for all ranks."""
        if step != self._step:
            self._rows, self._step = self._fetch(step), step
        assert self._rows is not None
        tokens, positions = self._rows
        rows = range(index * self.micro_batch_size, (index + 1) * self.micro_batch_size)
        samples = [{"input_ids": tokens[row], "positions": positions[row]} for row in rows]
        return self.task.collate(samples, seed=(self.seed, step, index))

    def state(self, step: int) -> dict[str, int] | None:
        """What a checkpoint after `step` steps keeps; on rank 0."""
        if self._stream is None:
            return self.resume_state
        return self._stream.state(step * self.global_batch_size)

    def _fetch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The step's tokens and positions, int64 [global_batch_size, sequence_len] each."""
        both = torch.empty(2, self.global_batch_size, self.split.sequence_len, dtype=torch.int32, device=self.device)
        if dist.get_rank() == 0:
            if self._stream is None:
                self._stream = SampleStream(self.split, self.seed, self.shuffle, self.resume_state)
            start = step * self.global_batch_size
            tokens, begins = self._stream.samples(start, start + self.global_batch_size)
            planes: Any = np.stack([tokens, positions_of(begins).astype(np.int32)])
            both.copy_(torch.from_numpy(planes))
        dist.broadcast(both, 0)
        tokens, positions = both.cpu().numpy().astype(np.int64)
        return tokens, positions
