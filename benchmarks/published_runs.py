"""Predicted beside published: training runs of other engines, from a table of facts.

    python benchmarks/published_runs.py runs.csv [--source WORD] [--worst N]

Each row of the table names model, devices, layout and what was measured. The dense rows in 16 bit with known layout
and recomputation are predicted with one fixed set of constants (`llmpipe_cli.plan`) and compared: step time, or
TFLOP/s a device counted the way that the row counts, and memory as nvidia-smi shows it. The links of each source are
stated below.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from llmpipe_cli.plan.cluster import Cluster, Node
from llmpipe_cli.plan.cost import Conditions, around_passes, end_of_step, profile_costs, stage_costs, transfer_seconds
from llmpipe_cli.plan.devices import DEVICES, GIB
from llmpipe_cli.plan.engines import MEGATRON, MEGATRON_DEEPSPEED, TORCHTITAN, EngineProfile
from llmpipe_cli.plan.memory import Moment, chunk_memory, stage_memory
from llmpipe_cli.plan.profile import ModelProfile
from llmpipe_cli.plan.simulate import StageCosts
from llmpipe_cli.plan.steptime import pipeline_time
from llmpipe_cli.plan.transformer import transformer_profile

Row = dict[str, str]


@dataclass(frozen=True)
class Site:
    """Where a source's runs were made: Gbit/s a device, one direction."""

    devices_per_node: int
    intra_node_gbps: float
    inter_node_gbps: float
    why: str


SITES = {
    "PTD-P": Site(8, 2400, 200, "Selene: DGX A100, NVSwitch, 8 HDR InfiniBand adapters of 200 Gbit/s a node"),
    "Korthikanti": Site(8, 2400, 200, "Selene, as above"),
    "Megatron-LM README": Site(8, 2400, 200, "Selene, as above"),
    "tr11-176B": Site(8, 2400, 50, "Jean Zay: 8 A100 with NVSwitch, 4 Omni-Path adapters of 100 Gbit/s a node"),
    "tr3m-1B3": Site(
        4, 400, 100, "Jean Zay: 4 V100, two NVLink 2 between each two, 4 Omni-Path adapters of 100 Gbit/s"
    ),
    "rebase": Site(16, 1200, 50, "DGX-2: 16 V100 with NVSwitch, 8 InfiniBand adapters of 100 Gbit/s a node"),
    "LambdaLabs": Site(8, 2400, 2, "8 A100 with NVSwitch; TCP over Ethernet, 16 Gbit/s a node"),
    "torchtitan": Site(8, 3600, 400, "Grand Teton: 8 H100 with NVSwitch, RDMA of 400 Gbit/s a device"),
}
GPUS = {
    "A100-80GB": DEVICES["a100-80gb"],
    "A100-40GB": DEVICES["a100-40gb"],
    "V100-32GB": DEVICES["v100-32gb"],
    "V100-16GB": DEVICES["v100-16gb"],
    "V100-32GB (DGX-2)": DEVICES["v100-32gb"],
    # with HBM2e and a limit of 500 W, which keeps the clock lower than that of an H100 with 700 W
    "H100-96GB(500W)": replace(DEVICES["h100-80gb"], memory_bytes=int(94.5 * GIB), memory_bandwidth=2400e9),
}


@dataclass(frozen=True)
class Predicted:
    """What the planner says about a row."""

    step_seconds: float
    memory_gib: list[float]
    flops: float


def is_counted(row: Row) -> bool:
    """Dense, 16 bit, layout and recomputation known."""
    return (
        row["precision"] in ("fp16", "bf16")
        and row["recompute"] in ("full", "selective", "none")
        and bool(row["hidden"] and row["tp"] and row["pp"] and row["gbs"])
        and row["gpu"] in GPUS
    )


def site_of(row: Row) -> Site:
    """The links that are assumed for a row's source."""
    return next(site for word, site in SITES.items() if word in row["source"])


def engine_of(row: Row) -> EngineProfile:
    """The engine of a row's framework."""
    if "DS PipelineModule" in row["framework"]:
        return MEGATRON_DEEPSPEED
    if row["framework"] == "torchtitan":
        return TORCHTITAN
    return replace(MEGATRON, sequence_parallel="sequence-parallel on" in row["notes"])


def profile_of(row: Row) -> ModelProfile:
    """The model of a row, written with its engine's kernels."""
    tp, vocab = int(row["tp"]), int(row["vocab"])
    multiple = 128 * tp if row["framework"] != "torchtitan" else 1
    return transformer_profile(
        num_layers=int(row["layers"]),
        hidden=int(row["hidden"]),
        heads=int(row["heads"]),
        vocab_size=-(-vocab // multiple) * multiple,
        sequence_len=int(row["seq"]),
        kv_heads=int(row["kv_heads"]) if row["kv_heads"] else None,
        intermediate=int(row["ffn"]) if row["ffn"] else None,
        gated="lama" in row["model"],
        tied="lama" not in row["model"] and "NeoX" not in row["model"],
        fused_attention=row["framework"] == "torchtitan",
        dropout="NeoX" not in row["model"],
        dtype=row["precision"],
    )


def cut_of(row: Row, profile: ModelProfile) -> list[int]:
    """Where the engine cut: Megatron evenly; DeepSpeed greedily by its largest part ("type:transformer")."""
    layers, stages = int(row["layers"]), int(row["pp"])
    counted = layers
    first = last = 0  # what embedding and head count for
    if "embed" in row["notes"] or (engine_of(row) is MEGATRON_DEEPSPEED and row["model"].endswith("l70")):
        first = last = 1
        counted += 2
    largest = -(-counted // stages)
    bounds, taken = [0], 0
    for stage in range(stages - 1):
        room = largest - (first if stage == 0 else 0)
        taken = min(taken + room, layers - (stages - 1 - stage) + last)
        bounds.append(1 + taken)
    return [*bounds, len(profile.segments)]


def predict(row: Row) -> Predicted:
    """Step time and memory of a row."""
    profile, engine, site = profile_of(row), engine_of(row), site_of(row)
    tp, pp, dp = int(row["tp"]), int(row["pp"]), int(row["dp"])
    chunks = int(row["vpp"] or 1)
    device = GPUS[row["gpu"]]
    nodes = -(-int(row["gpus"]) // site.devices_per_node)
    cluster = Cluster((Node(device, site.devices_per_node),) * nodes, site.intra_node_gbps, site.inter_node_gbps)
    conditions = Conditions(
        device, cluster, engine, row["precision"], int(row["mbs"]), int(row["seq"]), tp, row["recompute"]
    )
    bounds = cut_of(row, profile)
    costs = profile_costs(profile, conditions)
    stages = stage_costs(costs, bounds, around_passes(device, split=False))
    count = int(row["gbs"]) // (int(row["mbs"]) * dp)
    transfers = transfer_seconds(profile, conditions, bounds, dp)
    seconds, live = _pass(stages, count, transfers, chunks, engine)
    zero = 0 if row["zero"] == "0" else 1
    parts = [profile.segments[a:b] for a, b in itertools.pairwise(bounds)]
    ends = [end_of_step(part, conditions, data=dp, zero_stage=zero, pipeline=pp) for part in parts]
    received = [0.0] + [profile.segments[bound - 1].carried for bound in bounds[1:-1]]
    memory = [
        stage_memory(
            [chunk_memory(part, conditions, received=before, sent=part[-1].carried)],
            conditions,
            [Moment((alive,), (0,))],
            data=dp,
            zero_stage=zero,
        ).total
        for part, alive, before in zip(parts, live, received, strict=True)
    ]
    step = seconds + max(end.total for end in ends)
    flops = int(row["gbs"]) * profile.flops(int(row["seq"]), int(row["seq"]))
    return Predicted(step, [value / GIB for value in memory], flops)


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


def published(row: Row, predicted: Predicted) -> tuple[str, float, float] | None:
    """(unit, published, predicted) of a row's speed: its step time, or its TFLOP/s counted its own way."""
    if row["step_s"]:
        return "s", float(row["step_s"]), predicted.step_seconds
    if not row["tflops_gpu"]:
        return None
    layers, hidden, seq, vocab = (int(row[name]) for name in ("layers", "hidden", "seq", "vocab"))
    passes = {"full": 4, "selective": 3, "none": 3}[row["recompute"]] if row["tflops_kind"] == "hw" else 3
    # Narayanan et al. 2021, equation 3: the head is not computed again
    layer = 24 * hidden**2 * layers * (1 + seq / (6 * hidden))
    head = 2 * hidden * vocab
    flops = int(row["gbs"]) * seq * (passes * layer + 3 * head)
    if (row["tflops_kind"] == "hw" and "PTD-P" in row["source"]) or "README" in row["source"]:
        flops = int(row["gbs"]) * seq * passes * (layer + 2 * hidden * vocab * 0.75)
    return "TFLOP/s", float(row["tflops_gpu"]), flops / predicted.step_seconds / int(row["gpus"]) / 1e12


@dataclass(frozen=True)
class Comparison:
    """A row beside its prediction.

    Attributes:
        row: the row.
        unit: "s" or "TFLOP/s"; empty for a row that ran out of memory.
        there: what was published.
        here: what is predicted.
        memory_gib: predicted memory of the fullest stage.
        capacity_gib: memory of a device.
    """

    row: Row
    unit: str
    there: float
    here: float
    memory_gib: float
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
        published = self.row["mem_gb"]
        return self.memory_gib / float(published) - 1 if published not in ("", "OOM") else None

    @property
    def fits(self) -> bool:
        return self.memory_gib <= self.capacity_gib

    @property
    def fits_as_published(self) -> bool:
        """A row that ran is said to fit, one that ran out of memory is not."""
        return self.fits == (self.row["mem_gb"] != "OOM")

    def __str__(self) -> str:
        row, error, memory = self.row, self.time_error, self.memory_error
        layout = f"tp{row['tp']} pp{row['pp']} dp{row['dp']} mbs{row['mbs']}"
        text = f"{row['id']} {row['model'][:18]:18s} {layout:22s} {row['precision']}"
        if error is None:
            return f"{text} out of memory; predicted {self.memory_gib:.1f} of {self.capacity_gib:.1f} GiB"
        text += f" {self.there:8.2f} {self.unit:7s} predicted {self.here:8.2f} ({error:+.1%})"
        if memory is not None:
            text += f"  {float(row['mem_gb']):.0f} GiB, predicted {self.memory_gib:.1f} ({memory:+.0%})"
        return text if self.fits else f"{text}  SAID NOT TO FIT ({self.memory_gib:.1f} GiB)"


def compare(row: Row) -> Comparison:
    """Predict a row and lay both side by side."""
    predicted = predict(row)
    unit, there, here = published(row, predicted) or ("", 0.0, 0.0)
    capacity = GPUS[row["gpu"]].memory_bytes / GIB
    return Comparison(row, unit, there, here, max(predicted.memory_gib), capacity)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).with_suffix(".csv")
    parser.add_argument("table", type=Path, nargs="?", default=default, help="CSV file of published runs")
    parser.add_argument("--source", default="", help="only sources with this word")
    parser.add_argument("--worst", type=int, default=8, help="how many of the worst rows to name")
    arguments = parser.parse_args()
    rows = [row for row in csv.DictReader(arguments.table.open()) if arguments.source in row["source"]]
    results = [compare(row) for row in rows if is_counted(row)]
    for result in results:
        print(result)
    errors = sorted(abs(one.time_error) for one in results if one.time_error is not None)
    memory = [abs(one.memory_error) for one in results if one.memory_error is not None]
    if errors:
        tenth = errors[int(0.9 * (len(errors) - 1))]
        print(
            f"{len(errors)} speeds: median error {statistics.median(errors):.1%}, 90th percentile {tenth:.1%}, ", end=""
        )
        print(f"largest {errors[-1]:.1%}")
    if memory:
        print(f"{len(memory)} memories: median error {statistics.median(memory):.1%}, largest {max(memory):.1%}")
    print(
        f"{sum(one.fits_as_published for one in results)} of {len(results)} rows called rightly: fits, or out of memory"
    )
    print("worst:")
    for result in sorted(results, key=lambda one: -abs(one.time_error or 0.0))[: arguments.worst]:
        print(f"  {result}")


if __name__ == "__main__":
    main()
