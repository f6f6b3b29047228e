"""From a recipe to proposals: the model's profile, what the recipe pins, the search, and the answer as JSON.

Only the model's config is needed: no weights, no tokenizer, no prepared data.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpipe_cli.errors import LlmpipeError, PreflightError, UsageError
from llmpipe_cli.plan.calibration import Calibration, calibrate_run, links_of, read_links
from llmpipe_cli.plan.cluster import Cluster, Node, one_node, read_cluster
from llmpipe_cli.plan.devices import DEVICES, GIB, Device, match_device
from llmpipe_cli.plan.finer import find
from llmpipe_cli.plan.plan import Plan
from llmpipe_cli.plan.profile import ModelProfile
from llmpipe_cli.plan.rates import TABLE_RATES
from llmpipe_cli.plan.recipe_model import recipe_model, recipe_profile
from llmpipe_cli.plan.search import Candidate, Found, Job, Pins, choices, search, why_not, why_slower
from llmpipe_cli.plan.stand_in import stand_in
from llmpipe_cli.recipe.schema import Recipe

if TYPE_CHECKING:
    from llmpipe_cli.cluster.devices import Devices

SECONDS_A_DAY = 86400.0
MAX_SHOWN = 20
MAX_NEAREST = 3
MAX_DEVICES = 4096
_TRIED = 8  # values of a field that are tried before it is left
_FREED: dict[str, tuple[str, ...]] = {
    "partition": ("parallel.partition",),
    "micro_batch_size": ("train.micro_batch_size",),
    "checkpointing": ("parallel.activation_checkpointing",),
    "schedule": ("parallel.schedule", "partition"),
    "num_micro_batches": ("train.gradient_accumulation_steps",),
    "tensor": ("parallel.tensor",),
    "pipeline": ("parallel.pipeline", "partition"),
    "data": ("parallel.data",),
    "zero_stage": ("parallel.zero_stage",),
}
"""What a recipe can fix, the easiest to give up first: its name there, and what makes no sense without it."""


def this_machine(requested: int | None = None) -> Cluster:
    """The devices of this machine.

    Raises:
        PreflightError: more accelerators are asked for than there are.
    """
    from llmpipe_cli.cluster.devices import local_devices

    found = cluster_of(local_devices(requested))
    assert found is not None, "a machine knows its own memory"
    return found


def cluster_of(devices: Devices) -> Cluster | None:
    """The nodes that a launcher found; None where their devices are not known from here.

    A processor's cores share its memory; those of other nodes are taken to be as many as this machine's.
    """
    from llmpipe_cli.cluster.devices import num_cores

    if not devices.memory_bytes:
        return None
    counts = devices.by_node or (devices.count,)
    if devices.kind == "cpu":
        base, most = DEVICES["cpu"], max(counts)
        cores = max(1.0, num_cores() / most) if most <= num_cores() else num_cores() / most
        device = replace(
            base,
            memory_bytes=devices.memory_bytes,
            fp32=base.fp32 * cores,
            bf16=base.bf16 * cores,
            fp16=base.fp16 * cores,
        )
    else:
        known = match_device(devices.name, devices.memory_bytes)
        # An accelerator that the table lacks: rates of one that is common.
        device = known or replace(DEVICES["a10"], name=devices.name, memory_bytes=devices.memory_bytes)
    return replace(one_node(device, 1), nodes=tuple(Node(device, count) for count in counts))


def machines_for(plan: Plan, devices: Devices | None = None, threads: int | None = None) -> Cluster | None:
    """The devices that a plan runs on, as many as it has ranks; None where they are not known from here.

    Args:
        plan: the plan.
        devices: what its launcher found; None takes devices like this machine's.
        threads: of a rank on this machine's processor; None: all cores are shared out to the plan's ranks.
    """
    cluster = this_machine() if devices is None else cluster_of(devices)
    num_ranks = plan.layout.num_ranks
    if cluster is None:
        return None
    if plan.device == "cpu" and len(cluster.nodes) == 1:
        cluster = cluster if num_ranks <= cluster.num_devices else this_machine(num_ranks)
        return _with_threads(cluster, num_ranks, threads)
    return (
        cluster if num_ranks <= cluster.num_devices else cluster.first_nodes(-(-num_ranks // cluster.devices_per_node))
    )


def _with_threads(cluster: Cluster, num_ranks: int, threads: int | None) -> Cluster:
    """Ranks of a processor that compute with several threads; the cores' memory is one rank's and all ranks' alike."""
    from llmpipe_cli.cluster.devices import num_cores

    cores = min(float(threads or max(1, num_cores() // num_ranks)), num_cores() / num_ranks)
    base, (node,) = DEVICES["cpu"], cluster.nodes
    device = replace(node.device, fp32=base.fp32 * cores, bf16=base.bf16 * cores, fp16=base.fp16 * cores)
    return replace(cluster, nodes=(replace(node, device=device),))


def hostfile_cluster(path: Path, device: Device) -> Cluster:
    """The nodes of a hostfile, with devices like this machine's, and links as `llmpipe doctor` last measured them.

    Raises:
        UsageError: the hostfile has mistakes.
    """
    from llmpipe_cli.cluster.hostfile import read_hostfile
    from llmpipe_cli.cluster.network import read_figures
    from llmpipe_cli.data.cache import default_cache_dir

    nodes = tuple(Node(device, host.slots, host.name) for host in read_hostfile(path))
    cluster = replace(one_node(device, 1), nodes=nodes, source=str(path))
    figures = read_figures([node.host for node in nodes], default_cache_dir())
    return cluster if figures is None else links_of(figures, str(path)).apply(cluster)


def find_cluster(hostfile: Path | None, cluster: Path | None, devices: int | None) -> Cluster:
    """The cluster that the flags name: a description, a hostfile, or this machine.

    Raises:
        UsageError: both are given, or one has mistakes.
    """
    if hostfile is not None and cluster is not None:
        raise UsageError("give --hostfile or --cluster, not both", where="--cluster")
    if cluster is not None and devices is not None:
        raise UsageError(
            "--devices is about this machine", where="--cluster", hint="write devices_per_node into the cluster's file"
        )
    if cluster is not None:
        return read_cluster(cluster)
    if hostfile is not None:
        return hostfile_cluster(hostfile, this_machine().nodes[0].device)
    return this_machine(devices)


def recipe_pins(recipe: Recipe) -> Pins:
    """What the recipe fixes."""
    parallel, train = recipe.parallel, recipe.train
    split = isinstance(parallel.split_layers, list)  # recomputation works on whole layers

    def fixed(value: Any) -> Any:
        return None if value == "auto" else value

    return Pins(
        pipeline=fixed(parallel.pipeline),
        tensor=fixed(parallel.tensor),
        data=fixed(parallel.data),
        micro_batch_size=fixed(train.micro_batch_size),
        num_micro_batches=train.gradient_accumulation_steps,
        schedule=fixed(parallel.schedule),
        zero_stage=fixed(parallel.zero_stage),
        checkpointing=fixed(parallel.activation_checkpointing) or ("none" if split else None),
        partition=tuple(parallel.partition) if isinstance(parallel.partition, list) else None,
        chunks=parallel.virtual_stages if isinstance(parallel.virtual_stages, int) else Pins().chunks,
    )


def kernels_of(cluster: Cluster) -> str:
    """Whose kernels a cluster's ranks run: "cpu" or "cuda"."""
    return "cpu" if cluster.nodes[0].device.is_cpu else "cuda"


def make_job(
    recipe: Recipe, cluster: Cluster, profile: ModelProfile | None = None, calibration: Calibration | None = None
) -> Job:
    """The search's task for a recipe on a cluster.

    Args:
        recipe: the recipe.
        cluster: where it runs.
        profile: the recipe's profile if it is known already.
        calibration: what was measured.

    Raises:
        UsageError: no such model, or one that cannot be traced; a device without the recipe's dtype.
    """
    profile = profile or recipe_profile(recipe, kernels_of(cluster))
    if calibration is not None:
        cluster = calibration.apply(cluster)
    for node in cluster.nodes:
        node.device.peak(profile.dtype)
    return Job(
        profile,
        cluster,
        recipe.train.global_batch_size,
        recipe.data.sequence_len,
        optimizer=recipe.train.optimizer,
        pins=recipe_pins(recipe),
        most_tensor=1 if recipe.lora is not None else Job.most_tensor,
        rates=calibration.rates() if calibration is not None else TABLE_RATES,
        spare_cores=len(cluster.nodes) == 1 and cluster.nodes[0].device.is_cpu,
    )


def fill_auto(recipe: Recipe, cluster: Cluster) -> Recipe:
    """The recipe with `auto` in its layout, schedule, checkpointing and micro-batch replaced by the best layout's.

    Raises:
        UsageError: no layout is possible.
        PreflightError: none fits the devices' memory.
    """
    model = stand_in(recipe_model(recipe), kernels_of(cluster))
    job = make_job(recipe, cluster, model.profile)
    found = find(recipe, job, model)
    if not found.best:
        raise refusal(job, found)
    best = found.best[0]
    choice, listed = best.choice, recipe.parallel.split_layers
    chosen: dict[str, Any] = {
        "pipeline": choice.pipeline,
        "tensor": choice.tensor,
        "data": choice.data,
        "schedule": choice.schedule,
        "zero_stage": choice.zero_stage,
        "activation_checkpointing": choice.checkpointing,
        "partition": [stop - start for start, stop in itertools.pairwise(best.bounds)],
        "split_layers": list(best.split_layers) or (listed if isinstance(listed, list) else False),
    }
    if choice.schedule == "interleaved":
        chosen["virtual_stages"] = job.pins.chunks
    return recipe.model_copy(
        update={
            "parallel": recipe.parallel.model_copy(update=chosen),
            "train": recipe.train.model_copy(update={"micro_batch_size": choice.micro_batch_size}),
        }
    )


def as_json(job: Job, found: Found, recipe: Recipe) -> dict[str, Any]:
    """The answer: `layouts`, best first and then those that do not fit, and `chosen`."""
    shown = [*found.best, *found.unfit][: max(MAX_SHOWN, len(found.best))]
    layouts = [_layout(job, candidate, found) for candidate in shown]
    return {
        "layouts": layouts,
        "chosen": 0 if found.best else None,
        "num_considered": found.num_considered,
        "num_fitting": found.num_fitting,
        "cluster": {
            "nodes": len(job.cluster.nodes),
            "devices": job.cluster.num_devices,
            "device": " + ".join(job.cluster.counts),
            "counts": job.cluster.counts,
            "intra_node_gbps": job.cluster.intra_node_gbps,
            "inter_node_gbps": job.cluster.inter_node_gbps,
            "source": job.cluster.source,
        },
        "num_parameters": job.profile.num_parameters,
        "training": _whole_training(job, found, recipe),
    }


def _layout(job: Job, candidate: Candidate, found: Found) -> dict[str, Any]:
    choice = candidate.choice
    tokens = job.global_batch_size * job.sequence_len
    forward = job.profile.flops(tokens, job.sequence_len)
    seconds = candidate.seconds
    frozen = job.profile.frozen_flops(tokens)
    model_flops = 3 * forward - frozen
    hardware_flops = (3 + recomputed_share(job, choice.checkpointing)) * forward - frozen
    per_device = None if seconds is None else 1 / seconds / choice.num_devices / 1e12
    best = found.best[0] if found.best else None
    reason = None
    if not candidate.fits:
        reason = why_not(candidate)
    elif best is not None and candidate is not best:
        reason = why_slower(candidate, best)
    return {
        "pipeline": choice.pipeline,
        "tensor": choice.tensor,
        "data": choice.data,
        "micro_batch_size": choice.micro_batch_size,
        "num_micro_batches": choice.num_micro_batches,
        "schedule": choice.schedule,
        "zero_stage": choice.zero_stage,
        "activation_checkpointing": choice.checkpointing,
        "partition": [stop - start for start, stop in itertools.pairwise(candidate.bounds)],
        "split_layers": list(candidate.split_layers),
        "memory_bytes": [round(own.total) for own in candidate.memory],
        "memory_parts": [{name: round(value) for name, value in own.parts().items()} for own in candidate.memory],
        "bubble_fraction": candidate.bubble if seconds is not None else None,
        "step_seconds": seconds,
        "tokens_per_second": None if seconds is None else tokens / seconds,
        "tflops_per_device": None if per_device is None else hardware_flops * per_device,
        "model_tflops_per_device": None if per_device is None else model_flops * per_device,
        "fits": candidate.fits,
        "why_not": reason,
    }


def recomputed_share(job: Job, checkpointing: str) -> float:
    """Operations that checkpointing repeats, as a share of the forward pass's."""
    if checkpointing == "none":
        return 0.0
    whole = job.profile.flops(1, job.sequence_len)
    layers = [segment for segment in job.profile.segments if segment.kind == "layer"]
    if checkpointing == "full":
        return sum(segment.flops(1, job.sequence_len) for segment in layers) / whole
    unfused = [a.flops_squared for segment in layers for a in segment.attentions if not a.fused]
    return sum(unfused) * job.sequence_len / whole


def _whole_training(job: Job, found: Found, recipe: Recipe) -> dict[str, Any] | None:
    """How long the recipe takes on the chosen layout."""
    if not found.best or found.best[0].seconds is None:
        return None
    seconds = found.best[0].seconds
    steps, devices = recipe.train.max_steps, found.best[0].choice.num_devices
    answer: dict[str, Any] = {
        "tokens_per_day": job.global_batch_size * job.sequence_len * SECONDS_A_DAY / seconds,
        "max_steps": steps,
        "days": None,
        "device_hours": None,
    }
    if steps is not None:
        answer["days"] = steps * seconds / SECONDS_A_DAY
        answer["device_hours"] = steps * seconds / 3600 * devices
    return answer


def refusal(job: Job, found: Found) -> LlmpipeError:
    """Why nothing can run, with the nearest layouts that would."""
    near = nearest(job)
    hint = "; ".join(near) if near else None
    if found.unfit:
        least = found.unfit[0]
        text = f"{_short(least)} comes nearest: {why_not(least)}"
        return PreflightError(f"no layout of this recipe fits the devices' memory; {text}", hint=hint)
    reasons = "; ".join(found.refused) or "the recipe's layout and the devices do not agree"
    return UsageError(f"no layout is possible: {reasons}", where="parallel", hint=hint)


def nearest(job: Job) -> list[str]:
    """Layouts that would fit: with one of the recipe's fields changed, with all left open, and on more nodes."""
    answers: list[str] = []
    for name, (field, *freed) in _FREED.items():
        mended = bool(answers) and job.pins.partition is not None and "partition" in freed
        if getattr(job.pins, name) is not None and not mended:
            closest = _closest(job, name, freed)
            if closest is not None:
                answers.append(f"with another {field} this would fit: {_short(closest)}")
    if answers:
        return answers[:MAX_NEAREST]
    free = replace(job, pins=Pins(chunks=job.pins.chunks))
    found = search(free, keep=1)
    if found.best:
        return [f"this would fit: {_short(found.best[0])}"] if job.pins != free.pins else []
    return [_on_more_nodes(free)]


def _on_more_nodes(job: Job) -> str:
    """How many nodes would do, and with which layout."""
    nodes = len(job.cluster.nodes)
    most = min(64 * nodes, max(nodes, MAX_DEVICES // job.cluster.devices_per_node))
    count = 2 * nodes
    while count <= most:
        larger = search(replace(job, cluster=job.cluster.first_nodes(count)), keep=1)
        if larger.best:
            return f"on {count} such nodes this would fit: {_short(larger.best[0])}"
        count *= 2
    return f"{most} such nodes would not do either: a shorter data.sequence_len needs less, or take larger devices"


def _closest(job: Job, name: str, freed: Sequence[str]) -> Candidate | None:
    """The best layout with the value of a pin that is nearest to the recipe's; none where none fits.

    Args:
        job: what is planned.
        name: the pin.
        freed: further pins that make no sense without it.
    """
    wanted = getattr(job.pins, name)
    unpinned: dict[str, Any] = dict.fromkeys((name, *freed))
    free = replace(job, pins=replace(job.pins, **unpinned))
    values: list[Any] = [None]
    if isinstance(wanted, int):
        near = {getattr(choice, name) for choice in choices(free, Counter())} - {wanted}
        values = sorted(near, key=lambda value: abs(math.log(value / wanted)) if wanted and value else 0.0)
    for value in values[:_TRIED]:
        found = search(replace(free, pins=replace(free.pins, **{name: value})), keep=1)
        if found.best:
            return found.best[0]
    return None


def _short(candidate: Candidate) -> str:
    choice = candidate.choice
    return (
        f"pipeline {choice.pipeline} x tensor {choice.tensor} x data {choice.data}, "
        f"micro_batch_size {choice.micro_batch_size}, {choice.schedule}, zero_stage {choice.zero_stage}, "
        f"activation_checkpointing {choice.checkpointing} "
        f"({max(own.total for own in candidate.memory) / GIB:.1f} GiB)"
    )


def read_calibration(paths: Sequence[Path]) -> Calibration | None:
    """What was measured, from run directories and files of links; None without any.

    Raises:
        UsageError: neither a run with a timeline nor a file of links.
    """
    if not paths:
        return None
    merged = Calibration()
    for path in paths:
        merged = merged.joined(calibrate_run(path) if path.is_dir() else read_links(path))
    return merged
