"""What was measured, in place of the table's rates: links that `llmpipe doctor` timed, devices that a bench ran on.

A calibration file is JSON with any of `intra_node_gbps`, `inter_node_gbps` and `latency_seconds`. A run is a run
directory of `llmpipe bench` (or train): what its stages took for a forward pass, a backward pass and the optimizer's
step, beside what the table predicts for its own plan, gives the device's rates (`plan.rates`); how long replicas took
to sum their gradients gives the link's. Runs of several widths and numbers of ranks tell more than one run.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import socket
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpipe_cli.cluster.devices import num_cores
from llmpipe_cli.errors import UsageError
from llmpipe_cli.plan.cluster import Cluster
from llmpipe_cli.plan.cost import Conditions, EndOfStep, Work, around_passes, end_of_step, segment_work
from llmpipe_cli.plan.engines import OURS
from llmpipe_cli.plan.profile import ModelProfile, SegmentProfile
from llmpipe_cli.plan.rates import TABLE_RATES, Observation, Rates, fit_rates, presumed_contention

if TYPE_CHECKING:
    from llmpipe_cli.plan.plan import Plan
    from llmpipe_cli.plan.search import Candidate
    from llmpipe_cli.run import RunDirectory


_WARMUP = 3  # steps that say nothing about the others
_PASSES = {"F": "F", "B": "IW", "I": "I", "W": "W"}  # the halves that an instruction consists of
_LOOKED_AT, _EARLIER_RUNS = 20, 2  # newest runs looked at for those of a model, and of these used
# What a config gets when a checkpoint is saved; it says nothing of the model.
_SAVED_WITH = {"architectures", "_name_or_path", "dtype", "transformers_version"}
_LEAST_REDUCE_SECONDS = 1e-3  # shorter ones are latency


@dataclass(frozen=True)
class Calibration:
    """Measured rates.

    Attributes:
        intra_node_gbps: Gbit/s inside a node; None where it was not measured.
        inter_node_gbps: Gbit/s between nodes.
        latency_seconds: time of an empty message between nodes.
        passes: what passes of runs took, beside the prediction.
        optimizer: what optimizer steps took.
        reductions: Gbit/s inside a node that replicas of runs reached while they summed gradients, a run each; their
            median takes the place of `intra_node_gbps`.
        cores: of the processor that the ranks of the runs shared; 0 where they had devices of their own.
        source: what it was read from.
    """

    intra_node_gbps: float | None = None
    inter_node_gbps: float | None = None
    latency_seconds: float | None = None
    passes: tuple[Observation, ...] = ()
    optimizer: tuple[Observation, ...] = ()
    reductions: tuple[float, ...] = ()
    cores: int = 0
    source: str = ""

    def joined(self, other: Calibration) -> Calibration:
        """Both measurements; where both have measured a link itself, it is the other's."""
        return Calibration(
            other.intra_node_gbps or self.intra_node_gbps,
            other.inter_node_gbps or self.inter_node_gbps,
            other.latency_seconds or self.latency_seconds,
            (*self.passes, *other.passes),
            (*self.optimizer, *other.optimizer),
            (*self.reductions, *other.reductions),
            max(self.cores, other.cores),
            " ".join(filter(None, (self.source, other.source))),
        )

    def rates(self) -> Rates:
        """The devices' rates; the table's where no run was measured."""
        presumed = presumed_contention(self.cores)
        return fit_rates(self.passes, self.optimizer, presumed) if self.passes else TABLE_RATES

    def apply(self, cluster: Cluster) -> Cluster:
        """The cluster with measured rates where there are any."""
        inside = statistics.median(self.reductions) if self.reductions else self.intra_node_gbps
        measured = inside is not None or self.inter_node_gbps is not None
        fraction = cluster.link_fraction
        # a measured rate is what is reached; one that was not measured keeps its share of the nominal rate
        intra, inter = cluster.intra_node_gbps, cluster.inter_node_gbps
        if measured:
            intra = inside or intra * fraction
            inter = self.inter_node_gbps or inter * fraction
            fraction = 1.0
        return replace(
            cluster,
            intra_node_gbps=intra,
            inter_node_gbps=inter,
            inter_latency_seconds=self.latency_seconds or cluster.inter_latency_seconds,
            link_fraction=fraction,
        )


def read_links(path: Path) -> Calibration:
    """A calibration from a file of measured links.

    Raises:
        UsageError: not such a file.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        hint = "give the folder of a bench run, or a file of links that doctor measured"
        raise UsageError(f"{path} cannot be read: {reason}", where="--calibrate", hint=hint) from error
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
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf
        ):
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
    from llmpipe_cli.plan.propose import machines_for
    from llmpipe_cli.run import RunDirectory, read_json, read_metrics

    run = RunDirectory(path)
    if not run.plan.is_file():
        raise UsageError(f"{path} is not a run directory", where="--calibrate", hint="give a folder that bench made")
    steps = sorted(run.timeline.glob("step-*.json"))
    written = read_json(steps[-1]) if steps else None
    if not isinstance(written, dict):
        raise UsageError(f"{path} has no timeline", where="--calibrate", hint="give a run of `llmpipe bench`")
    try:
        plan = Plan.load(run.plan)
    except ValueError as error:
        raise UsageError(f"{run.plan} is no plan of this version", where="--calibrate", hint="run it again") from error
    lines = [line for line in read_metrics(run.metrics) if "event" not in line]
    lines = lines[min(_WARMUP, max(0, len(lines) - 1)) :]
    cluster = machines_for(plan, threads=written.get("threads", 1))
    if cluster is None or not lines or not lines[0].get("stages") or not written.get("ranks"):
        raise UsageError(f"{path} says too little of its devices and steps", where="--calibrate")
    predicted, stages = _Predicted(plan, cluster), range(plan.layout.pipeline)
    # ranks of a processor slow each other down while they work at the same time
    beside = plan.layout.num_ranks - 1 if plan.device == "cpu" else 0
    step = statistics.median(line["step_seconds"] for line in lines)
    busy = statistics.mean(_median(lines, stage, "busy_seconds") for stage in stages) / step
    around = around_passes(predicted.conditions.device, split=False).forward
    passes = [
        Observation(predicted.parts(plan.placement.part(stage, chunk), kind), seconds - around, beside * min(1.0, busy))
        for (stage, chunk, kind), seconds in _usual_passes(written["ranks"], lines).items()
        if seconds > 2 * around  # of shorter ones little would be left that says anything
    ]
    alone = len(cluster.nodes) == 1 and plan.layout.data > 1
    shared = _reduction(written["ranks"], predicted) if alone else None  # measured over predicted seconds
    optimizer = []
    for stage in stages:
        end = predicted.end(stage)
        # what ranks record as the optimizer's step includes sharing the new parameters
        took = _median(lines, stage, "optimizer_seconds") - end.gather * (shared or 1.0)
        if took > 0:
            optimizer.append(Observation((end.optimizer,), took, beside))
    reductions = () if shared is None else (cluster.intra_node_gbps * cluster.link_fraction / shared,)
    return Calibration(
        passes=tuple(passes),
        optimizer=tuple(optimizer),
        reductions=reductions,
        cores=num_cores() if plan.device == "cpu" else 0,
        source=str(path),
    )


def calibrate_on_earlier(plan: Plan, runs: Sequence[RunDirectory]) -> Calibration | None:
    """A calibration from the newest runs of a plan's model on this machine's processor; None without any.

    Args:
        plan: the plan.
        runs: run directories, oldest first.
    """
    if plan.device != "cpu":
        return None
    found: list[Calibration] = []
    for run in reversed(runs[-_LOOKED_AT:]):
        if len(found) < _EARLIER_RUNS and _is_alike(run, plan):
            try:
                found.append(calibrate_run(run.path))
            except UsageError:
                continue  # it ended too early to say anything
    return functools.reduce(Calibration.joined, found) if found else None


def _is_alike(run: RunDirectory, plan: Plan) -> bool:
    """Whether a run trained the same model on processors of this machine."""
    from llmpipe_cli.run import read_json

    theirs = run.read_plan()
    if any(theirs.get(name) != getattr(plan, name) for name in ("job", "device", "model_class")):
        return False
    if theirs["recipe"]["model"]["dtype"] != plan.recipe["model"]["dtype"]:
        return False
    if _model_fields(theirs["model_config_fields"]) != _model_fields(plan.model_config_fields):
        return False
    ranks = [read_json(path) for path in run.control.glob("rank-*.json")]
    return bool(ranks) and {rank.get("host") for rank in ranks if isinstance(rank, dict)} == {socket.gethostname()}


def _model_fields(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _SAVED_WITH}


def _median(lines: list[dict[str, Any]], stage: int, name: str) -> float:
    """Median over steps of what a stage spent on something."""
    return statistics.median(float(line["stages"][stage].get(name) or 0.0) for line in lines)


def _usual_passes(ranks: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[tuple[int, int, str], float]:
    """Median seconds of a pass by stage, chunk and kind: those of the recorded step, scaled to the usual one."""
    seconds: dict[tuple[int, int, str], list[float]] = defaultdict(list)
    whole: dict[int, float] = defaultdict(float)
    for rank in ranks:
        for record in rank["records"]:
            if record["kind"] in _PASSES:
                took = record["end"] - record["start"]
                seconds[rank["stage"], record["chunk"], record["kind"]].append(took)
                whole[rank["stage"]] += took
    members = len(ranks) / len(whole)
    return {
        key: statistics.median(own) * _median(lines, key[0], "busy_seconds") * members / whole[key[0]]
        for key, own in seconds.items()
    }


def _reduction(ranks: list[dict[str, Any]], predicted: _Predicted) -> float | None:
    """Seconds of the all-reduce of gradients over the predicted ones: who comes last to it does not wait, so the
    shortest of a stage's counts. None where it is too short to tell."""
    ratios = []
    for stage in range(predicted.plan.layout.pipeline):
        took = min(
            sum(record["end"] - record["begin"] for record in rank["records"] if record["kind"] == "reduce")
            for rank in ranks
            if rank["stage"] == stage
        )
        if took > _LEAST_REDUCE_SECONDS:
            ratios.append(took / predicted.end(stage).reduce)
    return statistics.median(ratios) if ratios else None


class _Predicted:
    """What the table predicts of a plan's own layout, part by part."""

    def __init__(self, plan: Plan, cluster: Cluster) -> None:
        recipe = plan.recipe
        self.plan, self.profile = plan, plan_profile(plan)
        self.conditions = Conditions(
            cluster.nodes[0].device,
            cluster,
            OURS,
            self.profile.dtype,
            plan.micro_batch_size,
            recipe["data"]["sequence_len"],
            plan.layout.tensor,
            plan.activation_checkpointing,
        )

    def _segments(self, part: int) -> tuple[SegmentProfile, ...]:
        start, stop = self.plan.partition[part : part + 2]
        return self.profile.segments[start:stop]

    def parts(self, part: int, kind: str) -> tuple[float, float, float]:
        """Seconds of a pass (F, B, I or W) through a part of the model: arithmetic, memory, launches."""
        again = "F" if kind in "BI" and self.conditions.checkpointing == "full" else ""
        works = [segment_work(segment, self.conditions) for segment in self._segments(part)]
        total = sum((work["FIW".index(half)] for half in _PASSES[kind] + again for work in works), Work())
        if self.conditions.device.is_cpu:
            return total.arithmetic, total.memory, total.launches
        return total.seconds(self.conditions.device), 0.0, 0.0  # its kinds of work go on at the same time

    def end(self, stage: int) -> EndOfStep:
        """The end of a stage's step."""
        layout, placement = self.plan.layout, self.plan.placement
        own = [part for part in range(placement.num_parts) if placement.owner(part)[0] == stage]
        return end_of_step(
            [segment for part in own for segment in self._segments(part)],
            self.conditions,
            data=layout.data,
            zero_stage=self.plan.zero_stage,
            pipeline=layout.pipeline,
        )


def plan_profile(plan: Plan) -> ModelProfile:
    """The profile of a plan's model; plans of the same model are measured once."""
    model = plan.recipe["model"]
    trainable = [] if plan.adapters is not None else plan.trainable
    facts = (plan.recipe["task"], plan.model_config_fields, plan.slice_plan)
    options = (plan.model_type, model["dtype"], model["attn_implementation"], trainable, plan.device)
    return _measured_profile(json.dumps([*facts, *options], sort_keys=True))


@functools.lru_cache(maxsize=4)
def _measured_profile(facts: str) -> ModelProfile:
    from transformers import AutoConfig

    from llmpipe_cli.model.auto import model_class
    from llmpipe_cli.model.slicing.plan import SlicePlan
    from llmpipe_cli.plan.measure import measure_profile

    task, fields, slice_plan, model_type, dtype, attn_implementation, trainable, device = json.loads(facts)
    config = AutoConfig.for_model(model_type, **{name: fields[name] for name in fields if name != "model_type"})
    return measure_profile(
        model_class(config, task),
        config,
        task,
        SlicePlan.from_json(slice_plan),
        dtype=dtype,
        attn_implementation=attn_implementation,
        trainable=trainable,
        device=device,
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
        rates=calibration.rates() if calibration is not None else TABLE_RATES,
    )
    found = search(job, keep=1)
    return next(iter([*found.best, *found.unfit]), None)
