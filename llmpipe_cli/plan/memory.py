"""Bytes of a stage: weights, gradients, optimizer, activations, buffers.

Weights, gradients and optimizer state follow from the stage's parameters, the dtype and the ZeRO stage (Rajbhandari et
al. 2020: 2 + 2 + 12 bytes a parameter in 16 bit with Adam, the 12 divided by the replicas under ZeRO-1). Activations
are what autograd keeps for each live micro-batch, as the schedule makes them live; under full checkpointing only the
inputs of layers, and one layer's own while it is computed again. Where micro-batches are small, the fullest moment
is that of reducing gradients or of the optimizer's step, with their copies of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmpipe_cli.plan.cost import Conditions
from llmpipe_cli.plan.engines import EngineProfile
from llmpipe_cli.plan.profile import SegmentProfile, Size

OPTIMIZER_STATES = {"adamw": 2, "lion": 1, "sgd": 1, "adafactor": 0}
"""fp32 numbers a parameter besides the master weight; adafactor's row and column sums are negligible."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a stage, by what they are for.

    Attributes:
        weights: parameters in the model's dtype.
        gradients: stored gradients.
        optimizer: fp32 masters and moments.
        activations: of live micro-batches, and what a layer needs while it runs; where most are alive before there
            are gradients, what exceeds the gradients.
        buffers: flat copies, communication, the driver's context, allocator slack.
        reserved: what of the buffers is no tensor: context and slack.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    reserved: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers

    @property
    def allocated(self) -> float:
        """Bytes of tensors: what an allocator counts as in use."""
        return self.total - self.reserved

    def parts(self) -> dict[str, float]:
        """Bytes by what they are for; their sum is the total."""
        return {name: value for name, value in vars(self).items() if name != "reserved"}


class Moment(NamedTuple):
    """Micro-batches that a stage holds at one of its fullest moments, a number for each of its chunks.

    Attributes:
        alive: those whose activations wait for the backward pass.
        waiting: those that only wait for their weight gradients.
        accumulating: whether a backward pass of this step has made gradients already.
    """

    alive: tuple[int, ...]
    waiting: tuple[int, ...]
    accumulating: bool = True


@dataclass(frozen=True)
class ChunkMemory:
    """What a part of the model needs on a rank, whatever the schedule.

    Attributes:
        parameters: elements.
        learning: elements that learn.
        kept: bytes of one micro-batch between its forward and its backward pass.
        posted: bytes of tensors on their way to and from other parts, whatever is alive.
        pending: bytes of one micro-batch whose weight gradients are postponed.
        working: bytes that its hungriest segment needs only while it runs.
    """

    parameters: float
    learning: float
    kept: float
    posted: float
    pending: float
    working: float


def chunk_memory(
    segments: Sequence[SegmentProfile], conditions: Conditions, *, received: float = 0.0, sent: float = 0.0
) -> ChunkMemory:
    """Memory of consecutive segments.

    Args:
        segments: the segments.
        conditions: how micro-batches run.
        received: bytes a token that the part before sends; 0 for the first part.
        sent: bytes a token that go to the part behind; 0 for the last part.
    """
    engine, tensor = conditions.engine, conditions.tensor
    tokens = conditions.tokens / (tensor if engine.sequence_parallel else 1)
    return ChunkMemory(
        parameters=sum(segment.parameters_on(tensor) for segment in segments),
        learning=sum(segment.learning_on(tensor) for segment in segments),
        kept=_kept(segments, conditions, received) + engine.kept_boundaries * tokens * max(received, sent),
        posted=engine.posted_boundaries * tokens * (received + sent),
        pending=_pending(segments, conditions),
        working=max(_working(segment, conditions) for segment in segments),
    )


def stage_memory(
    chunks: Sequence[ChunkMemory],
    conditions: Conditions,
    held: Sequence[Moment],
    *,
    data: int,
    zero_stage: int,
    optimizer: str = "adamw",
) -> StageMemory:
    """Peak memory of a rank.

    Args:
        chunks: the parts of the model that the stage holds.
        conditions: how micro-batches run.
        held: micro-batches at the fullest moments.
        data: replicas.
        zero_stage: 0 or 1.
        optimizer: name of the optimizer.
    """
    engine, dtype = conditions.engine, conditions.dtype
    width = 4 if dtype == "fp32" else 2
    parameters = sum(chunk.parameters for chunk in chunks)
    learning = sum(chunk.learning for chunk in chunks)
    if engine.shards_everything:  # one layer is whole at a time
        learning, parameters = learning / data, parameters / data
    states = 4.0 * OPTIMIZER_STATES[optimizer]
    masters = 4.0 if dtype != "fp32" or zero_stage else 0.0
    share = data if zero_stage and not engine.shards_everything else 1
    weights, gradients = parameters * width, learning * engine.gradient_bytes[dtype]
    state = learning * (states + masters) / share
    fresh = gradients if engine.fresh_gradients and dtype == "fp32" and not zero_stage else 0.0
    activations = max(
        sum(
            number * chunk.kept + postponed * chunk.pending
            for number, postponed, chunk in zip(moment.alive, moment.waiting, chunks, strict=True)
        )
        - (0.0 if moment.accumulating else fresh)
        for moment in held
    )
    activations += max(chunk.working for chunk in chunks) + sum(chunk.posted for chunk in chunks)
    # a process on a CPU has no driver's context
    fixed = 0.0 if conditions.device.is_cpu else engine.fixed_bytes
    copies = (engine.extra_parameter_bytes[dtype] + engine.step_bytes[zero_stage][dtype] / share) * learning
    at_the_end = _end_of_step(engine, dtype, learning, data=data, zero_stage=zero_stage)
    copies += max(0.0, at_the_end - activations)
    reserved = fixed + engine.slack * (weights + gradients + state + activations + copies + fixed)
    return StageMemory(weights, gradients, state, activations, copies + reserved, reserved)


def _end_of_step(engine: EngineProfile, dtype: str, learning: float, *, data: int, zero_stage: int) -> float:
    """Bytes besides weights, gradients and state after the last backward pass, when no activations are alive."""
    reduced = data > 1 or zero_stage > 0
    bucket = engine.reduce_bytes[dtype] * min(learning, engine.bucket_elements) if reduced else 0.0
    copies = engine.shard_copies[dtype] if zero_stage else 0.0
    # in place of the gradients, which are released shard by shard as they are reduced
    step = learning * (copies / data - engine.gradient_bytes[dtype])
    return max(bucket, step)


def _kept(chunk: Sequence[SegmentProfile], conditions: Conditions, received: float) -> float:
    """Bytes of one micro-batch between its forward and its backward pass through a chunk."""
    engine, tokens = conditions.engine, conditions.tokens
    divided = conditions.tensor if engine.sequence_parallel else 1
    kept = 0.0
    before = received
    for segment in chunk:
        if segment.kind == "layer" and conditions.checkpointing == "full":
            kept += tokens * (before or segment.carried) / divided
        elif segment.kind == "layer" and conditions.checkpointing == "selective":
            kept += _bytes(segment.selective_saved, conditions) * (1 - engine.selective_share)
        else:
            kept += _bytes(segment.saved, conditions)
        before = segment.carried
    return kept


def _pending(chunk: Sequence[SegmentProfile], conditions: Conditions) -> float:
    """Bytes of one micro-batch whose weight gradients of a chunk are postponed: inputs and output gradients."""
    width, tensor = (4 if conditions.dtype == "fp32" else 2), conditions.tensor
    elements = 0.0
    for segment in chunk:
        for product in segment.products:
            inner, outer = product.shard(tensor)
            elements += product.count * product.rows * (outer + (0 if product.shared else inner))
    return conditions.tokens * elements * width


def _working(segment: SegmentProfile, conditions: Conditions) -> float:
    """Bytes that a segment needs only while it runs."""
    working = segment.temporary.bytes(conditions.tokens, conditions.sequence_len, conditions.tensor)
    if segment.kind == "layer" and conditions.checkpointing != "none":
        saved = _bytes(segment.saved, conditions)
        if conditions.checkpointing == "selective":
            saved -= _bytes(segment.selective_saved, conditions) * (1 - conditions.engine.selective_share)
        working += saved
    return working


def _bytes(size: Size, conditions: Conditions) -> float:
    """A rank's bytes of a size for one micro-batch."""
    tokens, length, tensor = conditions.tokens, conditions.sequence_len, conditions.tensor
    if conditions.engine.sequence_parallel:
        return tokens * (size.whole + size.cut + size.squared * length) / tensor
    return size.bytes(tokens, length, tensor)
