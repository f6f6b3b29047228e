"""Small training jobs for tests: recipe -> data -> plan -> run directory, and a plain Hugging Face reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import get_scheduler

from llmpipe_cli.data.batches import BatchPlan
from llmpipe_cli.data.dataset import open_split
from llmpipe_cli.data.prepare import prepare
from llmpipe_cli.data.prepared import PreparedData
from llmpipe_cli.model.adapters import Adapters
from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.model.stage import build_stage
from llmpipe_cli.plan.plan import Plan
from llmpipe_cli.plan.resolve import make_plan
from llmpipe_cli.recipe.schema import Recipe
from llmpipe_cli.run import RunDirectory, read_metrics
from llmpipe_cli.tasks.registry import get_task
from llmpipe_cli.worker.process import config_from_fields


class Job:
    """One recipe with prepared data, to be run at several layouts.

    Args:
        folder: where cache and runs go.
        values: the recipe.
    """

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        self.folder, self.values = folder, values
        self.data = prepare(Recipe.model_validate(values), folder, folder / "cache")

    def recipe(self, **changes: Any) -> Recipe:
        """The recipe with dotted fields changed (`parallel__pipeline=2`)."""
        values = {key: dict(value) if isinstance(value, dict) else value for key, value in self.values.items()}
        for name, value in changes.items():
            section, _, field = name.partition("__")
            if field:
                values.setdefault(section, {})[field] = value
            else:
                values[section] = value
        return Recipe.model_validate(values)

    def plan(self, *, resume: Path | None = None, job: str = "train", **changes: Any) -> Plan:
        recipe = self.recipe(**changes)
        return make_plan(recipe, self.data, job=job, device="cpu", num_devices=4, checkpoint=resume)

    def start(self, plan: Plan) -> RunDirectory:
        """A run directory that is ready for the ranks."""
        run = RunDirectory.create(self.folder / "runs", plan.name)
        plan.save(run.plan)
        return run

    def train(self, pool: Any, *, resume: Path | None = None, **changes: Any) -> RunDirectory:
        """Train on real ranks; fails unless all of them end well."""
        plan = self.plan(resume=resume, **changes)
        run = self.start(plan)
        pool.run_well(run, plan.layout.num_ranks)
        return run


def steps(run: RunDirectory) -> list[dict[str, Any]]:
    """The step lines of a run's metrics."""
    return [line for line in read_metrics(run.metrics) if "event" not in line]


def losses(run: RunDirectory) -> list[float]:
    return [line["loss"] for line in steps(run)]


def final_weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    """All weights of the run's last checkpoint."""
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = {}
    for path in sorted((run.checkpoints / "latest").glob("model*.safetensors")):
        weights.update(load_file(path))
    return weights


def full_model(plan: Plan) -> transformers.PreTrainedModel:
    """The plan's model as training starts from it, whole, in this process."""
    slice_plan = SlicePlan.from_json(plan.slice_plan)
    model = build_stage(
        getattr(transformers, plan.model_class),
        config_from_fields(plan),
        slice_plan,
        range(slice_plan.num_segments),
        seed=plan.recipe["train"]["seed"],
        weights=plan.weights,
        adapters=Adapters.from_json(plan.adapters) if plan.adapters is not None else None,
        adapter_weights=plan.adapter_weights,
        trainable=plan.trainable,
    )
    return model.train()


def train_plain(
    plan: Plan, model: torch.nn.Module | None = None
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Train as a short Hugging Face script would: one process, the whole model, no DeepSpeed.

    Args:
        plan: what to train.
        model: the model in training mode, when it is not the plan's own from scratch.

    Returns:
        Loss of each step, gradient norm of each step, and the final weights.
    """
    recipe, settings = Recipe.model_validate(plan.recipe), plan.training
    assert settings is not None
    data = PreparedData.model_validate(plan.data)
    assert data.train is not None
    task, model = get_task(data), model or full_model(plan)
    batches = BatchPlan(
        open_split(data.train),
        task,
        global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        seed=recipe.train.seed,
        shuffle=recipe.data.shuffle,
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": recipe.train.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    cls = torch.optim.SGD if recipe.train.optimizer == "sgd" else torch.optim.AdamW
    optimizer = cls(groups, lr=recipe.train.learning_rate)
    scheduler = get_scheduler(recipe.train.lr_scheduler_type, optimizer, settings.warmup_steps, settings.max_steps)
    all_losses, norms = [], []
    for step in range(settings.max_steps):
        micro_batches = [batches.micro_batch(step, index) for index in range(batches.num_micro_batches)]
        counts = [task.num_targets(batch) for batch in micro_batches]
        total = 0.0
        for batch, count in zip(micro_batches, counts, strict=True):
            output = model(**batch)
            loss = output.loss
            if getattr(output, "aux_loss", None) is not None:  # of a mixture's routers: a mean over micro-batches
                auxiliary = model.config.router_aux_loss_coef * output.aux_loss
                (auxiliary / len(micro_batches)).backward(retain_graph=True)
                loss = loss - auxiliary
            loss = loss * (count / sum(counts))
            loss.backward()
            total += loss.item()
        limit = recipe.train.max_grad_norm or math.inf
        norms.append(torch.nn.utils.clip_grad_norm_(trainable, limit).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        all_losses.append(total)
    return all_losses, norms, {name: p.detach() for name, p in model.named_parameters()}
