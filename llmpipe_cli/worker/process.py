"""Joining the job: process group, device, and the plan from rank 0."""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.utils import logger as deepspeed_logger
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmpipe_cli.engine.communicators import COLLECTIVE_TIMEOUT, use_collective_timeout
from llmpipe_cli.engine.exchange import broadcast_json
from llmpipe_cli.engine.module import StageModule, stage_chunks
from llmpipe_cli.engine.schedules import splits_backward
from llmpipe_cli.model.adapters import Adapters, divide_adapters
from llmpipe_cli.model.skeleton import build_skeleton
from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.model.stage import build_stage
from llmpipe_cli.model.tensor.apply import divide_model
from llmpipe_cli.plan.plan import Plan
from llmpipe_cli.recipe.schema import Recipe
from llmpipe_cli.run import RunDirectory
from llmpipe_cli.worker.device import rank_device
from llmpipe_cli.worker.stop import StopFlag

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Context:
    """What every job of a worker needs."""

    run: RunDirectory
    stop: StopFlag
    plan: Plan
    recipe: Recipe
    rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the run's files."""
        return self.rank == 0

    @property
    def stage(self) -> int:
        """Pipeline stage of this rank: ranks are ordered by stage, then replica, then tensor shard."""
        return self.rank // (self.plan.layout.data * self.plan.layout.tensor)

    @property
    def replica(self) -> int:
        """Data parallel rank."""
        return self.rank // self.plan.layout.tensor % self.plan.layout.data

    @property
    def shard(self) -> int:
        """Tensor shard of this rank."""
        return self.rank % self.plan.layout.tensor


def join(run: RunDirectory, stop: StopFlag) -> Context:
    """Join the process group that torchrun describes in the environment and learn the plan."""
    rank = int(os.environ["RANK"])
    deepspeed_logger.setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    device = rank_device()
    if device.type == "cpu":
        quiet_cpu_start()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    backend = "nccl" if device.type == "cuda" else "gloo"
    use_collective_timeout()
    deepspeed.init_distributed(
        backend, auto_mpi_discovery=False, verbose=False, timeout=COLLECTIVE_TIMEOUT, dist_init_required=True
    )
    plan = Plan.model_validate(broadcast_json(Plan.load(run.plan).model_dump(mode="json") if rank == 0 else None))
    if dist.get_world_size() != plan.layout.num_ranks:
        raise RuntimeError(f"{dist.get_world_size()} ranks were started for a layout of {plan.layout.num_ranks}")
    context = Context(run, stop, plan, Recipe.model_validate(plan.recipe), rank, device)
    os.environ["LLMPIPE_STAGE"] = str(context.stage)
    return context


def quiet_cpu_start() -> None:
    """Keep DeepSpeed from compiling a C++ extension (40 s) for a shared-memory all-reduce that pipelines never call."""
    # (`deepspeed.comm.torch` as an attribute is torch itself.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]


def config_from_fields(plan: Plan) -> PreTrainedConfig:
    """The Hugging Face config of the plan's model."""
    return CONFIG_MAPPING[plan.model_type].from_dict(plan.model_config_fields)


def load_stage(context: Context) -> StageModule:
    """Build this rank's stage, with weights from the plan's directory or from the recipe's seed."""
    plan = context.plan
    slice_plan = SlicePlan.from_json(plan.slice_plan)
    cls, config = getattr(transformers, plan.model_class), config_from_fields(plan)
    adapters = Adapters.from_json(plan.adapters) if plan.adapters is not None else None
    division = None
    if plan.layout.tensor > 1:
        skeleton = build_skeleton(cls, config)
        division = divide_model(skeleton, context.shard, plan.layout.tensor)
        if adapters is not None:
            division = divide_adapters(skeleton, division, adapters)
    model = build_stage(
        cls,
        config,
        slice_plan,
        [segment for chunk in stage_chunks(plan.partition, plan.placement, context.stage) for segment in chunk],
        dtype=DTYPES[context.recipe.model.dtype],
        device=context.device,
        seed=context.recipe.train.seed,
        weights=plan.weights,
        attn_implementation=context.recipe.model.attn_implementation,
        adapters=adapters,
        adapter_weights=plan.adapter_weights,
        trainable=set(plan.trainable) if plan.trainable is not None else None,
        allow_pickle=context.recipe.model.allow_pickle,
        division=division,
    )
    split_backward = plan.job in ("train", "bench") and splits_backward(plan.schedule)
    module = StageModule(
        model,
        slice_plan,
        plan.partition,
        plan.layout,
        placement=plan.placement,
        split_backward=split_backward,
        division=division,
        whole_logits=context.recipe.train.label_smoothing > 0,
    )
    for replay in module.replays:
        replay.set_checkpointing(plan.activation_checkpointing)
    return module
