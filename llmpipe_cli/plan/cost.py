"""Seconds of each segment, stage and step, from a model's profile, a device and a cluster's links.

A matrix product takes the longer of its arithmetic and its traffic (a roofline), its arithmetic at

    peak x matmul_fraction x (share of the multiprocessors' turns that tiles of the result fill)

operations a second: small products fill a device badly. Elementwise kernels move bytes at the achievable bandwidth; no
pass is faster than its kernels can be launched. A backward pass is two products for each one forward: the gradient of
the input (I) and of the weight (W). Tensor shards wait for their all-reduces; replicas reduce gradients after the last
micro-batch; then the optimizer reads and writes its state. The constants are stated here and in `plan.devices`, the
same for all models and runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmpipe_cli.plan.cluster import Cluster
from llmpipe_cli.plan.devices import Device
from llmpipe_cli.plan.engines import EngineProfile
from llmpipe_cli.plan.profile import Attention, ModelProfile, SegmentProfile
from llmpipe_cli.plan.simulate import StageCosts

TILES = ((256, 128, 1.0), (128, 128, 0.93), (128, 64, 0.8))
"""Rows and columns of the result that one multiprocessor computes at a time, and their share of the best rate: smaller
tiles load more than they compute. A library chooses the one that is done first."""
CPU_HALF_SIZE = 8.0
"""Size of a side of a matrix product at which a processor core reaches half its rate along that side."""
ALIGNMENT = 8
"""Elements of 16 bit that tensor cores load at a time: 16 bytes."""
UNALIGNED_PRODUCT_FRACTION = 0.8
"""Rate of products with a weight in 16 bit with a side that is no multiple of 8; no published run shows it."""
UNALIGNED_HEAD_FRACTION = 0.035
"""Share of the peak of unfused attention's products when a head's size is no multiple of 8: tensor cores cannot be used
(11 TFLOP/s on an A100, a little over half its fp32 rate; `docs/planner.md`)."""
FUSED_ATTENTION_FRACTION = {"v100": 0.35, "a100": 0.55, "h100": 0.42, "h200": 0.42}
DEFAULT_FUSED_ATTENTION_FRACTION = 0.4
"""Share of the peak that fused attention reaches (Dao 2023, FlashAttention-2, figures 4 to 7)."""
CPU_WEIGHT_COPIES = 4.0
"""On a processor, times that a product with a weight moves it: read and packed, read again, results paged in. The
product that gives the weight's gradient does not read the weight; what it writes is counted with the accumulation."""
CPU_BACKWARD_TRAFFIC = 1.0
"""`BACKWARD_TRAFFIC` of a processor, whose caches still hold what the operation before wrote."""
CPU_BACKWARD_LAUNCHES = 0.25
"""Time of a processor's calls in a backward pass, relative to the forward pass's: the interpreter has no part in it."""
CPU_PASS_SECONDS = 1e-3
"""What the engine does around each pass of a part on a processor: the loop, the graph's ends, the boundary's tensors.
On an accelerator the host does it while the device computes."""
BACKWARD_TRAFFIC = 1.6
"""Bytes that elementwise kernels move in a backward pass, as a multiple of the forward pass's."""
ADAM_BYTES = 30.0
"""Bytes a parameter that a mixed-precision Adam step reads and writes: gradient, master, two moments; the same back."""


@dataclass(frozen=True)
class Conditions:
    """How micro-batches run on a device.

    Attributes:
        device: the device.
        cluster: for the links.
        engine: whose engine.
        dtype: fp32, bf16 or fp16.
        micro_batch_size: samples.
        sequence_len: tokens a sample.
        tensor: tensor shards.
        checkpointing: none, selective or full.
    """

    device: Device
    cluster: Cluster
    engine: EngineProfile
    dtype: str
    micro_batch_size: int
    sequence_len: int
    tensor: int = 1
    checkpointing: str = "none"

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.sequence_len


def product_seconds(device: Device, dtype: str, rows: float, inner: float, outer: float, batch: float = 1.0) -> float:
    """Time of `batch` matrix products [rows, inner] x [inner, outer] in one kernel."""
    flops = 2.0 * batch * rows * inner * outer
    if device.is_cpu:
        half = CPU_HALF_SIZE
        filled = (rows / (rows + half)) * (inner / (inner + half)) * (outer / (outer + half))
    else:
        filled = max(_occupied(device.units, rows, outer, tile, batch) for tile in TILES)
        if dtype != "fp32" and (inner % ALIGNMENT or outer % ALIGNMENT):
            filled *= UNALIGNED_PRODUCT_FRACTION
    seconds = flops / (device.peak(dtype) * device.matmul_fraction * filled)
    if device.is_cpu:  # whose memory is counted apart, see `segment_work`
        return seconds
    width = 4 if dtype == "fp32" else 2
    moved = width * batch * (rows * inner + inner * outer + rows * outer)
    return max(seconds, moved / (device.memory_bandwidth * device.memory_fraction))


def _occupied(units: int, rows: float, outer: float, tile: tuple[int, int, float], batch: float) -> float:
    """Share of the best rate: part of the tiles lies outside the result, part of the last turn's units is idle."""
    height, width, rate = tile
    tiles = batch * math.ceil(rows / height) * math.ceil(outer / width)
    turns = math.ceil(tiles / units)
    return rate * batch * rows * outer / (turns * units * height * width)


def attention_seconds(attention: Attention, conditions: Conditions) -> float:
    """Time of the forward pass of an attention's two products on one tensor shard."""
    device, length = conditions.device, conditions.sequence_len
    flops = conditions.tokens * attention.flops_squared * length / conditions.tensor
    peak = device.peak(conditions.dtype)
    if attention.fused:
        if attention.causal:
            flops /= 2
        family = device.name.partition("-")[0]
        share = FUSED_ATTENTION_FRACTION.get(family, DEFAULT_FUSED_ATTENTION_FRACTION)
        return flops / (peak * (device.matmul_fraction if device.is_cpu else share))
    batch = conditions.micro_batch_size * attention.heads / conditions.tensor
    dim = attention.head_dim
    seconds = product_seconds(device, conditions.dtype, length, dim, length, batch)
    seconds += product_seconds(device, conditions.dtype, length, length, dim, batch)
    if dim % 8 and not device.is_cpu:
        seconds = max(seconds, flops / attention.count / (peak * UNALIGNED_HEAD_FRACTION))
    return attention.count * seconds


@dataclass(frozen=True)
class Work:
    """Seconds of a pass, by the kind of work.

    Attributes:
        arithmetic: products and attention.
        memory: bytes that kernels move.
        launches: calls of kernels.
    """

    arithmetic: float = 0.0
    memory: float = 0.0
    launches: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.arithmetic + other.arithmetic, self.memory + other.memory, self.launches + other.launches)

    def seconds(self, device: Device) -> float:
        """A processor does one after the other; an accelerator computes while the host launches what follows."""
        if device.is_cpu:
            return self.arithmetic + self.memory + self.launches
        return max(self.arithmetic + self.memory, self.launches)


def segment_work(segment: SegmentProfile, conditions: Conditions) -> tuple[Work, Work, Work]:
    """Work of one micro-batch without checkpointing: forward, input gradient and weight gradient."""
    device, tokens, tensor, engine = conditions.device, conditions.tokens, conditions.tensor, conditions.engine
    forward = inputs = weights = 0.0
    for product in segment.products:
        inner, outer = product.shard(tensor)
        rows = tokens * product.rows
        forward += product.count * product_seconds(device, conditions.dtype, rows, inner, outer)
        inputs += product.count * product_seconds(device, conditions.dtype, rows, outer, inner)
        weights += product.count * product_seconds(device, conditions.dtype, inner, rows, outer)
    core = sum(attention_seconds(attention, conditions) for attention in segment.attentions)
    core_backward = (2.5 if any(attention.fused for attention in segment.attentions) else 2.0) * core
    rate = device.memory_bandwidth * device.memory_fraction
    streamed = moved_bytes(segment, conditions) / rate
    learning, launches = segment.learning_on(tensor), segment.kernels * device.launch_seconds
    fetched, backward, called_back = 0.0, BACKWARD_TRAFFIC, launches
    if device.is_cpu:  # (on an accelerator the weights are part of the roofline of a product)
        backward, called_back = CPU_BACKWARD_TRAFFIC, CPU_BACKWARD_LAUNCHES * launches
        elements = sum(product.inner * product.outer * product.count for product in segment.products) / tensor
        fetched = elements * (4 if conditions.dtype == "fp32" else 2) * CPU_WEIGHT_COPIES / rate
    stored = engine.gradient_bytes[conditions.dtype]
    accumulated = 0.0 if engine.fused_accumulation else learning * (2 + stored * 2) / rate
    share = learning / max(segment.parameters_on(tensor), 1.0)
    return (
        Work(forward + core, streamed + fetched, launches),
        Work(inputs + core_backward, backward * streamed + fetched, called_back),
        Work(weights * share, accumulated, 0.0),
    )


def segment_costs(segment: SegmentProfile, conditions: Conditions) -> StageCosts:
    """Seconds of one micro-batch: forward, input gradient and weight gradient; recomputation is in the second."""
    device, tokens, tensor = conditions.device, conditions.tokens, conditions.tensor
    reduced = 0.0
    if tensor > 1 and segment.all_reduces:
        once = conditions.cluster.ring_seconds(tokens * segment.carried, tensor, 1)
        reduced = segment.all_reduces * (once + conditions.engine.collective_seconds)
    forward, inputs, weights = (work.seconds(device) for work in segment_work(segment, conditions))
    forward += reduced
    inputs += reduced - min(reduced * conditions.engine.hidden_reductions, weights)
    if segment.kind == "layer":
        if conditions.checkpointing == "full":
            inputs += forward
        elif conditions.checkpointing == "selective":
            inputs += _selected_again(segment, conditions, forward)
    return StageCosts(forward, inputs, weights)


def _selected_again(segment: SegmentProfile, conditions: Conditions, forward: float) -> float:
    """Seconds of what selective checkpointing computes again in a layer whose forward pass takes `forward`."""
    engine, tokens, tensor = conditions.engine, conditions.tokens, conditions.tensor
    rate = conditions.device.memory_bandwidth * conditions.device.memory_fraction
    core = sum(attention_seconds(attention, conditions) for attention in segment.attentions)
    if engine.selective_elementwise:  # all but matrix products with weights and fused attention
        fused = any(attention.fused for attention in segment.attentions)
        return moved_bytes(segment, conditions) / rate + (0.0 if fused else core)
    scores = tokens * segment.traffic.squared * conditions.sequence_len / tensor / rate
    return core + scores + engine.selective_share * (forward - core - scores)


def moved_bytes(segment: SegmentProfile, conditions: Conditions) -> float:
    """Bytes that elementwise kernels of a forward pass move."""
    moved, tokens, length = segment.traffic, conditions.tokens, conditions.sequence_len
    if conditions.engine.sequence_parallel:
        return (
            conditions.engine.traffic * tokens * (moved.whole + moved.cut + moved.squared * length) / conditions.tensor
        )
    return conditions.engine.traffic * moved.bytes(tokens, length, conditions.tensor)


def profile_costs(profile: ModelProfile, conditions: Conditions) -> list[StageCosts]:
    """`segment_costs` of every segment; like segments are worked out once."""
    known: dict[int, StageCosts] = {}
    costs = []
    for segment in profile.segments:
        key = id(segment)
        if key not in known:
            known[key] = segment_costs(segment, conditions)
        costs.append(known[key])
    return costs


def around_passes(device: Device, *, split: bool) -> StageCosts:
    """Seconds around the passes of a part: two a micro-batch, three where backward passes are split."""
    seconds = CPU_PASS_SECONDS if device.is_cpu else 0.0
    return StageCosts(seconds, seconds, seconds if split else 0.0)


def stage_costs(costs: Sequence[StageCosts], bounds: Sequence[int], around: StageCosts) -> list[StageCosts]:
    """Costs of each stage, the sum of its segments' and what is `around_passes`."""
    return [
        StageCosts(
            around.forward + sum(cost.forward for cost in costs[start:stop]),
            around.input_gradient + sum(cost.input_gradient for cost in costs[start:stop]),
            around.weight_gradient + sum(cost.weight_gradient for cost in costs[start:stop]),
        )
        for start, stop in itertools.pairwise(bounds)
    ]


def transfer_seconds(profile: ModelProfile, conditions: Conditions, bounds: Sequence[int], data: int) -> list[float]:
    """Time for one micro-batch's carried tensors from each stage but the last to the next.

    Args:
        profile: the model.
        conditions: how micro-batches run.
        bounds: first segment of each stage and, last, the number of segments.
        data: replicas, whose stages lie between a device and its successor.
    """
    cluster, tensor = conditions.cluster, conditions.tensor
    ranks, per_node = tensor * data, cluster.devices_per_node
    times = []
    for stage, boundary in enumerate(bounds[1:-1], 1):
        crosses = (stage * ranks) // per_node != (stage * ranks - ranks) // per_node
        num_bytes = conditions.tokens * profile.segments[boundary - 1].carried
        if conditions.engine.partitioned_transfers:
            gathered = cluster.ring_seconds(num_bytes, tensor, 1, rounds=1)
            whole = 0.0 if conditions.engine.sequence_parallel else gathered
            times.append(cluster.seconds(num_bytes / tensor, crosses) + whole)
        else:
            times.append(cluster.seconds(num_bytes, crosses))
    return times


@dataclass(frozen=True)
class EndOfStep:
    """What a stage does once a step.

    Attributes:
        reduce: replicas sum their gradients; seconds.
        gather: under ZeRO-1 they share the new parameters; seconds.
        ties: stages with the same parameter sum its gradients; seconds.
        optimizer: seconds.
        host: seconds.
    """

    reduce: float
    gather: float
    ties: float
    optimizer: float
    host: float

    @property
    def total(self) -> float:
        return self.reduce + self.gather + self.ties + self.optimizer + self.host


def end_of_step(
    segments: Sequence[SegmentProfile], conditions: Conditions, *, data: int, zero_stage: int, pipeline: int
) -> EndOfStep:
    """Seconds between a stage's last micro-batch and the next step.

    Args:
        segments: the stage's segments.
        conditions: how micro-batches run.
        data: replicas.
        zero_stage: 0 or 1.
        pipeline: stages.
    """
    engine, cluster, device, dtype = conditions.engine, conditions.cluster, conditions.device, conditions.dtype
    tensor = conditions.tensor
    learning = sum(segment.learning_on(tensor) for segment in segments)
    reduce = cluster.ring_seconds(learning * engine.reduce_bytes[dtype], data, tensor, engine.reduce_rounds)
    gather = cluster.ring_seconds(learning * (4 if dtype == "fp32" else 2), data, tensor, 1) if zero_stage else 0.0
    reduce, gather = (seconds * (1 - engine.overlapped) for seconds in (reduce, gather))
    tied = sum(segment.tied for segment in segments) / tensor
    ties = 0.0
    if tied and pipeline > 1:
        ties = cluster.ring_seconds(tied * engine.reduce_bytes[dtype], 2, data * tensor * (pipeline - 1), 2)
    share = data if zero_stage else 1
    rate = device.memory_bandwidth * device.memory_fraction * device.streaming
    optimizer = learning * ADAM_BYTES / share / rate + learning * engine.gradient_bytes[dtype] / rate
    return EndOfStep(reduce, gather, ties, optimizer, engine.host_seconds)
