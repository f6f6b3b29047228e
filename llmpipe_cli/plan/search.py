"""The search for the best layout: every combination of pipeline x tensor x data, micro-batch, schedule, ZeRO stage and
checkpointing that the recipe leaves open, cut into stages by predicted time.

Memory is worked out for each. Of those that fit, the step is played through in the order of a lower bound on its time
(`steptime.least_seconds`), until no bound is below the worst of the best found: the rest cannot be among the best, and
is left out unseen. Layouts within one per cent of the fastest count as equal; the simplest of them is chosen.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmpipe_cli.engine.schedules import DEFAULT_CHUNKS, SCHEDULES, splits_backward
from llmpipe_cli.plan.cluster import Cluster
from llmpipe_cli.plan.cost import (
    Conditions,
    EndOfStep,
    around_passes,
    end_of_step,
    profile_costs,
    stage_costs,
    transfer_seconds,
)
from llmpipe_cli.plan.devices import GIB, Device
from llmpipe_cli.plan.engines import OURS, EngineProfile
from llmpipe_cli.plan.memory import ChunkMemory, StageMemory, chunk_memory, stage_memory
from llmpipe_cli.plan.partition import balance, balance_parts, balance_unequal
from llmpipe_cli.plan.profile import ModelProfile
from llmpipe_cli.plan.rates import TABLE_RATES, Rates
from llmpipe_cli.plan.simulate import StageCosts
from llmpipe_cli.plan.steptime import held_activations, least_seconds, num_chunks, pipeline_time

CHECKPOINTING = ("none", "selective", "full")
EQUAL_WITHIN = 0.01
MAX_MICRO_BATCH = 64


@dataclass(frozen=True)
class Pins:
    """What the recipe fixes; None is free."""

    pipeline: int | None = None
    tensor: int | None = None
    data: int | None = None
    micro_batch_size: int | None = None
    num_micro_batches: int | None = None
    """Micro-batches a replica and step, as gradient_accumulation_steps gives them."""
    schedule: str | None = None
    zero_stage: int | None = None
    checkpointing: str | None = None
    partition: tuple[int, ...] | None = None
    """Segments of each part."""
    chunks: int = DEFAULT_CHUNKS
    """Parts a stage of an interleaved schedule."""


@dataclass(frozen=True)
class Job:
    """What is planned.

    Attributes:
        profile: the model.
        cluster: where it runs.
        global_batch_size: samples a step.
        sequence_len: tokens a sample.
        optimizer: name of the optimizer.
        pins: what is fixed.
        engine: whose engine.
        schedules: schedules to choose from.
        most_tensor: most tensor shards to try.
        rates: measured rates of the devices, relative to their rows of the table.
        memory_share: share of a device's memory that may be planned for.
        spare_cores: cores of one node's processor that no rank takes are shared out to the ranks, as `train` does.
    """

    profile: ModelProfile
    cluster: Cluster
    global_batch_size: int
    sequence_len: int
    optimizer: str = "adamw"
    pins: Pins = Pins()
    engine: EngineProfile = OURS
    schedules: tuple[str, ...] = ("1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v")
    most_tensor: int = 8
    rates: Rates = TABLE_RATES
    memory_share: float = 1.0
    spare_cores: bool = False


@dataclass(frozen=True)
class Choice:
    """One combination."""

    pipeline: int
    tensor: int
    data: int
    micro_batch_size: int
    num_micro_batches: int
    schedule: str
    zero_stage: int
    checkpointing: str

    @property
    def num_devices(self) -> int:
        return self.pipeline * self.tensor * self.data

    def complexity(self) -> tuple[Any, ...]:
        """Smaller is simpler: fewer shards and stages, nothing recomputed, the older schedule, larger micro-batches."""
        order = ("1f1b", "gpipe", "zb-h1", "interleaved", "zb-v", "zb-h2")
        return (
            self.tensor,
            self.pipeline,
            CHECKPOINTING.index(self.checkpointing),
            order.index(self.schedule),
            self.zero_stage,
            -self.micro_batch_size,
        )


def pinned_to(choice: Choice, chunks: int) -> Pins:
    """Pins that leave this combination alone."""
    return Pins(
        pipeline=choice.pipeline,
        tensor=choice.tensor,
        data=choice.data,
        micro_batch_size=choice.micro_batch_size,
        num_micro_batches=choice.num_micro_batches,
        schedule=choice.schedule,
        zero_stage=choice.zero_stage,
        checkpointing=choice.checkpointing,
        chunks=chunks,
    )


@dataclass
class Candidate:
    """A combination cut into stages.

    Attributes:
        choice: the combination.
        bounds: first segment of each part and, last, their number.
        costs: costs of each part.
        transfers: seconds from each part to the next.
        end: what the slowest stage does at the end of a step.
        memory: of each stage.
        capacity: bytes of each stage's smallest device.
        least: no step is shorter.
        seconds: predicted step; None where the search has not played it through.
        bubble: idle share.
        crowding: what passes take longer for the ranks at work beside them, as a share.
        split_layers: layers that are several segments, so that stages can begin inside them.
    """

    choice: Choice
    bounds: list[int]
    costs: list[StageCosts]
    transfers: list[float]
    end: EndOfStep
    memory: list[StageMemory]
    capacity: list[float]
    least: float
    seconds: float | None = None
    bubble: float = 0.0
    crowding: float = 0.0
    split_layers: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return all(own.total <= limit for own, limit in zip(self.memory, self.capacity, strict=True))

    @property
    def overflow(self) -> float:
        """Largest share by which a stage exceeds its device; at most 0 when it fits."""
        return max(own.total / limit - 1 for own, limit in zip(self.memory, self.capacity, strict=True))

    def rank(self, fastest: float) -> tuple[Any, ...]:
        """Key to sort by: the fastest first, and among those about as fast the simplest."""
        assert self.seconds is not None
        slower = self.seconds / fastest - 1
        return (0 if slower <= EQUAL_WITHIN else slower, self.choice.complexity(), self.seconds)


@dataclass
class Found:
    """What a search found.

    Attributes:
        best: layouts that fit, best first.
        unfit: layouts that do not fit, the nearest to fitting first.
        num_considered: combinations.
        num_fitting: combinations that fit.
        num_played: combinations whose step was played through.
        refused: reasons for which no combination exists, with how often they were met.
    """

    best: list[Candidate]
    unfit: list[Candidate]
    num_considered: int = 0
    num_fitting: int = 0
    num_played: int = 0
    refused: Counter[str] = field(default_factory=Counter)


def search(job: Job, *, keep: int = 12, exhaustive: bool = False) -> Found:
    """The best layouts.

    Args:
        job: what is planned.
        keep: how many to keep of those that fit and of those that do not.
        exhaustive: play every fitting combination through, for comparison.
    """
    workshop = _Workshop(job)
    found = Found([], [])
    fitting: list[Candidate] = []
    too_large: set[Choice] = set()
    for choice in choices(job, found.refused):
        found.num_considered += 1
        family = replace(choice, micro_batch_size=0, num_micro_batches=0)
        if family in too_large and not exhaustive:
            continue  # larger micro-batches need no less memory
        candidate = workshop.candidate(choice)
        if candidate is None:
            found.refused[_mismatch(job)] += 1
        elif candidate.fits:
            fitting.append(candidate)
        else:
            too_large.add(family)
            bisect.insort(found.unfit, candidate, key=lambda one: (one.overflow, one.choice.complexity()))
            del found.unfit[keep:]
    if not fitting:  # perhaps with less even stages
        moved = [workshop.within_memory(candidate) for candidate in found.unfit]
        fitting = [candidate for candidate in moved if candidate is not None]
    found.num_fitting = len(fitting)
    fitting.sort(key=lambda one: (one.least, one.choice.complexity()))
    times: list[float] = []  # of those played, ascending
    for candidate in fitting:
        # Equal within a per cent counts as equal: only what is beyond that of the last kept cannot matter.
        if not exhaustive and len(times) >= keep and candidate.least > times[keep - 1] * (1 + EQUAL_WITHIN):
            break
        workshop.play(candidate)
        assert candidate.seconds is not None
        found.num_played += 1
        found.best.append(candidate)
        bisect.insort(times, candidate.seconds)
    if found.best:
        fastest = times[0]
        found.best.sort(key=lambda one: one.rank(fastest))
        del found.best[keep:]
    return found


def _mismatch(job: Job) -> str:
    """Why a layout cannot have the recipe's partition."""
    partition, segments = list(job.pins.partition or ()), len(job.profile.segments)
    if sum(partition) != segments:
        return f"partition {partition} adds up to {sum(partition)}, and the model has {segments} segments"
    return f"partition {partition} has {len(partition)} parts, and the layout another number"


def choices(job: Job, refused: Counter[str]) -> Iterator[Choice]:
    """Every combination that the recipe, the model and the devices allow."""
    pins, cluster, segments = job.pins, job.cluster, len(job.profile.segments)
    devices = cluster.num_devices
    told = refused
    for tensor in _tensors(job, told):
        refused = told if tensor == (pins.tensor or 1) else Counter()  # more shards than asked for are no reason
        for pipeline in range(1, min(segments, devices // tensor) + 1) if pins.pipeline is None else (pins.pipeline,):
            if pipeline > segments:
                refused[f"{pipeline} stages, but the model has {segments} segments"] += 1
                continue
            data = pins.data or _replicas(job, devices // (tensor * pipeline))
            if data == 0 or tensor * pipeline * data > devices:
                refused[f"{tensor * pipeline * max(data, 1)} devices are needed and there are {devices}"] += 1
                continue
            if job.global_batch_size % data:
                refused[f"global_batch_size {job.global_batch_size} cannot be dealt to {data} replicas"] += 1
                continue
            if pins.pipeline is None and pipeline > 1 and _wasteful(job, tensor * pipeline * data, tensor):
                continue
            yield from _batches(job, pipeline, tensor, data, refused)


def _batches(job: Job, pipeline: int, tensor: int, data: int, refused: Counter[str]) -> Iterator[Choice]:
    pins, segments = job.pins, len(job.profile.segments)
    samples = job.global_batch_size // data
    sizes = _divisors(samples, MAX_MICRO_BATCH) if pins.micro_batch_size is None else [pins.micro_batch_size]
    if pins.num_micro_batches is not None:
        sizes = [size for size in [samples // pins.num_micro_batches] if size in (pins.micro_batch_size or size,)]
        if not sizes or sizes[0] * pins.num_micro_batches != samples:
            refused[f"{samples} samples a replica do not make {pins.num_micro_batches} micro-batches"] += 1
            return
    for size, schedule in itertools.product(sizes, _schedules(job, pipeline)):
        if samples % size:
            refused[f"{samples} samples a replica are no multiple of micro_batch_size {size}"] += 1
            continue
        if num_chunks(schedule, pins.chunks) * pipeline > segments:
            parts = num_chunks(schedule, pins.chunks)
            refused[
                f"{schedule} puts {parts} parts on each of {pipeline} stages; the model has {segments} segments"
            ] += 1
            continue
        for zero in _zero_stages(job, data):
            for checkpointing in CHECKPOINTING if pins.checkpointing is None else (pins.checkpointing,):
                if pins.schedule is None and checkpointing != "none" and splits_backward(schedule):
                    continue  # postponed weight gradients would keep what was computed again
                yield Choice(pipeline, tensor, data, size, samples // size, schedule, zero, checkpointing)


def _tensors(job: Job, refused: Counter[str]) -> list[int]:
    pinned, divisible = job.pins.tensor, job.profile.divisible
    if pinned is not None:
        # Key-value heads and intermediate sizes that do not divide are trained all the same, at a cost.
        if pinned > 1 and not divisible:
            refused["this model cannot be divided over tensor shards"] += 1
            return []
        if pinned > 1 and divisible[0] % pinned:
            refused[f"{pinned} tensor shards cannot share {divisible[0]} heads evenly"] += 1
            return []
        return [pinned]
    most = min(job.most_tensor, job.cluster.devices_per_node)
    sizes = [1, *(size for size in (2, 4, 8, 16) if size <= most and job.cluster.devices_per_node % size == 0)]
    return [size for size in sizes if size == 1 or (divisible and all(number % size == 0 for number in divisible))]


def _replicas(job: Job, most: int) -> int:
    """The most replicas that the devices hold and the batch can be dealt to."""
    return next((data for data in range(most, 0, -1) if job.global_batch_size % data == 0), 0)


def _wasteful(job: Job, used: int, tensor: int) -> bool:
    """Whether a twentieth of the devices or more stays idle although one stage would use more of them."""
    devices = job.cluster.num_devices
    best = _replicas(job, devices // tensor) * tensor
    return used < 0.95 * min(devices, best)


def _schedules(job: Job, pipeline: int) -> list[str]:
    if job.pins.schedule is not None:
        return [job.pins.schedule]
    return ["1f1b"] if pipeline == 1 else [name for name in job.schedules if name in SCHEDULES]


def _zero_stages(job: Job, data: int) -> list[int]:
    if job.pins.zero_stage is not None:
        return [job.pins.zero_stage]
    if job.profile.dtype != "fp32":
        return [1]  # mixed precision's master weights come with ZeRO-1
    return [0, 1] if data > 1 and job.optimizer != "adafactor" else [0]


def _divisors(number: int, most: int) -> list[int]:
    sizes = [size for size in range(1, min(number, most) + 1) if number % size == 0]
    return [size for size in sizes if size <= 8 or size & (size - 1) == 0] or [1]


def conditions_of(job: Job, choice: Choice, device: Device) -> Conditions:
    """How a combination's micro-batches run on a device."""
    return Conditions(
        device,
        job.cluster,
        job.engine,
        job.profile.dtype,
        choice.micro_batch_size,
        job.sequence_len,
        choice.tensor,
        choice.checkpointing,
    )


class _Workshop:
    """Cuts, costs and plays combinations, doing what they share once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        kinds = {node.device: node.device.at(job.rates) for node in job.cluster.nodes}
        self._devices = [kinds[device] for _, device in job.cluster.device_list()]
        self._crowded: dict[int, Device] = {}
        self._wider: dict[int, Device] = {}
        # keys name a device by its identity: the few that there are live as long as this object
        self._segment_costs: dict[tuple[Any, ...], list[StageCosts]] = {}
        self._ratios: dict[tuple[Any, ...], tuple[float, ...]] = {}
        self._bounds: dict[tuple[Any, ...], list[int]] = {}
        self._chunks: dict[tuple[Any, ...], ChunkMemory] = {}
        self._ends: dict[tuple[Any, ...], EndOfStep] = {}
        self._times: dict[tuple[Any, ...], Any] = {}

    def candidate(self, choice: Choice) -> Candidate | None:
        """The combination cut into stages; None if the recipe's partition has another number of parts."""
        devices = self._stage_devices(choice)
        chunks = num_chunks(choice.schedule, self.job.pins.chunks)
        bounds = self._cut(choice, devices, chunks)
        if bounds is None:
            return None
        candidate = self._finish(choice, devices, chunks, bounds)
        if not candidate.fits and not self.job.cluster.is_uniform:
            return self.within_memory(candidate) or candidate
        return candidate

    def within_memory(self, candidate: Candidate) -> Candidate | None:
        """The combination cut less evenly so that every stage fits; None where that cannot be."""
        choice = candidate.choice
        chunks = num_chunks(choice.schedule, self.job.pins.chunks)
        if chunks > 1 or choice.pipeline == 1 or self.job.pins.partition is not None:
            return None
        if sum(own.total for own in candidate.memory) > sum(candidate.capacity):
            return None
        devices = self._stage_devices(choice)
        bounds = self._cut_within_memory(choice, devices)
        return None if bounds is None else self._finish(choice, devices, chunks, bounds)

    def play(self, candidate: Candidate) -> None:
        """Predict the step of a candidate."""
        choice = candidate.choice
        key = (choice.schedule, choice.num_micro_batches, tuple(candidate.costs), tuple(candidate.transfers))
        if key not in self._times:
            self._times[key] = pipeline_time(
                choice.schedule,
                candidate.costs,
                choice.num_micro_batches,
                candidate.transfers,
                chunks=self.job.pins.chunks,
                blocking=self.job.engine.blocking_transfers,
            )
        timed = self._times[key]
        candidate.crowding = self._crowding(choice) * (1 - timed.bubble_fraction)
        candidate.seconds = (1 + candidate.crowding) * timed.seconds + candidate.end.total
        candidate.bubble = timed.bubble_fraction

    def _crowding(self, choice: Choice) -> float:
        """Further share of time that passes take while all ranks of a node work at once and share its memory."""
        beside = min(choice.num_devices, self.job.cluster.devices_per_node) - 1
        if not beside or not self.job.rates.contention:
            return 0.0
        alone = self._device(choice)
        if beside not in self._crowded:
            shared = alone.memory_bandwidth / (1 + self.job.rates.contention * beside)
            self._crowded[beside] = replace(alone, memory_bandwidth=shared)
        around = around_passes(alone, split=splits_backward(choice.schedule)).total
        around *= choice.pipeline * num_chunks(choice.schedule, self.job.pins.chunks)
        together, apart = (
            around + sum(cost.total for cost in self._costs(choice, device))
            for device in (self._crowded[beside], alone)
        )
        return together / apart - 1

    def _stage_devices(self, choice: Choice) -> list[Device]:
        """The slowest device of each stage."""
        ranks = choice.tensor * choice.data
        dtype = self.job.profile.dtype
        if self.job.cluster.is_uniform:
            return [self._device(choice)] * choice.pipeline
        return [
            min(
                self._devices[stage * ranks : (stage + 1) * ranks],
                key=lambda device: (device.peak(dtype) * device.matmul_fraction, device.memory_bytes),
            )
            for stage in range(choice.pipeline)
        ]

    def _device(self, choice: Choice) -> Device:
        """The only kind of device; with several cores where a rank has them. They share what one gets of the memory."""
        device = self._devices[0]
        threads = self.job.cluster.num_devices // choice.num_devices
        if not self.job.spare_cores or threads <= 1:
            return device
        if threads not in self._wider:
            peaks = {name: getattr(device, name) * threads for name in ("fp32", "bf16", "fp16")}
            self._wider[threads] = replace(device, **peaks)
        return self._wider[threads]

    def _costs(self, choice: Choice, device: Device) -> list[StageCosts]:
        key = (*self._sizes(choice), id(device))
        if key not in self._segment_costs:
            self._segment_costs[key] = profile_costs(self.job.profile, conditions_of(self.job, choice, device))
        return self._segment_costs[key]

    def _cut(self, choice: Choice, devices: list[Device], chunks: int) -> list[int] | None:
        pinned = self.job.pins.partition
        if pinned is not None:
            bounds = [0, *itertools.accumulate(pinned)]
            right = len(pinned) == chunks * choice.pipeline and bounds[-1] == len(self.job.profile.segments)
            return bounds if right else None
        turns = SCHEDULES[choice.schedule].turns
        if self.job.cluster.is_uniform:
            totals: Sequence[tuple[float, ...]] = [self._relative(choice, devices[0])] * choice.pipeline
        else:
            totals = [tuple(cost.total for cost in self._costs(choice, device)) for device in devices]
        key = (chunks, turns, len(totals), *(totals[:1] if self.job.cluster.is_uniform else totals))
        if key not in self._bounds:
            if chunks == 1 and self.job.cluster.is_uniform:
                bounds = balance(totals[0], choice.pipeline)
            elif chunks == 1:
                bounds = balance_unequal(totals) or []
            else:
                bounds = balance_parts(totals[0], SCHEDULES[choice.schedule].placement(choice.pipeline, chunks))
            self._bounds[key] = bounds
        return self._bounds[key]

    def _relative(self, choice: Choice, device: Device) -> tuple[float, ...]:
        """Costs of the segments relative to the largest, to two digits: near enough to cut by, and often the same."""
        key = (*self._sizes(choice), id(device))
        if key not in self._ratios:
            totals = [cost.total for cost in self._costs(choice, device)]
            largest = max(totals)
            self._ratios[key] = tuple(round(value / largest, 2) for value in totals)
        return self._ratios[key]

    def _cut_within_memory(self, choice: Choice, devices: list[Device]) -> list[int] | None:
        """The most even cut whose stages all fit."""
        totals = [[cost.total for cost in self._costs(choice, device)] for device in devices]
        limit = [device.memory_bytes * self.job.memory_share for device in devices]

        def allowed(stage: int, start: int, stop: int) -> bool:
            return self._stage_memory(choice, devices[stage], stage, [(start, stop)]).total <= limit[stage]

        return balance_unequal(totals, allowed)

    def _finish(self, choice: Choice, devices: list[Device], chunks: int, bounds: list[int]) -> Candidate:
        job = self.job
        placement = SCHEDULES[choice.schedule].placement(choice.pipeline, chunks)
        own = [placement.owner(part)[0] for part in range(placement.num_parts)]
        costs: list[StageCosts] = []
        known: dict[Device, list[StageCosts]] = {}
        for part, stage in enumerate(own):
            device = devices[stage]
            if device not in known:
                around = around_passes(device, split=splits_backward(choice.schedule))
                known[device] = stage_costs(self._costs(choice, device), bounds, around)
            costs.append(known[device][part])
        conditions = [conditions_of(job, choice, device) for device in devices]
        transfers = transfer_seconds(job.profile, conditions[0], bounds, choice.data) if choice.pipeline > 1 else []
        ranges: list[list[tuple[int, int]]] = [[] for _ in range(choice.pipeline)]
        for part in range(placement.num_parts):
            ranges[own[part]].append((bounds[part], bounds[part + 1]))
        memory = [self._stage_memory(choice, device, stage, ranges[stage]) for stage, device in enumerate(devices)]
        end = max(
            (self._end(choice, condition, ranges[stage]) for stage, condition in enumerate(conditions)),
            key=lambda one: one.total,
        )
        least = least_seconds(choice.schedule, costs, choice.num_micro_batches, transfers, chunks=job.pins.chunks)
        capacity = [device.memory_bytes * job.memory_share for device in devices]
        return Candidate(choice, bounds, costs, transfers, end, memory, capacity, least + end.total)

    def _end(self, choice: Choice, conditions: Conditions, ranges: list[tuple[int, int]]) -> EndOfStep:
        key = (choice.tensor, choice.data, choice.zero_stage, choice.pipeline, id(conditions.device), tuple(ranges))
        if key not in self._ends:
            segments = [segment for start, stop in ranges for segment in self.job.profile.segments[start:stop]]
            end = end_of_step(
                segments, conditions, data=choice.data, zero_stage=choice.zero_stage, pipeline=choice.pipeline
            )
            beside = min(choice.num_devices, self.job.cluster.devices_per_node) - 1
            slowdown = 1 + self.job.rates.optimizer_contention * beside
            self._ends[key] = replace(end, optimizer=end.optimizer * slowdown)
        return self._ends[key]

    def _stage_memory(
        self, choice: Choice, device: Device, stage: int, ranges: Sequence[tuple[int, int]]
    ) -> StageMemory:
        job, segments = self.job, self.job.profile.segments
        conditions = conditions_of(job, choice, device)
        chunks = []
        for start, stop in ranges:
            received = segments[start - 1].carried if start else 0.0
            sent = segments[stop - 1].carried if stop < len(segments) else 0.0
            key = (*self._sizes(choice), received, sent, *map(id, segments[start:stop]))
            if key not in self._chunks:
                self._chunks[key] = chunk_memory(segments[start:stop], conditions, received=received, sent=sent)
            chunks.append(self._chunks[key])
        held = held_activations(choice.schedule, choice.pipeline, choice.num_micro_batches, job.pins.chunks, stage)
        return stage_memory(
            chunks, conditions, held, data=choice.data, zero_stage=choice.zero_stage, optimizer=job.optimizer
        )

    @staticmethod
    def _sizes(choice: Choice) -> tuple[Any, ...]:
        return choice.micro_batch_size, choice.tensor, choice.checkpointing


def why_slower(candidate: Candidate, best: Candidate) -> str:
    """What a layout loses against the best one, in words."""
    assert candidate.seconds is not None
    assert best.seconds is not None
    slower = candidate.seconds / best.seconds - 1
    if slower <= EQUAL_WITHIN:
        return "about as fast, less simple"
    # of what is computed longer, what the devices that do nothing would have taken over
    taken_over = _work(best) * (best.choice.num_devices / candidate.choice.num_devices - 1)
    reasons = {
        f"idle {candidate.bubble:.0%} of the time (best {best.bubble:.0%})": _idle(candidate) - _idle(best),
        _longer_work(candidate.choice, best.choice): _work(candidate) - _work(best) - taken_over,
        "reducing gradients over the replicas": _exchanged(candidate) - _exchanged(best),
        "the optimizer's step": candidate.end.optimizer - best.end.optimizer,
        "fewer devices at work": taken_over,
    }
    reason = max(reasons, key=lambda name: reasons[name])
    return f"{slower:.0%} slower: {reason}"


def _exchanged(candidate: Candidate) -> float:
    return candidate.end.reduce + candidate.end.gather


def _longer_work(choice: Choice, best: Choice) -> str:
    """What most likely makes a layout compute longer than the best one."""
    if CHECKPOINTING.index(choice.checkpointing) > CHECKPOINTING.index(best.checkpointing):
        return "computes activations again"
    if choice.tensor > best.tensor:
        return "tensor shards wait for each other"
    if choice.micro_batch_size < best.micro_batch_size or choice.tensor < best.tensor:
        return "products of other sizes, that run slower" if choice.tensor < best.tensor else "smaller products"
    return "stages less even"


def _idle(candidate: Candidate) -> float:
    return candidate.bubble * ((candidate.seconds or 0.0) - candidate.end.total)


def _work(candidate: Candidate) -> float:
    return (1 - candidate.bubble) * ((candidate.seconds or 0.0) - candidate.end.total)


def why_not(candidate: Candidate) -> str:
    """Why a layout does not fit, with the numbers."""
    stage = max(range(len(candidate.memory)), key=lambda i: candidate.memory[i].total / candidate.capacity[i])
    need, limit = candidate.memory[stage], candidate.capacity[stage]
    parts = need.parts()
    largest = max(parts, key=lambda name: parts[name])
    return (
        f"stage {stage} needs {need.total / GIB:.1f} GiB ({largest}: {parts[largest] / GIB:.1f} GiB), "
        f"a device has {limit / GIB:.1f} GiB"
    )
