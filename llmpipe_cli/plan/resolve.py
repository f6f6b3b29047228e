"""From a recipe to a plan: everything that needs the model's config or the machine is decided and checked here.

This runs where the command was typed, before any rank starts, and allocates nothing of the model's size.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmpipe_cli.data.prepared import PreparedData
from llmpipe_cli.engine.manifest import training_state
from llmpipe_cli.engine.schedules import Placement
from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.adapters import config_section, split_adapter
from llmpipe_cli.model.auto import load_config, model_class, resolve_weights
from llmpipe_cli.model.packing import require_block_attention
from llmpipe_cli.model.parity import require_parity
from llmpipe_cli.model.skeleton import build_skeleton
from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.model.slicing.trace import NotSliceableError, trace_config, whole_plan
from llmpipe_cli.model.tensor.apply import check_division
from llmpipe_cli.model.weights import weight_files
from llmpipe_cli.plan.cuts import choose_schedule_and_cut, split_as_listed, splitter
from llmpipe_cli.plan.layout import (
    choose_layout,
    choose_micro_batch_size,
    choose_zero_stage,
    is_roomy,
    placement_of,
)
from llmpipe_cli.plan.learning import choose_learning
from llmpipe_cli.plan.partition import balance_parts
from llmpipe_cli.plan.plan import Job, Plan, TrainingSettings
from llmpipe_cli.recipe.schema import ModelSection, Recipe, TrainSection

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from llmpipe_cli.cluster.devices import Devices

Device = Literal["cpu", "cuda"]


def make_plan(
    recipe: Recipe,
    data: PreparedData | None,
    *,
    job: Job = "train",
    device: Device,
    num_devices: int,
    checkpoint: Path | None = None,
    options: dict[str, Any] | None = None,
    roomy: bool = False,
) -> Plan:
    """Decide what runs where.

    Args:
        recipe: the recipe.
        data: its prepared data.
        job: train, bench, evaluate or generate.
        device: "cpu" or "cuda".
        num_devices: devices of this machine.
        checkpoint: train: the checkpoint to go on from; evaluate and generate: the model to use.
        options: options of an evaluate or generate job.
        roomy: `schedule: auto` may take schedules that keep more activations than 1F1B.

    Raises:
        UsageError: recipe, model and data do not fit; `where` is the recipe's dotted key.
        PreflightError: the machine has too few devices.
    """
    if job == "train":
        _check_trackers(recipe)
    given = recipe.model
    if checkpoint is not None and job == "train":
        recipe = _going_on(recipe, state := training_state(checkpoint))
        _check_stream(state["position"].get("stream"), data)
    if checkpoint is not None:
        given = given.model_copy(update={"config": None, "from_": str(checkpoint), "revision": None})
    section, adapter = split_adapter(given)
    config = _configured(recipe, section, adapter, data)
    cls = model_class(config, recipe.task)
    if data is not None and data.token_types and "token_type_ids" not in inspect.signature(cls.forward).parameters:
        data = data.model_copy(update={"token_types": False})  # DistilBERT reads pairs without them
    slice_plan = _sliced(recipe, section, cls, config, num_devices)
    if data is not None and data.block_attention:
        require_block_attention(config, attn_implementation=section.attn_implementation)
    weights = _weights(section)
    learning = choose_learning(recipe, job, cls, config, slice_plan, section, weights, adapter, resuming=checkpoint)
    slice_plan = learning.slice_plan
    layout = choose_layout(recipe, num_devices, device, slice_plan.num_segments)
    if layout.tensor > 1:
        check_division(build_skeleton(cls, config), layout.tensor)
    learns = job in ("train", "bench")
    if learns and layout.pipeline > 1:
        slice_plan = split_as_listed(recipe, layout.tensor, cls, config, slice_plan, learning.trainable)
    micro_batch_size, num_micro_batches = choose_micro_batch_size(recipe, layout)
    schedule, slice_plan = choose_schedule_and_cut(
        recipe,
        layout,
        slice_plan,
        num_micro_batches,
        roomy=roomy,
        split=splitter(recipe, job, layout, cls, config, slice_plan, learning.trainable),
    )
    # Evaluation and generation have nothing to gain from several parts a stage.
    placement = placement_of(recipe, layout, schedule) if learns else Placement(layout.pipeline)
    # What a recipe's partition counts are the parts of layers that training splits.
    counted = learns or not isinstance(recipe.parallel.split_layers, list)
    bounds = _partition(recipe, placement, slice_plan.flops(recipe.data.sequence_len), counted=counted)
    resolved = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"micro_batch_size": micro_batch_size})}
    )
    checkpointing = recipe.parallel.activation_checkpointing
    return Plan(
        job=job,
        name=recipe.name,
        recipe=resolved.model_dump(mode="json", by_alias=True),
        model_type=config.model_type,
        model_config_fields=json.loads(config.to_json_string(use_diff=False)),
        model_class=cls.__name__,
        weights=str(weights) if weights is not None else None,
        adapters=learning.adapters.to_json() if learning.adapters is not None else None,
        adapter_weights=str(adapter) if adapter is not None else None,
        trainable=learning.trainable,
        slice_plan=slice_plan.to_json(),
        layout=layout,
        partition=bounds,
        micro_batch_size=micro_batch_size,
        num_micro_batches=num_micro_batches,
        schedule=schedule,
        virtual_stages=placement.num_chunks,
        zero_stage=choose_zero_stage(recipe, layout),
        activation_checkpointing="none" if checkpointing == "auto" else checkpointing,
        device=device,
        data=data.model_dump(mode="json") if data is not None else None,
        training=_training(recipe.train, data, checkpoint) if learns else None,
        options=options or {},
    )


def _configured(
    recipe: Recipe, section: ModelSection, adapter: Path | None, data: PreparedData | None
) -> PreTrainedConfig:
    """The model's config, with the vocabulary, special tokens and labels of the data."""
    labels = data.label_names if data is not None else None
    config = load_config(
        config_section(section, adapter),
        recipe.task,
        num_labels=len(labels) if labels is not None else None,
        vocab_size=data.vocab_size if data is not None and data.tokenizer_dir is not None else None,
        pad_token_id=data.special_token_ids.get("pad") if data is not None else None,
        multi_label=data is not None and data.multi_label,
    )
    if data is not None and section.from_ is None:
        _set_special_tokens(config, section.config or {}, data.special_token_ids)
    if labels is not None:
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    return config


def _sliced(
    recipe: Recipe, section: ModelSection, cls: type[PreTrainedModel], config: PreTrainedConfig, num_devices: int
) -> SlicePlan:
    """The model's segments; the whole model as one where it cannot be cut and the recipe wants one stage.

    Raises:
        NotSliceableError: it cannot be cut, or not so that it computes the same, and the recipe wants stages.
    """
    length, attention, stages = recipe.data.sequence_len, section.attn_implementation, recipe.parallel.pipeline
    try:
        slice_plan = trace_config(cls, config, recipe.task, sequence_len=length, attn_implementation=attention)
        if stages != 1 and num_devices > 1:
            require_parity(config, recipe.task, attn_implementation=attention)
    except NotSliceableError:
        if stages != 1:
            raise
        slice_plan = whole_plan(cls, config)
    return slice_plan


def _weights(section: ModelSection) -> Path | None:
    """The directory of the weights to start from, whose files may be read; none from scratch."""
    if section.from_ is None:
        return None
    weights = resolve_weights(section)
    weight_files(weights, allow_pickle=section.allow_pickle)
    return weights


def make_plan_on(
    recipe: Recipe,
    data: PreparedData | None,
    devices: Devices,
    *,
    job: Job = "train",
    checkpoint: Path | None = None,
    options: dict[str, Any] | None = None,
) -> Plan:
    """`make_plan` for devices whose memory decides what `schedule: auto` may take; see there."""
    from llmpipe_cli.plan.forecast import fits
    from llmpipe_cli.plan.propose import machines_for

    def planned(roomy: bool) -> Plan:
        return make_plan(
            recipe,
            data,
            job=job,
            device=devices.kind,
            num_devices=devices.count,
            checkpoint=checkpoint,
            options=options,
            roomy=roomy,
        )

    if job not in ("train", "bench") or recipe.parallel.schedule != "auto":
        return planned(roomy=False)
    plan = planned(roomy=True)
    if not is_roomy(plan.schedule):
        return plan
    cluster = machines_for(plan, devices)
    return plan if cluster is not None and fits(plan, cluster) else planned(roomy=False)


def _set_special_tokens(config: Any, given: dict[str, Any], ids: dict[str, int]) -> None:
    """A model from scratch has the tokenizer's special tokens, unless the recipe says otherwise."""
    for name in ("bos", "eos", "pad"):
        if f"{name}_token_id" not in given:
            setattr(config, f"{name}_token_id", ids.get(name))
    if not config.is_encoder_decoder:
        return
    # BART's decoder begins with the end of text, T5's and Marian's with padding: as the family's own config has it.
    usual = type(config)()
    if not ids:  # synthetic rows, which no tokenizer made
        ids = {"pad": 0, "eos": 1}
        config.pad_token_id = given.get("pad_token_id", 0)
    usual_start = getattr(usual, "decoder_start_token_id", None)
    starts_with = "eos" if usual_start is not None and usual_start == usual.eos_token_id else "pad"
    for name, value in (("decoder_start", starts_with), ("forced_eos", "eos")):
        is_used = name == "decoder_start" or getattr(usual, f"{name}_token_id", None) is not None
        if f"{name}_token_id" not in given and is_used:
            setattr(config, f"{name}_token_id", ids.get(value, ids.get("eos")))


def _going_on(recipe: Recipe, saved: dict[str, Any]) -> Recipe:
    """The recipe for going on from a checkpoint: what decides the order of samples must stay as it was."""
    train = recipe.train
    for name in ("global_batch_size", "seed"):
        if getattr(train, name) != saved[name]:
            raise UsageError(
                f"the checkpoint was trained with {name} {saved[name]}, the recipe says {getattr(train, name)}: "
                "samples would be repeated or left out",
                where=f"train.{name}",
                hint=f"write {name}: {saved[name]}, or start a new training with `llmpipe finetune --from`",
            )
    if train.micro_batch_size != "auto":
        return recipe
    # Dropout and masking depend on the micro-batch: what auto once chose is kept on every layout.
    kept = train.model_copy(update={"micro_batch_size": saved["micro_batch_size"]})
    return recipe.model_copy(update={"train": kept})


def _check_stream(saved: dict[str, Any] | None, data: PreparedData | None) -> None:
    """A place in a stream is a place in that stream alone."""
    if saved is None or data is None or data.train is None or saved["fingerprint"] == data.train.fingerprint:
        return
    raise UsageError(
        "the checkpoint keeps its place in another stream than this one",
        where="data.train",
        hint="leave source, tokenizer, sequence_len and shuffle_buffer as they were, or start a new training with "
        "`llmpipe finetune --from`",
    )


def _partition(recipe: Recipe, placement: Placement, costs: list[float], *, counted: bool) -> list[int]:
    """Bounds of the parts: the recipe's if `counted` says that its partition is for these segments, else balanced."""
    counts = recipe.parallel.partition
    if isinstance(counts, str) or placement.num_chunks != recipe.parallel.num_chunks or not counted:
        return balance_parts(costs, placement)
    if len(counts) != placement.num_parts or sum(counts) != len(costs):
        what = "parts" if placement.num_chunks > 1 else "stages"
        raise UsageError(
            f"partition {counts} gives {len(counts)} {what} with {sum(counts)} layers; the layout has "
            f"{placement.num_parts} {what} and the model {len(costs)} layers, embedding and head counted",
            where="parallel.partition",
            hint=f"leave it at auto, or write one number for each of the {what} that add up to the model's layers",
        )
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    return bounds


def _training(train: TrainSection, data: PreparedData | None, resume_from: Path | None) -> TrainingSettings:
    if data is None or data.train is None:
        raise UsageError(
            "there is no training data", where="data.train", hint="add data.train, for example {files: ...}"
        )
    steps_per_epoch = data.train.num_samples / train.global_batch_size
    if train.max_steps is not None:
        max_steps = train.max_steps
    elif train.num_train_epochs is not None:
        max_steps = max(1, math.ceil(train.num_train_epochs * steps_per_epoch))
    else:
        raise UsageError(
            "neither max_steps nor num_train_epochs is given", where="train", hint="add max_steps: 1000, for example"
        )
    warmup = train.warmup_steps if train.warmup_steps is not None else math.ceil(train.warmup_ratio * max_steps)
    return TrainingSettings(
        max_steps=max_steps,
        warmup_steps=warmup,
        steps_per_epoch=steps_per_epoch,
        resume_from=str(resume_from) if resume_from is not None else None,
    )


def _check_trackers(recipe: Recipe) -> None:
    for name in recipe.report_to:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"`report_to: {name}` needs the package {name}, which is not installed",
                where="report_to",
                hint=f"pip install 'llmpipe_cli[{name}]', or leave `{name}` out",
            )
