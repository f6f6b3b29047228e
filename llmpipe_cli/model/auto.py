"""From the recipe's model section to a transformers config, a model class and inputs to trace it with."""

from __future__ import annotations

import difflib
import logging
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmpipe_cli import hub
from llmpipe_cli.errors import UsageError
from llmpipe_cli.recipe.schema import ModelSection

logger = logging.getLogger(__name__)

_AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "chat": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "translation": "AutoModelForSeq2SeqLM",
    "question-answering": "AutoModelForQuestionAnswering",
    "token-classification": "AutoModelForTokenClassification",
}


def load_config(
    section: ModelSection,
    task: str,
    *,
    num_labels: int | None = None,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    multi_label: bool = False,
) -> PreTrainedConfig:
    """The transformers config that the recipe asks for.

    `model.config` is taken as it is; beside `model.from` it changes single fields of that model's config. LayerDrop is
    always off: a stage cannot leave out layers that another stage waits for.

    Args:
        section: the recipe's model section.
        task: the recipe's task.
        num_labels: classes of a classification task.
        vocab_size: size of a trained tokenizer, used where `model.config` gives none.
        pad_token_id: the tokenizer's, used where the config has none.
        multi_label: a text has any number of classes.

    Raises:
        UsageError: unknown model type or field, an unreadable model, a field of the wrong type, a vocabulary smaller
            than the tokenizer's.
    """
    if section.from_ is not None:
        config = _pretrained_config(section)
        for name, value in (section.config or {}).items():
            if name != "model_type":
                _check_field(type(config), config.model_type, name)
                setattr(config, name, value)
    elif section.config is not None:
        config = _scratch_config(dict(section.config), vocab_size)
    else:
        hint = "give model.config with a model_type, or model.from"
        raise UsageError("the recipe names no model", where="model", hint=hint)

    if getattr(config, "quantization_config", None) is not None:
        hint = "take the unquantised model"
        raise UsageError("quantised checkpoints are neither trained nor run here", where="model.from", hint=hint)
    config = own_config(config, task)
    text_config = config.get_text_config()
    known_size = getattr(text_config, "vocab_size", None)
    if vocab_size is not None and known_size is not None and known_size < vocab_size:
        raise UsageError(
            f"the tokenizer has {vocab_size} entries, the model's vocab_size is {known_size}",
            where="model",
            hint=f"set model.config.vocab_size to at least {vocab_size}",
        )
    if pad_token_id is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_token_id
    if num_labels is not None:
        config.num_labels = num_labels
        if task == "classification":
            config.problem_type = "multi_label_classification" if multi_label else "single_label_classification"
    if task in ("causal-lm", "chat") and getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        config.is_decoder = True  # BERT and its kin look at both sides otherwise
    if task == "translation" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0  # as T5 was trained
    if task == "token-classification" and section.dropout is not None:
        config.classifier_dropout = section.dropout  # decoders take 0.1 where their config has no such field
    _set_dropout(config, section.dropout)
    return config


def _scratch_config(values: dict[str, Any], vocab_size: int | None) -> PreTrainedConfig:
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise UsageError("model.config has no model_type", where="model.config", hint="for example model_type: llama")
    if model_type not in CONFIG_MAPPING:
        raise UsageError(
            f"transformers {transformers.__version__} knows no model type {model_type!r}",
            where="model.config.model_type",
            hint=_did_you_mean(str(model_type), list(CONFIG_MAPPING.keys())),
        )
    cls = CONFIG_MAPPING[model_type]
    for name in values:
        _check_field(cls, model_type, name)
    if vocab_size is not None and "vocab_size" in _field_names(cls):
        values.setdefault("vocab_size", vocab_size)
    try:
        return cls(**values)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"not a valid {model_type} config: {reason}", where="model.config") from error
    except Exception as error:  # huggingface_hub's validation errors share no base class with the standard ones
        reason = " ".join(str(error).split())
        raise UsageError(f"not a valid {model_type} config: {reason}", where="model.config") from error


def _pretrained_config(section: ModelSection) -> PreTrainedConfig:
    assert section.from_ is not None
    no_network = hub.expect(section.from_)
    try:
        return AutoConfig.from_pretrained(section.from_, revision=section.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"the config of {section.from_} cannot be read: {reason}",
            where="model.from",
            hint=f"{no_network}name a folder with config.json, a run, or a hub id such as openai-community/gpt2",
        ) from error


def resolve_weights(section: ModelSection) -> Path:
    """Folder with the weights of `model.from`; a hub id is downloaded first.

    Raises:
        UsageError: neither a folder nor a hub id that can be downloaded.
    """
    assert section.from_ is not None
    if Path(section.from_).is_dir():
        return Path(section.from_)
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json"]
    if section.allow_pickle:
        patterns += ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
    no_network = hub.expect(section.from_)
    try:
        return Path(snapshot_download(section.from_, revision=section.revision, allow_patterns=patterns))
    except Exception as error:  # the hub raises many kinds, all of which mean that the weights are not there
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"{section.from_} cannot be downloaded: {reason}", hint=f"{no_network}name a local folder instead"
        ) from error


def _field_names(cls: type[PreTrainedConfig]) -> set[str]:
    """All fields that a config class understands, under any of their names."""
    names = set(cls.attribute_map) | {"num_labels", "id2label", "label2id", "tie_word_embeddings", "is_decoder"}
    if is_dataclass(cls):
        names |= {field.name for field in fields(cls)}
    return names | {"num_hidden_layers", "hidden_size"} & set(cls.attribute_map)


def _check_field(cls: type[PreTrainedConfig], model_type: str, name: str) -> None:
    known = _field_names(cls)
    if name not in known:
        raise UsageError(
            f"{model_type} has no config field {name!r}",
            where=f"model.config.{name}",
            hint=_did_you_mean(name, sorted(known)),
        )


def _did_you_mean(name: str, known: list[str]) -> str | None:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else None


def _set_dropout(config: PreTrainedConfig, dropout: float | None) -> None:
    """Set all dropout probabilities of a config and of those inside it, and turn LayerDrop off."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _set_dropout(value, dropout)
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        elif "layerdrop" in name or "layer_drop" in name:
            if value:
                logger.warning("%s is %s in the model's config; pipeline stages keep all layers: set to 0", name, value)
                setattr(config, name, 0.0)
        elif dropout is not None and _is_dropout(name):
            setattr(config, name, float(dropout))


def _is_dropout(name: str) -> bool:
    return "dropout" in name or name.endswith(("_pdrop", "_drop"))


def model_class(config: PreTrainedConfig, task: str) -> type[PreTrainedModel]:
    """The transformers class that has the config's architecture and the task's head.

    Raises:
        UsageError: the architecture has no such head in transformers.
    """
    auto_name = _AUTO_CLASSES[task]
    auto_class = getattr(transformers, auto_name)
    remote = (getattr(config, "auto_map", None) or {}).get(auto_name)
    if type(config) not in auto_class._model_mapping and remote is not None:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(remote, config._name_or_path)
    if type(config) not in auto_class._model_mapping:
        able = [
            task for task, name in _AUTO_CLASSES.items() if type(config) in getattr(transformers, name)._model_mapping
        ]
        raise UsageError(
            f"transformers has no {config.model_type} model for task {task}",
            where="task",
            hint=f"{config.model_type} can do: {', '.join(able)}" if able else None,
        )
    found = auto_class._model_mapping[type(config)]
    return found[0] if isinstance(found, (list, tuple)) else found


def own_config(config: PreTrainedConfig, task: str) -> PreTrainedConfig:
    """The config that the task's class is built from: the text part where transformers' own auto class takes that.

    Composite configs (Llama 4, Qwen 3.5) are registered for a class that models text alone.
    """
    text_class = (getattr(config, "sub_configs", None) or {}).get("text_config")
    if text_class is not None and getattr(model_class(config, task), "config_class", None) is text_class:
        return config.get_text_config()
    return config


def example_inputs(
    config: PreTrainedConfig, task: str, batch: int, sequence_len: int, *, seed: int = 0
) -> dict[str, Tensor]:
    """Random token ids, a mask of ones and labels, as the task's batches have them; int64."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = int(getattr(config.get_text_config(), "vocab_size", None) or 256)  # CANINE reads characters
    num_labels = int(getattr(config, "num_labels", 2) or 2)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    input_ids = _without_special(config, draw(vocab_size, batch, sequence_len), vocab_size)
    inputs = {"input_ids": input_ids}
    if task not in ("causal-lm",):
        inputs["attention_mask"] = torch.ones_like(input_ids)
    if task in ("causal-lm", "chat", "masked-lm"):
        inputs["labels"] = input_ids.clone()
    elif task == "classification" and config.problem_type == "multi_label_classification":
        inputs["labels"] = draw(2, batch, num_labels).float()
    elif task == "classification":
        inputs["labels"] = draw(num_labels, batch)
    elif task == "token-classification":
        inputs["labels"] = draw(num_labels, batch, sequence_len)
    elif task == "translation":
        inputs["labels"] = _without_special(config, draw(vocab_size, batch, sequence_len), vocab_size)
    else:
        separator = getattr(config, "sep_token_id", None)
        if isinstance(separator, int) and sequence_len >= 3:  # Longformer finds the question by its three separators
            input_ids[:, [1, sequence_len // 2, sequence_len - 1]] = separator
        inputs["start_positions"] = draw(sequence_len, batch)
        inputs["end_positions"] = draw(sequence_len, batch)
    return inputs


def _without_special(config: PreTrainedConfig, ids: Tensor, vocab_size: int) -> Tensor:
    """Replace padding and other special ids, which some models count, and end each row with one end-of-text id."""
    special = set()
    for source in (config, config.get_text_config()):
        for name, value in vars(source).items():
            if name.endswith("_token_id"):
                special |= set(value) if isinstance(value, (list, tuple)) else {value}
    ordinary = next((token for token in range(vocab_size) if token not in special), 0)
    for token in special - {None}:
        ids = ids.masked_fill(ids == token, ordinary)
    end = getattr(config, "eos_token_id", None)
    if config.is_encoder_decoder and isinstance(end, int) and end < vocab_size:
        ids[:, -1] = end
    return ids
