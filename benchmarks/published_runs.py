"""Predicted beside published: training runs of other engines, from tables of facts.

    python benchmarks/published_runs.py [runs.csv ...] [--source WORD] [--worst N]

Without a table: `published_runs.csv`, on which constants were chosen where `docs/planner.md` says so, and then
`published_runs_unseen.csv`, on which none was. Each row names model, devices, layout and what was measured. The dense
rows in 16 bit with known layout and recomputation are predicted with one fixed set of constants (`llmpipe_cli.plan`)
and compared: step time, or TFLOP/s a device counted the way that the row counts, and memory as nvidia-smi shows it.
The links of each source are stated below. Rows that cannot be compared are counted, with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from published_table import Row, Run, UnusableError, read_rows, read_run

from llmpipe_cli.plan.cluster import Cluster, Node
from llmpipe_cli.plan.cost import Conditions, around_passes, end_of_step, profile_costs, stage_costs, transfer_seconds
from llmpipe_cli.plan.devices import DEVICES, GIB
from llmpipe_cli.plan.engines import (
    MEGATRON,
    MEGATRON_2022,
    MEGATRON_DEEPSPEED,
    MEGATRON_SEQUENCE_PARALLEL,
    TORCHTITAN,
    TORCHTITAN_EAGER,
    EngineProfile,
)
from llmpipe_cli.plan.memory import Moment, StageMemory, chunk_memory, stage_memory
from llmpipe_cli.plan.profile import ModelProfile, SegmentProfile
from llmpipe_cli.plan.simulate import StageCosts
from llmpipe_cli.plan.steptime import pipeline_time
from llmpipe_cli.plan.transformer import transformer_profile

TABLES = tuple(Path(__file__).with_name(name) for name in ("published_runs.csv", "published_runs_unseen.csv"))


@dataclass(frozen=True)
class Site:
    """Where a source's runs were made: Gbit/s a device, one direction.

    Attributes:
        devices_per_node: devices.
        intra_node_gbps: inside a node.
        inter_node_gbps: between nodes.
        why: where the numbers come from.
        ring_gbps: what an adapter of a node gives to rings of collectives, as measured; None: as much as it has.
        adapters: adapters of a node.
        stall_seconds: time that tensor shards lose at each all-reduce, waiting for the slowest host.
    """

    devices_per_node: int
    intra_node_gbps: float
    inter_node_gbps: float
    why: str
    ring_gbps: float | None = None
    adapters: int = 1
    stall_seconds: float = 0.0


SELENE = Site(8, 2400, 200, "Selene: DGX A100, NVSwitch, 8 HDR InfiniBand adapters of 200 Gbit/s a node")
SITES = {
    "PTD-P": SELENE,
    "Korthikanti": SELENE,
    "Megatron-LM README": SELENE,
    # `ring_gbps`: an all-reduce over 4 nodes reached 40.5 Gbit/s on A100 and 84 on V100, which is 75 % of these
    # (bigscience, experiments/bandwidth, all_reduce_bench-a100-n4.txt and -32gb-n4.txt: busbw)
    "tr11-176B": Site(
        8, 2400, 50, "Jean Zay: 8 A100 with NVSwitch, 4 Omni-Path adapters of 100 Gbit/s a node", 54, 4, 1e-3
    ),
    "tr3m-1B3": Site(
        4, 400, 100, "Jean Zay: 4 V100, two NVLink 2 between each two, 4 Omni-Path adapters of 100 Gbit/s", 112, 4, 1e-3
    ),
    "rebase": Site(16, 1200, 50, "DGX-2: 16 V100 with NVSwitch, 8 InfiniBand adapters of 100 Gbit/s a node"),
    "LambdaLabs": Site(8, 2400, 2, "8 A100 with NVSwitch; TCP over Ethernet, 16 Gbit/s a node"),
    "torchtitan": Site(8, 3600, 400, "Grand Teton: 8 H100 with NVSwitch, RDMA of 400 Gbit/s a device"),
}
USUAL_SITES = {
    "V100": Site(8, 1200, 12.5, "DGX-1 and clouds: one adapter of 100 Gbit/s a node"),
    "A100": Site(8, 2400, 200, "DGX A100"),
    "H100": Site(8, 3600, 400, "DGX H100"),
}
"""Links that are assumed for a source that is not in `SITES`, by the generation of its devices."""
GPUS = {
    "A100-80GB": DEVICES["a100-80gb"],
    "A100-40GB": DEVICES["a100-40gb"],
    "V100-32GB": DEVICES["v100-32gb"],
    "V100-16GB": DEVICES["v100-16gb"],
    "V100-32GB (DGX-2)": DEVICES["v100-32gb"],
    "H100-80GB": DEVICES["h100-80gb"],
    # with HBM2e and a limit of 500 W, which keeps the clock lower than that of an H100 with 700 W
    "H100-96GB(500W)": replace(DEVICES["h100-80gb"], memory_bytes=int(94.5 * GIB), memory_bandwidth=2400e9),
}
EMBEDDING_COUNTS = ("transformer|embed", "tr11-176B-ml/README.md", "reshaping-log.md")
"""Words of notes and sources of runs whose partition method counts embedding and head like a layer each: the notes
name the method, and BLOOM's own runs used it (tr11-176B-ml.slurm)."""


@dataclass(frozen=True)
class Predicted:
    """What the planner says about a run.

    Attributes:
        step_seconds: a step.
        memory: of each stage.
        flops: forward operations of layers and of the head for a step, as published rates count them.
        parameters: of the model.
    """

    step_seconds: float
    memory: list[StageMemory]
    flops: tuple[float, float]
    parameters: int


def site_of(run: Run) -> Site:
    """The links that are assumed for a run's source."""
    known = next((site for word, site in SITES.items() if word in run.source), None)
    return known or USUAL_SITES[run.gpu.partition("-")[0]]


def engine_of(run: Run) -> EngineProfile:
    """The engine of a run's framework, on the hosts of its site.

    Raises:
        UnusableError: there is no profile of it.
    """
    if "DS PipelineModule" in run.framework:
        return replace(MEGATRON_DEEPSPEED, collective_seconds=site_of(run).stall_seconds)
    if run.framework == "torchtitan":
        return TORCHTITAN if "compile" in run.notes else TORCHTITAN_EAGER
    if run.framework != "Megatron-LM":
        raise UnusableError(f"no profile of the engine {run.framework or '(empty)'}")
    if "sequence-parallel on" in run.notes:
        return MEGATRON_SEQUENCE_PARALLEL
    return MEGATRON_2022 if "Korthikanti" in run.source else MEGATRON


def profile_of(run: Run) -> ModelProfile:
    """The model of a run, written with its engine's kernels: a Llama, a GPT-NeoX or a GPT."""
    multiple = 128 * run.tp if run.framework != "torchtitan" else 1
    return transformer_profile(
        num_layers=run.layers,
        hidden=run.hidden,
        heads=run.heads,
        vocab_size=-(-run.vocab // multiple) * multiple,
        sequence_len=run.seq,
        kv_heads=run.kv_heads,
        intermediate=run.ffn,
        gated="lama" in run.model,
        tied="lama" not in run.model and "NeoX" not in run.model,
        fused_attention=run.framework == "torchtitan",
        dropout="NeoX" not in run.model,
        dtype=run.precision,
    )


def cut_of(run: Run, profile: ModelProfile) -> list[int]:
    """Where the engine cut: evenly, greedily by the largest part, as Megatron and DeepSpeed ("type:transformer") do.

    Raises:
        UnusableError: there are more stages than layers.
    """
    ends = int(any(word in run.notes or word in run.source for word in EMBEDDING_COUNTS))
    if run.pp * run.vpp > run.layers + 2 * ends:
        raise UnusableError("more stages than layers")
    largest = -(-(run.layers + 2 * ends) // run.pp)
    bounds, taken = [0], 0
    for stage in range(run.pp - 1):
        room = largest - (ends if stage == 0 else 0)
        taken = min(taken + room, run.layers - (run.pp - 1 - stage) + ends)
        bounds.append(1 + taken)
    return [*bounds, len(profile.segments)]


def conditions_of(run: Run) -> Conditions:
    """How a run's micro-batches run."""
    site, device = site_of(run), GPUS[run.gpu]
    nodes = -(-run.gpus // site.devices_per_node)
    cluster = Cluster(
        (Node(device, site.devices_per_node),) * nodes,
        site.intra_node_gbps,
        site.inter_node_gbps,
        ring_gbps=site.ring_gbps,
        adapters=site.adapters,
    )
    return Conditions(device, cluster, engine_of(run), run.precision, run.mbs, run.seq, run.tp, run.recompute)


def predict(run: Run) -> Predicted:
    """Step time and memory of a run."""
    profile, conditions = profile_of(run), conditions_of(run)
    bounds = cut_of(run, profile)
    stages = stage_costs(profile_costs(profile, conditions), bounds, around_passes(conditions.device, split=False))
    count = run.gbs // (run.mbs * run.dp)
    transfers = transfer_seconds(profile, conditions, bounds, run.dp)
    seconds, live = _pass(stages, count, transfers, run.vpp, conditions.engine)
    parts = _held(profile, bounds)
    ends = [end_of_step(part, conditions, data=run.dp, zero_stage=run.zero, pipeline=run.pp) for part in parts]
    received = [0.0] + [profile.segments[bound - 1].carried for bound in bounds[1:-1]]
    memory = [
        stage_memory(
            [chunk_memory(part, conditions, received=before, sent=part[-1].carried)],
            conditions,
            [Moment((alive,), (0,))],
            data=run.dp,
            zero_stage=run.zero,
        )
        for part, alive, before in zip(parts, live, received, strict=True)
    ]
    layers = sum(segment.flops(run.seq, run.seq) for segment in profile.segments if segment.kind == "layer")
    head = profile.segments[-1].flops(run.seq, run.seq)
    step = seconds + max(end.total for end in ends)
    return Predicted(step, memory, (run.gbs * layers, run.gbs * head), profile.num_parameters)


def _held(profile: ModelProfile, bounds: Sequence[int]) -> list[list[SegmentProfile]]:
    """Segments of each stage; a weight that embedding and head share is there once if one stage has both."""
    segments = list(profile.segments)
    head = segments[-1]
    if len(bounds) == 2 and head.tied:
        segments[-1] = replace(head, parameters=head.parameters - head.tied, cut_parameters=0, tied=0)
    return [segments[start:stop] for start, stop in itertools.pairwise(bounds)]


def _pass(
    stages: list[StageCosts], count: int, transfers: list[float], chunks: int, engine: EngineProfile
) -> tuple[float, list[int]]:
    """Seconds of all micro-batches, and live micro-batches a stage."""
    num_stages = len(stages)
    if chunks == 1:
        timed = pipeline_time("1f1b", stages, count, transfers, blocking=engine.blocking_transfers)
        return timed.seconds, [min(count, num_stages - rank) for rank in range(num_stages)]
    # equal parts: chunk by chunk through the stages, with a transfer after each part and back to the first stage
    parts = [
        StageCosts(*(part / chunks for part in (stage.forward, stage.input_gradient, stage.weight_gradient)))
        for _ in range(chunks)
        for stage in stages
    ]
    between = [max(transfers, default=0.0)] * (len(parts) - 1)
    timed = pipeline_time("interleaved", parts, count, between, chunks=chunks, blocking=engine.blocking_transfers)
    live = [min(count, num_stages - rank + (num_stages - 1) // chunks) for rank in range(num_stages)]
    return timed.seconds, live


def counted_flops(run: Run, predicted: Predicted) -> float:
    """Operations of a step as a run's TFLOP/s count them.

    Hardware operations count the layers' forward pass again where it is computed again, the head's never (Narayanan et
    al. 2021, equation 3); "ND" is 2 a parameter and token for each of so many passes.
    """
    passes = 4 if run.rate_kind.startswith("hw") and run.recompute == "full" else 3
    if "ND" in run.rate_kind:
        return 2.0 * passes * predicted.parameters * run.gbs * run.seq
    layers, head = predicted.flops
    return passes * layers + 3 * head


@dataclass(frozen=True)
class Comparison:
    """A run beside its prediction.

    Attributes:
        run: the run.
        unit: "s" or "TFLOP/s"; empty if neither was published.
        there: what was published.
        here: what is predicted.
        memory_gib: predicted memory of the fullest stage, as nvidia-smi would show it.
        needed_gib: what of it the fullest stage cannot do without: an allocator gives its slack back before it fails.
        capacity_gib: memory of a device.
    """

    run: Run
    unit: str
    there: float
    here: float
    memory_gib: float
    needed_gib: float
    capacity_gib: float

    @property
    def time_error(self) -> float | None:
        """Predicted step time over the published one, less 1."""
        if not self.unit:
            return None
        return self.here / self.there - 1 if self.unit == "s" else self.there / self.here - 1

    @property
    def memory_error(self) -> float | None:
        """Predicted memory over the published one, less 1."""
        published = self.run.memory_gib
        return None if published is None else self.memory_gib / published - 1

    @property
    def fits(self) -> bool:
        return self.needed_gib <= self.capacity_gib

    @property
    def fits_as_published(self) -> bool:
        """A run that ran is said to fit, one that ran out of memory is not."""
        return self.fits != self.run.out_of_memory

    def __str__(self) -> str:
        run, error, memory = self.run, self.time_error, self.memory_error
        text = f"{run.id} {run.model[:18]:18s} {f'tp{run.tp} pp{run.pp} dp{run.dp} mbs{run.mbs}':22s} {run.precision}"
        if run.out_of_memory:
            text += f" out of memory; predicted {self.needed_gib:.1f} of {self.capacity_gib:.1f} GiB"
            return text if self.fits_as_published else f"{text}  SAID TO FIT"
        if error is not None:
            text += f" {self.there:8.2f} {self.unit:7s} predicted {self.here:8.2f} ({error:+.1%})"
        if memory is not None:
            text += f"  {run.memory_gib:.0f} GiB, predicted {self.memory_gib:.1f} ({memory:+.0%})"
        return text if self.fits_as_published else f"{text}  SAID NOT TO FIT ({self.needed_gib:.1f} GiB)"


def compare(run: Run) -> Comparison:
    """Predict a run and lay both side by side.

    Raises:
        UnusableError: its devices or its engine are unknown.
    """
    if run.gpu not in GPUS:
        raise UnusableError(f"no such device in the table: {run.gpu or '(empty)'}")
    if run.precision == "bf16" and not GPUS[run.gpu].bf16:
        raise UnusableError("a device that does not compute in bf16")
    predicted = predict(run)
    unit, there, here = "", 0.0, 0.0
    if run.step_seconds is not None:
        unit, there, here = "s", run.step_seconds, predicted.step_seconds
    elif run.tflops is not None:
        rate = counted_flops(run, predicted) / predicted.step_seconds / run.gpus / 1e12
        unit, there, here = "TFLOP/s", run.tflops, rate
    fixed, capacity = engine_of(run).fixed_bytes, GPUS[run.gpu].memory_bytes
    needed = max(stage.allocated + fixed for stage in predicted.memory)
    shown = min(max(stage.total for stage in predicted.memory), max(needed, capacity))
    return Comparison(run, unit, there, here, shown / GIB, needed / GIB, capacity / GIB)


def compare_all(rows: Sequence[Row]) -> tuple[list[Comparison], Counter[str]]:
    """The rows that can be compared, and how many cannot for which reason."""
    results: list[Comparison] = []
    left_out: Counter[str] = Counter()
    for row in rows:
        try:
            results.append(compare(read_run(row)))
        except UnusableError as error:
            left_out[str(error)] += 1
    return results, left_out


def summary(results: Sequence[Comparison]) -> list[str]:
    """Lines that say how far predictions are off."""
    errors = sorted(abs(one.time_error) for one in results if one.time_error is not None)
    memory = [abs(one.memory_error) for one in results if one.memory_error is not None]
    lines = []
    if errors:
        lines.append(
            f"{len(errors)} speeds: median error {statistics.median(errors):.1%}, 90th percentile "
            f"{percentile_90(errors):.1%}, largest {errors[-1]:.1%}"
        )
    if memory:
        lines.append(f"{len(memory)} memories: median error {statistics.median(memory):.1%}, largest {max(memory):.1%}")
    right = sum(one.fits_as_published for one in results)
    lines.append(f"{right} of {len(results)} rows called rightly: fits, or out of memory")
    return lines


def percentile_90(ordered: Sequence[float]) -> float:
    """The value that nine tenths of an ordered sequence do not exceed."""
    return ordered[-(-9 * len(ordered) // 10) - 1]


def assumed(results: Sequence[Comparison]) -> list[str]:
    """A line for each source whose links are not known."""
    unknown = Counter(
        (one.run.source, site_of(one.run)) for one in results if not any(word in one.run.source for word in SITES)
    )
    return [
        f"note: links of {source or '(no source)'} unknown, {count} x: {site.intra_node_gbps:g} Gbit/s a device inside "
        f"nodes of {site.devices_per_node} and {site.inter_node_gbps:g} between assumed, as in {site.why}"
        for (source, site), count in unknown.items()
    ]


def report(path: Path, source: str, worst: int) -> None:
    """Print a table's rows, their summary and the worst of them.

    Raises:
        UnusableError: the table cannot be read.
    """
    rows = [row for row in read_rows(path) if source in row["source"]]
    results, left_out = compare_all(rows)
    print(f"{path.name}: {len(results)} of {len(rows)} rows compared")
    for result in results:
        print(result)
    print("\n".join([*summary(results), *assumed(results)]) if results else "nothing to compare")
    if left_out:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in left_out.most_common())
        print(f"left out, {left_out.total()} of {len(rows)}: {reasons}")
    ranked = sorted(results, key=lambda one: -abs(one.time_error or 0.0))[:worst]
    if ranked:
        print("\n".join(["worst:", *(f"  {result}" for result in ranked)]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", type=Path, nargs="*", default=TABLES, help="CSV files of published runs")
    parser.add_argument("--source", default="", help="only sources with this word")
    parser.add_argument("--worst", type=int, default=8, help="how many of the worst rows to name")
    arguments = parser.parse_args()
    try:
        for number, table in enumerate(arguments.tables):
            if number:
                print()
            report(table, arguments.source, max(0, arguments.worst))
    except UnusableError as error:
        print(f"published_runs.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
