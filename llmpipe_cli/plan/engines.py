"""How training engines differ where it costs time or memory: ours, and those that published runs were made with.

Each engine is one fixed set of facts. Ours is checked by measuring (`docs/planner.md`); the others are read from their
source code and serve the comparison with published runs (`benchmarks/published_runs.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from llmpipe_cli.plan.devices import GIB


def _dtypes(fp32: float, bf16: float, fp16: float) -> dict[str, float]:
    return {"fp32": fp32, "bf16": bf16, "fp16": fp16}


def _same(value: float) -> dict[str, float]:
    return _dtypes(value, value, value)


@dataclass(frozen=True)
class EngineProfile:
    """One engine.

    Attributes:
        name: its name.
        blocking_transfers: a stage computes nothing while it sends and receives.
        partitioned_transfers: tensor shards send a part of the carried tensors each and gather them on the other side.
        gradient_bytes: bytes of stored gradient a learning parameter, by dtype of the model.
        reduce_bytes: bytes a learning parameter that replicas reduce, by dtype.
        extra_parameter_bytes: further bytes a parameter that the engine holds (flat copies), by dtype.
        fixed_bytes: context of the driver, communicators' buffers, reduction buckets.
        kept_boundaries: copies of a boundary's tensor that a stage keeps for each live micro-batch, besides what
            autograd saves.
        posted_boundaries: copies of a boundary's tensor on the way in each direction, whatever is alive.
        bucket_elements: most gradients that are copied into one flat buffer to be reduced, after the backward passes.
        shard_copies: bytes a parameter of the rank's shard that gradients take in the optimizer's step of ZeRO-1: as
            they were reduced, flat and in fp32; by dtype, 0 where none are made.
        fresh_gradients: fp32 gradients without ZeRO are released after a step, and come with its first backward pass.
        slack: share by which an allocator's reservation exceeds what is in use.
        reduce_rounds: 2 for an all-reduce of gradients, 1 for a reduce-scatter.
        sequence_parallel: norms, dropout and boundaries are divided by the tensor shards too.
        shards_everything: replicas divide weights and gradients too (FSDP).
        selective_elementwise: selective checkpointing keeps products with weights and fused attention, nothing else;
            without it, it recomputes attention alone.
        selective_share: share of a layer's forward pass besides attention that selective checkpointing computes again.
        traffic: bytes of elementwise kernels, as a multiple of the profile's.
        collective_seconds: time that tensor shards lose at each all-reduce besides its own, waiting for the slowest
            host; a matter of the hosts rather than of the engine.
        hidden_reductions: share of the tensor shards' all-reduces of a backward pass that goes on behind the products
            of the weights' gradients.
        fused_accumulation: the product that gives a weight's gradient adds it to the stored one itself.
        step_bytes: bytes a parameter, divided by the replicas under ZeRO-1, that the optimizer's step adds, by dtype;
            without ZeRO and under ZeRO-1.
        overlapped: share of the reduction of gradients that goes on behind the backward pass.
        host_seconds: time a step on the host besides: logging, learning rate, data.
    """

    name: str
    blocking_transfers: bool
    partitioned_transfers: bool
    gradient_bytes: dict[str, float]
    reduce_bytes: dict[str, float]
    extra_parameter_bytes: dict[str, float]
    fixed_bytes: float
    kept_boundaries: float
    slack: float
    reduce_rounds: int = 2
    sequence_parallel: bool = False
    posted_boundaries: float = 0.0
    bucket_elements: float = 0.0
    shard_copies: dict[str, float] = field(default_factory=lambda: _same(0))
    fresh_gradients: bool = False
    shards_everything: bool = False
    selective_elementwise: bool = False
    selective_share: float = 0.0
    traffic: float = 1.0
    collective_seconds: float = 0.0
    hidden_reductions: float = 0.0
    fused_accumulation: bool = False
    step_bytes: tuple[dict[str, float], dict[str, float]] = (_same(0), _same(0))
    overlapped: float = 0.0
    host_seconds: float = 0.05


OURS = EngineProfile(
    name="llmpipe",
    blocking_transfers=False,
    partitioned_transfers=False,
    # bf16: DeepSpeed's BF16_Optimizer accumulates in fp32
    gradient_bytes=_dtypes(4, 4, 2),
    reduce_bytes=_dtypes(4, 4, 2),
    extra_parameter_bytes=_same(0),
    fixed_bytes=1.5 * GIB,  # assumed: context and NCCL's buffers
    kept_boundaries=1,
    posted_boundaries=2,  # receives are posted for two micro-batches ahead (`engine.transfers`)
    bucket_elements=5e8,
    shard_copies=_dtypes(8, 0, 8),
    fresh_gradients=True,
    slack=0.05,  # assumed
    selective_elementwise=True,
    host_seconds=0.005,
)
# Megatron-LM's DistributedDataParallel accumulates into one contiguous fp32 buffer, which is also what is reduced
MEGATRON = EngineProfile(
    name="megatron-lm",
    blocking_transfers=True,
    partitioned_transfers=True,
    gradient_bytes=_same(4),
    reduce_bytes=_same(4),
    extra_parameter_bytes=_same(0),
    fixed_bytes=3.0 * GIB,
    kept_boundaries=1,
    slack=0.05,
)
# Megatron-LM from 2022 on: its linear layers reduce the gradient of their input while the weight's is computed, and the
# product's own kernel adds the latter (LinearWithGradAccumulationAndAsyncCommunication, as in apex.transformer)
MEGATRON_2022 = replace(MEGATRON, name="megatron-lm-2022", hidden_reductions=1.0, fused_accumulation=True)
# With sequence parallelism an all-reduce is a reduce-scatter, hidden by the same class, and an all-gather, which is not
MEGATRON_SEQUENCE_PARALLEL = replace(
    MEGATRON_2022, name="megatron-lm-sp", sequence_parallel=True, hidden_reductions=0.5
)
MEGATRON_DEEPSPEED = replace(
    OURS,
    name="megatron-deepspeed",
    blocking_transfers=True,
    partitioned_transfers=True,
    extra_parameter_bytes=_dtypes(0, 4, 0),
    # DeepSpeed's fp16 optimizers at the step: fp32 copies of all gradients, one by one and then flat (FP16_Optimizer);
    # the gradients of the rank's shard flat in fp16 and then in fp32 (stage_1_and_2)
    step_bytes=(_dtypes(0, 0, 8), _dtypes(0, 0, 6)),
    fixed_bytes=3.0 * GIB,
    kept_boundaries=2,
    posted_boundaries=0,
    bucket_elements=0,
    shard_copies=_same(0),
    fresh_gradients=False,
    selective_elementwise=False,
    host_seconds=0.05,
)
# compiled
TORCHTITAN = replace(
    MEGATRON,
    name="torchtitan",
    blocking_transfers=False,
    partitioned_transfers=False,
    reduce_rounds=1,
    fixed_bytes=2.0 * GIB,
    shards_everything=True,
    selective_share=0.5,
    traffic=2.0,
    overlapped=0.8,
)
# Uncompiled, every operation is a kernel of its own: `plan.measure` counts 762 kB a token and layer of Llama 8B in a
# forward pass, against 217 kB with fused kernels
TORCHTITAN_EAGER = replace(TORCHTITAN, name="torchtitan-eager", traffic=3.5)
