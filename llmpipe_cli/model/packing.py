"""Whether tokens of a packed row can be kept to their own document: tried on a tiny model of the same type.

Packed rows come without an attention mask and with position ids that begin at 0 with each document. transformers finds
the documents in them and lets no token attend to another one, whichever attention implementation runs. Not every
architecture reads position ids in this way (convolutions, recurrent states and ALiBi run on), and no signature tells,
so the result is compared: logits of a packed row with those of its documents one by one.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.auto import model_class
from llmpipe_cli.model.parity import Pipeline, changed_flags, tiny_inputs, tiny_model
from llmpipe_cli.model.slicing import trace_config
from llmpipe_cli.model.slicing.forward import forward_options
from llmpipe_cli.model.slicing.trace import NotSliceableError
from llmpipe_cli.model.tiny import tiny_config

_DOCUMENTS = ((5, 4, 3), (7, 5))  # lengths, a row each
_TOLERANCE = 1e-5


def require_block_attention(config: PreTrainedConfig, *, attn_implementation: str = "auto") -> None:
    """Make sure that a causal model of this config keeps the documents of a packed row apart.

    Raises:
        UsageError: it does not, or no tiny model of the type can be tried.
    """
    reason = packed_difference(config.model_type, attn_implementation, tuple(sorted(changed_flags(config).items())))
    if reason is not None:
        raise UsageError(
            f"{config.model_type} cannot keep the documents of a packed sample apart: {reason}",
            where="data.block_attention",
            hint="write block_attention: false, so that tokens attend to earlier documents too, or packing: false",
        )


@functools.lru_cache(maxsize=64)
def packed_difference(
    model_type: str, attn_implementation: str = "auto", flags: tuple[tuple[str, bool], ...] = ()
) -> str | None:
    """Why packed documents give other logits than single ones; None if they give the same, cut into stages too."""
    if attn_implementation.startswith("flash") and not torch.cuda.is_available():
        attn_implementation = "sdpa"  # the same position ids decide
    with torch.random.fork_rng(devices=[]):
        try:
            config = tiny_config(model_type, "causal-lm", **dict(flags))
            model = tiny_model(config, "causal-lm", attn_implementation=attn_implementation)
        except Exception as error:  # config classes and models raise anything at values that do not fit
            return f"no tiny model of it runs ({type(error).__name__})"
        if not _takes_positions(model):
            return "its forward takes no position_ids"
        ids = tiny_inputs("causal-lm", sequence_len=12)["input_ids"]
        positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in _DOCUMENTS])
        inputs = {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
        try:
            with torch.no_grad():
                expected = _one_by_one(model, ids)
                found = model(**inputs, **forward_options(model, inputs)).logits
            if (reason := _difference(found, expected)) is not None:
                return reason
            plan = trace_config(model_class(config, "causal-lm"), config, "causal-lm")
            cut = Pipeline(model, plan, list(range(1, plan.num_segments))).forward(inputs).logits
        except NotSliceableError:
            return None  # one stage runs it whole
        except Exception as error:  # as above
            return f"its forward fails ({type(error).__name__})"
        return _difference(cut, expected)


def _takes_positions(model: PreTrainedModel) -> bool:
    accepted = dict(inspect.signature(model.forward).parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        accepted |= inspect.signature(model.base_model.forward).parameters
    return "position_ids" in accepted


def _one_by_one(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of each document alone, put together as they lie in the rows, [rows, length, vocabulary]."""
    rows = []
    for row, lengths in zip(ids, _DOCUMENTS, strict=True):
        pieces = [{"input_ids": piece[None]} for piece in row.split(lengths)]
        rows.append(torch.cat([model(**piece, **forward_options(model, piece)).logits[0] for piece in pieces]))
    return torch.stack(rows)


def _difference(found: Tensor, expected: Tensor) -> str | None:
    distance, size = (found - expected).abs().amax().item(), expected.abs().amax().item()
    if distance <= _TOLERANCE * max(size, 1.0):
        return None
    return f"on a tiny model, logits differ by {distance:.1e} from those of the documents one by one"
