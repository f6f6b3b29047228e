"""What was measured, in place of the table's rates: links that `llmpipe doctor` timed, devices that a bench ran on.

A calibration file is JSON with any of `intra_node_gbps`, `inter_node_gbps` and `latency_seconds`. A run is a run
directory of `llmpipe bench` (or train): what its stages computed a micro-batch, beside what is predicted for its own
plan, gives the device's rate.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpipe_cli.errors import UsageError
from llmpipe_cli.plan.cluster import Cluster

if TYPE_CHECKING:
    from llmpipe_cli.plan.plan import Plan
    from llmpipe_cli.plan.profile import ModelProfile
    from llmpipe_cli.plan.search import Candidate


_WARMUP = 3  # steps that say nothing about the others


@dataclass(frozen=True)
class Calibration:
    """Measured rates.

    Attributes:
        intra_node_gbps: Gbit/s inside a node; None where it was not measured.
        inter_node_gbps: Gbit/s between nodes.
        latency_seconds: time of an empty message between nodes.
        speeds: work a second relative to the prediction, by the number of ranks of the run that it was measured in:
            the cores of a processor are slower the more of them work.
        source: what it was read from.
    """

    intra_node_gbps: float | None = None
    inter_node_gbps: float | None = None
    latency_seconds: float | None = None
    speeds: tuple[tuple[int, float], ...] = ()
    source: str = ""

    def joined(self, other: Calibration) -> Calibration:
        """Both measurements; where both have one, links are the other's."""
        return Calibration(
            other.intra_node_gbps or self.intra_node_gbps,
            other.inter_node_gbps or self.inter_node_gbps,
            other.latency_seconds or self.latency_seconds,
            (*self.speeds, *other.speeds),
            " ".join(filter(None, (self.source, other.source))),
        )

    def apply(self, cluster: Cluster) -> Cluster:
        """The cluster with measured rates where there are any."""
        measured = self.intra_node_gbps is not None or self.inter_node_gbps is not None
        fraction = cluster.link_fraction
        # a measured rate is what is reached; one that was not measured keeps its share of the nominal rate
        intra, inter = cluster.intra_node_gbps, cluster.inter_node_gbps
        if measured:
            intra = self.intra_node_gbps or intra * fraction
            inter = self.inter_node_gbps or inter * fraction
            fraction = 1.0
        return replace(
            cluster,
            intra_node_gbps=intra,
            inter_node_gbps=inter,
            inter_latency_seconds=self.latency_seconds or cluster.inter_latency_seconds,
            link_fraction=fraction,
        )


def speed_of(speeds: Sequence[tuple[int, float]], num_ranks: int) -> float:
    """Speed of a device among `num_ranks`: geometric mean of what was measured with the nearest number of ranks."""
    if not speeds:
        return 1.0
    nearest = min((ranks for ranks, _ in speeds), key=lambda ranks: abs(math.log(ranks / num_ranks)))
    return statistics.geometric_mean(speed for ranks, speed in speeds if ranks == nearest)


def read_links(path: Path) -> Calibration:
    """A calibration from a file of measured links.

    Raises:
        UsageError: not such a file.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON", where="--calibrate") from error
    return links_of(values, str(path))


def links_of(values: Any, source: str) -> Calibration:
    """A calibration from measured links, as `cluster.network` keeps them; null stands for what was not measured.

    Raises:
        UsageError: not such figures.
    """
    known = ("intra_node_gbps", "inter_node_gbps", "latency_seconds")
    if not isinstance(values, dict) or not any(isinstance(values.get(name), (int, float)) for name in known):
        raise UsageError(f"{source} names none of {', '.join(known)}", where="--calibrate")
    numbers = {name: values.get(name) for name in known}
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
            raise UsageError(f"{name} must be a number above 0, not {value!r}", where=source)
    return Calibration(
        numbers["intra_node_gbps"], numbers["inter_node_gbps"], numbers["latency_seconds"], source=source
    )


def calibrate_run(path: Path) -> Calibration:
    """A calibration from a run directory: what its stages computed, beside what was predicted for them.

    Raises:
        UsageError: not a run directory, or one without a timeline.
    """
    from llmpipe_cli.plan.plan import Plan
    from llmpipe_cli.run import RunDirectory, read_json, read_metrics

    run = RunDirectory(path)
    if not run.plan.is_file():
        raise UsageError(f"{path} is not a run directory", where="--calibrate", hint="give a folder that bench made")
    steps = sorted(run.timeline.glob("step-*.json"))
    written = read_json(steps[-1]) if steps else None
    if not isinstance(written, dict):
        raise UsageError(f"{path} has no timeline", where="--calibrate", hint="give a run of `llmpipe bench`")
    plan = Plan.load(run.plan)
    predicted = predicted_stage_seconds(plan)
    measured = [0.0] * len(predicted)
    for rank in written["ranks"]:
        if rank["replica"] == 0:
            work = [record for record in rank["records"] if record["kind"] in ("F", "B", "I", "W")]
            measured[rank["stage"]] += sum(record["end"] - record["start"] for record in work)
    lines = [line for line in read_metrics(run.metrics) if "event" not in line]
    usual = statistics.median(line["step_seconds"] for line in lines[min(_WARMUP, len(lines) - 1) :])
    this = next((line["step_seconds"] for line in lines if line["step"] == written["step"]), usual)
    speed = sum(predicted) / max(sum(measured) * usual / this, 1e-9)
    return Calibration(speeds=((plan.layout.num_ranks, speed),), source=str(path))


def plan_profile(plan: Plan) -> ModelProfile:
    """The profile of a plan's model; plans of the same model are measured once."""
    model = plan.recipe["model"]
    trainable = [] if plan.adapters is not None else plan.trainable
    facts = (plan.recipe["task"], plan.model_config_fields, plan.slice_plan)
    options = (plan.model_type, model["dtype"], model["attn_implementation"], trainable)
    return _measured_profile(json.dumps([*facts, *options], sort_keys=True))


@functools.lru_cache(maxsize=4)
def _measured_profile(facts: str) -> ModelProfile:
    from transformers import AutoConfig

    from llmpipe_cli.model.auto import model_class
    from llmpipe_cli.model.slicing.plan import SlicePlan
    from llmpipe_cli.plan.measure import measure_profile

    task, fields, slice_plan, model_type, dtype, attn_implementation, trainable = json.loads(facts)
    config = AutoConfig.for_model(model_type, **{name: fields[name] for name in fields if name != "model_type"})
    return measure_profile(
        model_class(config, task),
        config,
        task,
        SlicePlan.from_json(slice_plan),
        dtype=dtype,
        attn_implementation=attn_implementation,
        trainable=trainable,
    )


def planned_candidate(plan: Plan, cluster: Cluster, calibration: Calibration | None = None) -> Candidate | None:
    """The plan's own layout, predicted on a cluster."""
    from llmpipe_cli.plan.search import Job, Pins, search

    recipe = plan.recipe
    bounds = plan.partition
    pins = Pins(
        pipeline=plan.layout.pipeline,
        tensor=plan.layout.tensor,
        data=plan.layout.data,
        micro_batch_size=plan.micro_batch_size,
        schedule=plan.schedule,
        zero_stage=plan.zero_stage,
        checkpointing=plan.activation_checkpointing,
        partition=tuple(stop - start for start, stop in itertools.pairwise(bounds)),
        chunks=plan.virtual_stages,
    )
    job = Job(
        plan_profile(plan),
        calibration.apply(cluster) if calibration is not None else cluster,
        recipe["train"]["global_batch_size"],
        recipe["data"]["sequence_len"],
        optimizer=recipe["train"]["optimizer"],
        pins=pins,
        speeds=calibration.speeds if calibration is not None else (),
    )
    found = search(job, keep=1)
    return next(iter([*found.best, *found.unfit]), None)


def predicted_stage_seconds(plan: Plan) -> list[float]:
    """Seconds that each stage of a plan computes in a step, predicted for this machine."""
    from llmpipe_cli.plan.propose import machines_for

    cluster = machines_for(plan)
    candidate = None if cluster is None else planned_candidate(plan, cluster)
    if candidate is None:
        raise UsageError("the run's layout cannot be predicted", where="--calibrate")
    seconds = [0.0] * plan.layout.pipeline
    for part, cost in enumerate(candidate.costs):
        seconds[plan.placement.owner(part)[0]] += cost.total * plan.num_micro_batches
    return seconds
