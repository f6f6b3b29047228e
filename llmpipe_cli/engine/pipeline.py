"""The training engine: DeepSpeed's PipelineEngine with its gaps mended.

DeepSpeed keeps the process grid, the ties, gradient reduction, ZeRO-1, mixed precision and the optimizer step. Ours
are the executor (asynchronous transfers, any schedule), the loss (mean over the target tokens of the global batch
instead of a mean of micro-batch means) and the gradient norm of fp32 training without ZeRO, which counts every
parameter exactly once over all stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine

from llmpipe_cli.engine.config import deepspeed_config
from llmpipe_cli.engine.executor import Loss, LossFunction, MicroBatch, StageExecutor
from llmpipe_cli.engine.module import StageModule
from llmpipe_cli.engine.optimizers import build_optimizer
from llmpipe_cli.engine.randomness import DrawSeeder
from llmpipe_cli.engine.schedules import SCHEDULES
from llmpipe_cli.model.adapters import Adapters
from llmpipe_cli.model.tensor.apply import PART, PARTIAL_GRADIENT
from llmpipe_cli.plan.plan import Plan
from llmpipe_cli.recipe.schema import TrainSection


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave; the same on every rank unless said otherwise.

    Attributes:
        loss_sum: last stage of each replica, first tensor shard: sum over its micro-batches of mean loss x targets, in
            nats; else 0.
        auxiliary_sum: likewise: sum over its micro-batches of the auxiliary losses before their coefficients.
        num_auxiliary: likewise: its micro-batches that had auxiliary losses.
        num_targets: targets of the global batch.
        grad_norm: L2 norm of all gradients before clipping; infinite when fp16 overflowed.
        skipped: the optimizer did not step because gradients were not finite.
    """

    loss_sum: float
    auxiliary_sum: float
    num_auxiliary: int
    num_targets: int
    grad_norm: float
    skipped: bool


class Engine(PipelineEngine):
    """Trains the stage of this rank.

    Args:
        plan: the plan.
        module: the stage, on its device.
        loss_function: loss of a micro-batch from the model's output (mean over its targets).
        learning_rate: rate of each optimizer step, counted from 0.
    """

    def __init__(
        self,
        plan: Plan,
        module: StageModule,
        loss_function: LossFunction,
        learning_rate: Callable[[int], float],
    ) -> None:
        train = TrainSection.model_validate(plan.recipe["train"])
        self._plan = plan
        self.adapters = Adapters.from_json(plan.adapters) if plan.adapters is not None else None
        self._loss_function, self._learning_rate = loss_function, learning_rate
        self._placeholders = _add_placeholders(module)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        config = deepspeed_config(plan)
        super().__init__(
            args=None,
            model=module,
            optimizer=build_optimizer(train, parameters),
            model_parameters=parameters,
            training_data=None,
            lr_scheduler=None,
            mpu=module.mpu(),
            dist_init_required=False,
            collate_fn=None,
            config=config,
            config_class=DeepSpeedConfig(config, module.mpu()),
        )
        narrow = plan.recipe["parallel"]["wire_dtype"] == "bf16"
        seeder = DrawSeeder(train.seed, self.device)
        self.executor = StageExecutor(module, self.device, seeder, torch.bfloat16 if narrow else None)
        if module.weight_gradients is not None:
            plain = not (self.fp16_enabled() or self.bfloat16_enabled() or self.zero_optimization())
            module.weight_gradients.direct = plain  # no hook of a DeepSpeed optimizer waits for gradients
        self._order = SCHEDULES[plan.schedule](self.stage_id, self.num_stages, self.micro_batches, plan.virtual_stages)

    def train_step(self, step: int, batches: Sequence[MicroBatch]) -> StepResult:
        """One optimizer step over this replica's micro-batches.

        Args:
            step: optimizer steps done before this one.
            batches: `gradient_accumulation_steps` micro-batches.
        """
        self.module.train()
        rate = self._learning_rate(step)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        num_targets = self._sum_over_replicas(sum(batch.num_targets for batch in batches))
        # DeepSpeed averages gradients over the replicas; the loss is a sum over them.
        weight = self.dp_world_size / max(num_targets, 1)
        losses: list[torch.Tensor] = []
        auxiliaries: list[torch.Tensor] = []

        def scale_loss(loss: Loss, batch: MicroBatch) -> torch.Tensor:
            scaled = loss.mean * (batch.num_targets * weight)
            if loss.auxiliary_term is not None:  # a mean over micro-batches, whatever their targets
                scaled = scaled + loss.auxiliary_term / self.micro_batches
            return self.optimizer.scale_if_loss(scaled) if self.zero_optimization() else scaled

        group = self.module.tensor_group

        def keep_loss(position: int, loss: Loss) -> None:
            if group is not None and group.rank != 0:
                return  # all tensor shards have the same losses
            losses.append(loss.mean.double() * batches[position].num_targets)
            if loss.auxiliary is not None:
                auxiliaries.append(loss.auxiliary.double())

        self.executor.run(
            self._order,
            batches,
            step=step,
            loss_function=self._loss_function,
            scale_loss=scale_loss,
            on_output=keep_loss,
        )
        for placeholder in self._placeholders:
            (0.0 * placeholder).sum().backward()
        recorder = self.executor.recorder
        recorder.begin("reduce")
        self._sum_partial_gradients()
        self._exec_reduce_tied_grads()
        self._exec_reduce_grads()
        recorder.end()
        recorder.begin("optimizer")
        self._exec_optimizer_step()
        recorder.end()
        loss_sum = float(torch.stack(losses).sum()) if losses else 0.0
        auxiliary_sum = float(torch.stack(auxiliaries).sum()) if auxiliaries else 0.0
        return StepResult(
            loss_sum=loss_sum,
            auxiliary_sum=auxiliary_sum,
            num_auxiliary=len(auxiliaries),
            num_targets=num_targets,
            grad_norm=float(self._global_grad_norm),
            skipped=not self._step_applied,
        )

    def _do_sanity_check(self) -> None:
        """DeepSpeed refuses fp16 on processors without fast kernels for it; torch computes it on all of them."""
        if self._plan.device != "cpu":
            super()._do_sanity_check()

    def clip_fp32_gradients(self) -> None:
        """Clip by the norm over all stages. DeepSpeed's own counts only part of them under pipelines."""
        gradients = [
            parameter.grad
            for parameter in self.module.parameters()
            if parameter.grad is not None and not parameter.ds_pipe_replicated and self._counts_here(parameter)
        ]
        norms = torch.nn.utils.get_total_norm(gradients).to(self.device)
        squared = norms.double().square()
        recorder = self.executor.recorder
        recorder.end()  # of the optimizer's first part
        recorder.begin("norm")
        dist.all_reduce(squared, group=self.grid.get_model_parallel_group())
        recorder.end(waited=True)
        recorder.begin("optimizer")
        norm = squared.sqrt()
        self._global_grad_norm = norm
        if self.gradient_clipping() > 0.0:
            everything = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(everything, self.gradient_clipping(), norm.float())

    def _counts_here(self, parameter: torch.nn.Parameter) -> bool:
        """Whether the norm counts a parameter on this tensor shard: parts everywhere, whole ones on the first."""
        group = self.module.tensor_group
        return group is None or group.rank == 0 or hasattr(parameter, PART)

    def _take_model_step(self, lr_kwargs: dict | None) -> None:
        plain = not (self.fp16_enabled() or self.bfloat16_enabled() or self.zero_optimization())
        if plain and self.gradient_clipping() == 0.0:
            self.clip_fp32_gradients()  # for the norm alone
        super()._take_model_step(lr_kwargs)

    def _exec_reduce_tied_grads(self) -> None:
        """Sum the gradients of tied weights over their stages, also where a stage made none."""
        for weight, group in self.module.get_tied_weights_and_groups():
            if weight.requires_grad and dist.get_world_size(group) > 1:  # else both ends of a tie on one stage
                dist.all_reduce(self._gradient_of(weight), group=group)

    def _sum_partial_gradients(self) -> None:
        """Sum over the tensor shards the gradients of whole weights that work on the shard's heads alone."""
        group = self.module.tensor_group
        for parameter in self.module.parameters() if group is not None else ():
            if parameter.requires_grad and hasattr(parameter, PARTIAL_GRADIENT):
                group.sum(self._gradient_of(parameter))

    def _gradient_of(self, weight: torch.nn.Parameter) -> torch.Tensor:
        """What the backward passes of this step have summed for a parameter; zeros where they made nothing."""
        if self.using_bf16_optimizer:
            gradient = getattr(weight, "_hp_grad", None)
            assert gradient is not None, "a weight got no gradient"
            return gradient
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        return weight.grad

    def _exec_reduce_grads(self) -> None:
        """Average gradients over the replicas; a single replica has nothing to copy into buckets."""
        if self.dp_world_size > 1 or self.zero_optimization() or self.using_bf16_optimizer:
            super()._exec_reduce_grads()

    def _sum_over_replicas(self, value: int) -> int:
        if self.dp_world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(total, group=self.grid.get_data_parallel_group())
        return int(total)


def _add_placeholders(module: StageModule) -> list[torch.nn.Parameter]:
    """Parameters that learn nothing, where a stage has no matrix or no vector of its own that learns.

    DeepSpeed needs something to optimize and a gradient to take the norm of, and under ZeRO-1 all stages must have the
    same groups of parameters: the norm of each group is summed over them. Ties that other stages count do not help.
    """
    added = []
    device = next((parameter.device for parameter in module.parameters()), None)
    for name, shape in (("placeholder_matrix", (1, 1)), ("placeholder_vector", (1,))):
        own = [p for p in module.parameters() if p.requires_grad and not p.ds_pipe_replicated]
        if not any((parameter.dim() >= 2) == (len(shape) == 2) for parameter in own):
            parameter = torch.nn.Parameter(torch.zeros(shape, dtype=module.skeleton.dtype, device=device))
            parameter.ds_pipe_replicated = False  # type: ignore[attr-defined]
            module.register_parameter(name, parameter)
            added.append(parameter)
    return added
