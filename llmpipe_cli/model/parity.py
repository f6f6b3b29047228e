"""Whether a model cut into stages computes what the undivided one computes: tried on a tiny model of the same type.

A tiny random model runs whole, as transformers runs it, and as a pipeline of independent stages in one process. A stage
built here holds what a rank would hold: the skeleton on meta with copies of its own parameters only. Values cross the
boundaries detached and gradients are handed back by hand, as between processes. Loss and every gradient must agree.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.auto import model_class
from llmpipe_cli.model.initialise import initialise
from llmpipe_cli.model.skeleton import all_names, build_skeleton, replace_parameter
from llmpipe_cli.model.slicing import SlicePlan, StageReplay, trace_config
from llmpipe_cli.model.slicing.forward import forward_options
from llmpipe_cli.model.slicing.split import splittable
from llmpipe_cli.model.slicing.trace import NotSliceableError, trace_split
from llmpipe_cli.model.stage import make_real, stage_parameters
from llmpipe_cli.model.table import read_table
from llmpipe_cli.model.tiny import NUM_LABELS, VOCAB_SIZE, tiny_config

Status = Literal["pass", "refused", "untested", "differs"]

logger = logging.getLogger(__name__)

_IRRELEVANT_FLAGS = {"use_cache", "return_dict", "is_decoder"}  # set by the tasks and the slicer themselves
_MAX_PARAMETERS = 8_000_000
_TRACE_LEN, _BATCH, _LENGTH = 16, 3, 12  # another batch and another length than when the plan is made


@dataclass(frozen=True)
class Verdict:
    """What came of checking one architecture for one task.

    Attributes:
        status: `pass`: loss and gradients agree. `refused`: it cannot be cut, and a plan says so. `untested`: no tiny
            model of it could be built and run undivided. `differs`: it is cut and gives other numbers, or fails.
        reason: why it did not pass.
        attention: the implementation of attention that ran.
    """

    status: Status
    reason: str = ""
    attention: str = ""


def check_type(
    model_type: str,
    task: str,
    *,
    attn_implementation: str = "auto",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Verdict:
    """Check one architecture with every segment as a stage alone, on a padded batch.

    Args:
        model_type: a type that transformers registers for the task.
        task: the recipe's task.
        attn_implementation: as in a recipe.
        dtype: of the parameters.
        changes: fields of the config with other values than a tiny config has.
    """
    try:
        config = tiny_config(model_type, task, **changes)
        cls = model_class(config, task)
        size = sum(p.numel() for p in build_skeleton(cls, config).parameters())
        if size > _MAX_PARAMETERS:
            return Verdict("untested", f"its tiny config has {size:,} parameters")
        model = tiny_model(config, task, dtype=dtype, attn_implementation=attn_implementation)
        inputs = tiny_inputs(task, batch=_BATCH, sequence_len=_LENGTH)
        expected = run_whole(model, inputs)
        if not math.isfinite(expected.loss):
            return Verdict("untested", "the undivided tiny model has no finite loss")
    except Exception as error:  # config classes and models raise anything at values that do not fit
        return Verdict("untested", f"no tiny model runs: {_first_line(error)}")
    try:
        plan = trace_config(cls, config, task, sequence_len=_TRACE_LEN, attn_implementation=attn_implementation)
    except NotSliceableError as error:
        return Verdict("refused", error.message.partition("pipeline stages: ")[2])
    except UsageError as error:
        return Verdict("refused", error.message)
    try:
        found = Pipeline(model, plan, list(range(1, plan.num_segments))).run(inputs)
    except Exception as error:
        return Verdict("differs", f"a stage fails: {_first_line(error)}")
    reason = difference(found, expected, tolerance=1e-5 if dtype is torch.float32 else 2**-7)
    return Verdict("differs" if reason else "pass", reason or "", str(model.config._attn_implementation))


def require_parity(config: PreTrainedConfig, task: str, *, attn_implementation: str = "auto") -> None:
    """Make sure that a model of this config may be cut: by the table of architectures, else by a check here and now.

    A type that the table holds as passed, with this version of transformers and flags as they are by default, is not
    checked again. Any other runs as a tiny model with the config's own flags, in about a second. One whose tiny model
    cannot be built goes ahead with a warning: tracing it found no reason against it.

    Raises:
        NotSliceableError: cut into stages, a tiny model of the type gives other numbers than undivided.
    """
    task = "causal-lm" if task == "chat" else task
    flags = tuple(sorted(changed_flags(config).items()))
    table = read_table()
    known = table["transformers"] == transformers.__version__
    row = table["tasks"].get(task, {}).get(config.model_type) if known else None
    passed = row is not None and row["status"] == "pass"
    if passed and not flags:
        return
    verdict = _check_once(config.model_type, task, attn_implementation, flags)
    if verdict.status == "untested" and flags and not passed:
        verdict = _check_once(config.model_type, task, attn_implementation, ())
    if verdict.status == "differs":
        raise NotSliceableError(
            f"{config.model_type} cannot be cut into pipeline stages: on a tiny model, {verdict.reason}",
            hint="train it on one stage (parallel.pipeline: 1) or choose another architecture",
        )
    if verdict.status == "untested" and not passed:
        logger.warning("%s is untested as a pipeline for %s (%s)", config.model_type, task, verdict.reason)


@functools.lru_cache(maxsize=64)
def _check_once(model_type: str, task: str, attn_implementation: str, flags: tuple[tuple[str, bool], ...]) -> Verdict:
    changes: dict[str, Any] = dict(flags)
    with torch.random.fork_rng(devices=[]):
        return check_type(model_type, task, attn_implementation=attn_implementation, **changes)


def splits_alike(config: PreTrainedConfig, task: str, *, attn_implementation: str = "auto") -> bool:
    """Whether a model of this config may be cut inside its layers: by the table, else by `check_split` here and now."""
    task = "causal-lm" if task == "chat" else task
    flags = tuple(sorted(changed_flags(config).items()))
    table = read_table()
    row = table["tasks"].get(task, {}).get(config.model_type, {})
    if table["transformers"] == transformers.__version__ and not flags and "split" in row:
        return bool(row["split"])
    return _check_split_once(config.model_type, task, attn_implementation, flags)


@functools.lru_cache(maxsize=64)
def _check_split_once(
    model_type: str, task: str, attn_implementation: str, flags: tuple[tuple[str, bool], ...]
) -> bool:
    changes: dict[str, Any] = dict(flags)
    with torch.random.fork_rng(devices=[]):
        verdict = check_split(model_type, task, attn_implementation=attn_implementation, **changes)
    if verdict.status == "differs":
        logger.warning("%s is cut between layers only: on a tiny model cut inside them, %s", model_type, verdict.reason)
    return verdict.status == "pass"


def check_split(model_type: str, task: str, *, attn_implementation: str = "auto", **changes: Any) -> Verdict:
    """Check one architecture cut inside every layer that can be, each part a stage alone; arguments as `check_type`.

    `refused` means that it is cut between layers only.
    """
    try:
        config = tiny_config(model_type, task, **changes)
        cls = model_class(config, task)
        model = tiny_model(config, task, attn_implementation=attn_implementation)
        inputs = tiny_inputs(task, batch=_BATCH, sequence_len=_LENGTH)
        expected = run_whole(model, inputs)
        options: dict[str, Any] = {"sequence_len": _TRACE_LEN, "attn_implementation": attn_implementation}
        whole = trace_config(cls, config, task, **options)
        plan = trace_split(cls, config, task, whole, splittable(whole), **options)
    except Exception as error:  # as in `check_type`
        return Verdict("untested", _first_line(error))
    if plan is None:
        return Verdict("refused", "no place inside its layers is as cheap to cut at as between them")
    try:
        found = Pipeline(model, plan, list(range(1, plan.num_segments))).run(inputs)
    except Exception as error:
        return Verdict("differs", f"a stage fails: {_first_line(error)}")
    reason = difference(found, expected)
    return Verdict("differs" if reason else "pass", reason or "", str(model.config._attn_implementation))


def changed_flags(config: PreTrainedConfig) -> dict[str, bool]:
    """Fields of a config that say yes or no otherwise than by default, and change what the forward computes."""
    return {
        field.name: value
        for field in fields(config)
        if isinstance(field.default, bool)
        and isinstance(value := getattr(config, field.name, field.default), bool)
        and value != field.default
        and field.name not in _IRRELEVANT_FLAGS
    }


def _first_line(error: Exception) -> str:
    text = " ".join((str(error).strip() or type(error).__name__).split())
    return f"{type(error).__name__}: {text}"[:160]


def difference(found: Outcome, expected: Outcome, *, tolerance: float = 1e-5) -> str | None:
    """Where two outcomes differ; None if they agree.

    The loss must agree to a tenth of `tolerance` relative, each gradient to `tolerance` of its largest element.
    Gradients that are zero up to rounding (the bias of attention keys) are compared against the largest of all.
    """
    if not abs(float(found.loss - expected.loss)) <= tolerance / 10 * abs(float(expected.loss)):
        return f"the loss is {float(found.loss)}, undivided {float(expected.loss)}"
    sizes = {name: float(gradient.abs().amax()) for name, gradient in expected.gradients.items() if gradient.numel()}
    floor = tolerance / 10 * max(sizes.values())
    for name, size in sizes.items():
        if name not in found.gradients:
            if size > 0:
                return f"{name} has no gradient"
            continue
        distance = float((found.gradients[name] - expected.gradients[name]).abs().amax())
        if not distance <= tolerance * max(size, floor):
            return f"the gradient of {name} differs by {distance:.2e}, its largest element is {size:.2e}"
    for name in found.gradients.keys() - expected.gradients.keys():
        if bool(found.gradients[name].any()):
            return f"{name} has a gradient"
    return None


def tiny_inputs(task: str, *, batch: int = 2, sequence_len: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Random ids with three positions of padding at the end of the second sample, and labels."""
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> Tensor:
        return torch.randint(10, VOCAB_SIZE, shape, generator=generator)

    input_ids = ids(batch, sequence_len)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -3:] = 0
    if task in ("classification", "question-answering"):  # BART pools at the end of text, Longformer counts separators
        input_ids[:, [2, 5, 8]] = 2
    if task == "classification":
        labels = torch.randint(0, NUM_LABELS, (batch,), generator=generator)
    elif task == "token-classification":
        labels = torch.randint(0, NUM_LABELS, (batch, sequence_len), generator=generator)
        labels = labels.masked_fill(attention_mask == 0, -100)
    elif task == "question-answering":
        start = torch.randint(0, sequence_len - 4, (batch,), generator=generator)
        end = start + torch.randint(0, 4, (batch,), generator=generator)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "start_positions": start,
            "end_positions": end,
        }
    elif task == "translation":
        labels = ids(batch, sequence_len - 2)
    else:
        labels = input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def tiny_model(
    config: PreTrainedConfig,
    task: str,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "auto",
) -> PreTrainedModel:
    """The whole model with real weights, in training mode."""
    model = build_skeleton(model_class(config, task), config, dtype=dtype, attn_implementation=attn_implementation)
    groups = all_names(model)
    for names in groups.values():
        make_real(model, names, "cpu")
    initialise(model, groups, seed)
    return model


@dataclass
class Outcome:
    """Loss, logits and gradients by parameter name of one forward and backward pass."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]


def run_whole(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Outcome:
    """Forward and backward of the undivided model, as transformers does it."""
    model.zero_grad(set_to_none=True)
    output = model(**inputs, **forward_options(model, inputs))
    output.loss.backward()
    return Outcome(output.loss.detach(), _logits(output).detach(), _gradients([model]))


def _logits(output: Any) -> Tensor:
    """The output's logits; of question answering those of the span's start."""
    return output.logits if "logits" in output else output.start_logits


class Pipeline:
    """Independent stages of `model`, cut before the segments `cuts`."""

    def __init__(self, model: PreTrainedModel, plan: SlicePlan, cuts: list[int]) -> None:
        self.plan = plan
        bounds = [0, *cuts, plan.num_segments]
        self.models = [copy_stage(model, plan, start, stop) for start, stop in pairwise(bounds)]
        self.stages = [
            StageReplay(stage, plan, start, stop)
            for stage, start, stop in zip(self.models, bounds, bounds[1:], strict=False)
        ]

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        """The last stage's output, without gradients."""
        carry = None
        with torch.no_grad():
            for stage in self.stages:
                carry = stage(carry, inputs)
        return carry

    def run(self, inputs: dict[str, Tensor]) -> Outcome:
        """Forward and backward over all stages."""
        received: list[tuple[Tensor, ...]] = []
        sent: list[Any] = []
        for stage in self.stages:
            carry = self._receive(stage.start, sent[-1]) if sent else None
            received.append(carry or ())
            sent.append(stage(carry, inputs))
        output = sent[-1]
        output.loss.backward()
        for index in range(len(self.stages) - 2, -1, -1):
            pairs = [(t, r.grad) for t, r in zip(sent[index], received[index + 1], strict=True) if r.requires_grad]
            assert all(gradient is not None for _, gradient in pairs), "a carried tensor got no gradient"
            torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
        return Outcome(output.loss.detach(), _logits(output).detach(), _gradients(self.models))

    def _receive(self, boundary: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        without = self.plan.gradient_free(boundary)
        assert len(tensors) == self.plan.num_carried(boundary)
        assert all(tensor.is_contiguous() for tensor in tensors)
        return tuple(t.detach().clone().requires_grad_(i not in without) for i, t in enumerate(tensors))


def copy_stage(model: PreTrainedModel, plan: SlicePlan, start: int, stop: int) -> PreTrainedModel:
    """A skeleton with copies of `model`'s parameters of segments [start, stop), the rest on meta."""
    stage = build_skeleton(type(model), model.config, dtype=model.dtype)  # the config says which attention
    groups = all_names(stage)
    for name in [*stage_parameters(plan, range(start, stop)), *plan.replicated]:
        replace_parameter(stage, groups[name], nn.Parameter(model.get_parameter(name).detach().clone()))
    return stage.train(model.training)


def _gradients(models: list[PreTrainedModel]) -> dict[str, Tensor]:
    """Sum of all stages' gradients by parameter name."""
    gradients: dict[str, Tensor] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = gradients[name] + parameter.grad if name in gradients else parameter.grad.clone()
    return gradients
