"""Finding the slice plan of a model from one forward pass.

The pass runs HF's own forward with hooks (`forward`), on real parameters or on parameters without values (`recorder`).
What crosses each cut is read from its autograd graph (`walk`), and put together into the plan (`assemble`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.auto import example_inputs
from llmpipe_cli.model.skeleton import all_names, build_skeleton, replace_parameter
from llmpipe_cli.model.slicing.assemble import assemble_plan
from llmpipe_cli.model.slicing.cuts import find_glue, find_layers
from llmpipe_cli.model.slicing.forward import run_forward
from llmpipe_cli.model.slicing.plan import Segment, SlicePlan
from llmpipe_cli.model.slicing.split import assemble_split
from llmpipe_cli.model.slicing.walk import cut_segments

logger = logging.getLogger(__name__)

_TRACE_LEN = 16
_MAX_COUNTED_LEN = 128  # counting operations at greater lengths changes nothing and takes long in recurrent models
_MAX_REAL_ELEMENTS = 2**25


class NotSliceableError(UsageError):
    """The model cannot be cut into stages; it can still be trained on one."""


def trace(model: PreTrainedModel, inputs: dict[str, Any]) -> SlicePlan:
    """Find the slice plan of a model.

    The parameters of `model` may be real or on the meta device; buffers must be real.

    Args:
        model: a transformers model with a head that computes a loss.
        inputs: keyword arguments of its forward, labels among them; int64 [batch, sequence_len] each (of a decoder
            alone, all but the encoder's outputs).

    Raises:
        NotSliceableError: the model cannot be sliced; the message says why.
    """
    model_type = model.config.model_type
    try:
        return assemble_plan(model, run_forward(model, inputs))
    except UsageError as error:
        raise NotSliceableError(
            f"{type(model).__name__} ({model_type}) cannot be cut into pipeline stages: {error.message}",
            hint=error.hint or "train it on one stage (parallel.pipeline: 1) or choose another architecture",
        ) from error


def trace_config(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    task: str,
    *,
    sequence_len: int | None = None,
    attn_implementation: str = "auto",
) -> SlicePlan:
    """Find the slice plan of a model that is too large to build, from its config.

    The forward runs on parameters without values (see `recorder`); nothing of the model's size is allocated. Where a
    model's forward cannot do without values, it runs on parameters that are all one single zero in memory.

    Args:
        cls: the model class.
        config: its config.
        task: decides the example inputs.
        sequence_len: tokens a sample, None if not known. Operations are counted near it, at 128 at most; other lengths
            follow from that.
        attn_implementation: as in the recipe; flash attention is traced as sdpa.

    Raises:
        NotSliceableError: the model cannot be sliced; the message says why.
        UsageError: its forward fails, or it is made for shorter sequences.
    """
    attention = "sdpa" if attn_implementation.startswith("flash") else attn_implementation
    model = build_skeleton(cls, config, attn_implementation=attention)
    if sequence_len is not None:
        _check_length(model, sequence_len)
    plan = _trace_skeleton(model, example_inputs(config, task, 2, min(_TRACE_LEN, _max_positions(config))))
    return _count_operations(model, plan, config, task, _counted_len(config, sequence_len))


def trace_split(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    task: str,
    plan: SlicePlan,
    layers: Collection[str],
    *,
    sequence_len: int | None = None,
    attn_implementation: str = "auto",
) -> SlicePlan | None:
    """The slice plan of a model in which some layers are several segments; None if none of them can be cut inside.

    Args:
        plan: its plan with whole layers, as `trace_config` finds it with the same other arguments.
        layers: layers to split, of those that `split.splittable` names.
    """
    attention = "sdpa" if attn_implementation.startswith("flash") else attn_implementation
    model = build_skeleton(cls, config, attn_implementation=attention)
    inputs = example_inputs(config, task, 2, min(_TRACE_LEN, _max_positions(config)))
    try:
        found = assemble_split(model, inputs, plan, layers)
    except Exception as error:  # model code can fail in any way when values are missing; whole layers remain
        logger.info("%s is cut between layers only: %s", cls.__name__, error)
        return None
    if found is None:
        return None
    return _count_operations(model, found, config, task, _counted_len(config, sequence_len))


def trace_decoder(cls: type[PreTrainedModel], config: PreTrainedConfig) -> SlicePlan:
    """The slice plan of an encoder-decoder model's decoder, given what the encoder made as an input.

    Its segments are "pre" (the decoder's embedding), the decoder's layers and "post": those of the whole model's plan
    from "mid" on.

    Raises:
        NotSliceableError, UsageError: as `trace_config`.
    """
    model = build_skeleton(cls, config)
    inputs: dict[str, Any] = example_inputs(config, "translation", 2, min(_TRACE_LEN, _max_positions(config)))
    ids = inputs.pop("input_ids")
    width = config.get_text_config(encoder=True).hidden_size
    states = torch.zeros(*ids.shape, width, dtype=model.dtype)
    outputs = BaseModelOutput(last_hidden_state=states)
    return _trace_skeleton(model, {"decoder_input_ids": ids, **inputs, "encoder_outputs": outputs})


def _trace_skeleton(model: PreTrainedModel, inputs: dict[str, Any]) -> SlicePlan:
    """`trace` on parameters without values; where the forward cannot do without, on zeros."""
    try:
        return trace(model, inputs)
    except UsageError:
        raise
    except Exception as error:  # model code can fail in any way when values are missing
        name = type(model).__name__
        logger.info("tracing %s without values failed (%s); using zeros", name, error)
        _fill_with_zeros(model)
        try:
            return trace(model, inputs)
        except UsageError:
            raise
        except Exception as second:
            reason = " ".join(str(second).split())
            raise UsageError(f"the forward of {name} fails: {type(second).__name__}: {reason}") from second


def whole_plan(cls: type[PreTrainedModel], config: PreTrainedConfig) -> SlicePlan:
    """The plan of a model that is not cut: one segment with everything, for one stage.

    Works for every model. Activation checkpointing has no layers to act on; operations are estimated from the weights.
    """
    model = build_skeleton(cls, config)
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    saved = set(model.state_dict())
    num_parameters = sum(parameters.values())
    return SlicePlan(
        model_type=config.model_type,
        segments=(Segment("model", "pre", tuple(parameters), num_parameters, flops_per_token=2.0 * num_parameters),),
        boundaries=(),
        calls=(),
        sides=(),
        layers=(),
        ties={name: names[1:] for name, names in all_names(model).items() if len(names) > 1},
        buffers={name: 0 for name, _ in model.named_buffers() if name in saved},
    )


def _check_length(model: nn.Module, sequence_len: int) -> None:
    """A table of positions cannot be read beyond its end."""
    for name, module in find_glue(model, find_layers(model)).items():
        own_name = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in own_name or own_name == "wpe"):
            reserved = module.padding_idx + 1 if module.padding_idx is not None else int(getattr(module, "offset", 0))
            positions = module.num_embeddings - reserved
            if sequence_len > positions:
                raise UsageError(
                    f"sequences of {sequence_len} tokens are longer than the model's {positions} positions",
                    hint=f"set data.sequence_len to {positions} at most, or raise it in model.config",
                )


def _max_positions(config: PreTrainedConfig) -> int:
    """The longest sequence that the model accepts."""
    text_config = config.get_text_config()
    lengths = [getattr(text_config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx")]
    # two less than stated: RoBERTa's positions begin after the padding id
    return max(min((length for length in lengths if isinstance(length, int) and length > 0), default=2**16) - 2, 4)


def _counted_len(config: PreTrainedConfig, sequence_len: int | None) -> int:
    """The length near which operations are counted."""
    return min(sequence_len or _MAX_COUNTED_LEN, _MAX_COUNTED_LEN, _max_positions(config))


def _fill_with_zeros(model: nn.Module) -> None:
    """Give every parameter zeros: a small model real ones, a large model one zero in memory for each parameter."""
    small = sum(parameter.numel() for parameter in model.parameters()) <= _MAX_REAL_ELEMENTS
    for name, aliases in all_names(model).items():
        meta = model.get_parameter(name)
        zeros = torch.zeros(meta.shape if small else (), dtype=meta.dtype).expand(meta.shape)
        replace_parameter(model, aliases, nn.Parameter(zeros, requires_grad=meta.requires_grad))


def _count_operations(
    model: PreTrainedModel, plan: SlicePlan, config: PreTrainedConfig, task: str, sequence_len: int
) -> SlicePlan:
    """Count each segment's operations at two lengths, and split them into a part a token and a part a token squared."""
    long = max(sequence_len, 4)
    short = long // 2
    segments = []
    at_short = _operations(model, plan, example_inputs(config, task, 1, short))
    at_long = _operations(model, plan, example_inputs(config, task, 1, long))
    for segment, few, many in zip(plan.segments, at_short, at_long, strict=True):
        squared = max((many / long - few / short) / (long - short), 0.0)
        per_token = max(many / long - squared * long, 0.0)
        segments.append(replace(segment, flops_per_token=per_token, flops_per_token_squared=squared))
    return replace(plan, segments=tuple(segments))


def _operations(model: PreTrainedModel, plan: SlicePlan, inputs: dict[str, Tensor]) -> list[float]:
    """Operations of each segment in one forward."""
    try:
        seen = run_forward(model, inputs, split=plan.split)
    except Exception:  # as above; an estimate is enough
        num_tokens = next(iter(inputs.values())).numel()
        return [2.0 * segment.num_parameters * num_tokens for segment in plan.segments]
    return [
        sum(seen.recorder.flops.get(place, 0.0) for place in cut.places)
        for cut in cut_segments(seen.calls, plan.starts)
    ]
