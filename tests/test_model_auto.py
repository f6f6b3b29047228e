"""From the recipe's model section to a config and a class; what is wrong with it is told with a suggestion."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model

from llmpipe_cli import hub
from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.auto import example_inputs, load_config, model_class, resolve_weights
from llmpipe_cli.recipe.schema import ModelSection


def section(**values: Any) -> ModelSection:
    return ModelSection.model_validate(values)


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        ({"hidden_size": 8}, "no model_type", "model_type: llama"),
        ({"model_type": "lama"}, "knows no model type 'lama'", "did you mean llama"),
        (
            {"model_type": "llama", "hiden_size": 8},
            "llama has no config field 'hiden_size'",
            "did you mean hidden_size",
        ),
        ({"model_type": "gpt2", "n_layers": 2}, "gpt2 has no config field 'n_layers'", "n_layer"),
        ({"model_type": "llama", "hidden_size": "wide"}, "not a valid llama config", None),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "not a valid llama config", None),
    ],
)
def test_mistakes_in_a_config(config: dict[str, Any], message: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(section(config=config), "causal-lm")
    assert message in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")


def test_without_a_network_only_downloaded_files_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unknown(*question: object, **_: object) -> None:
        asked.append(question)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    monkeypatch.setattr("llmpipe_cli.hub.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub._is_reachable.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(UsageError, match=r"the config of nobody/nothing cannot be read") as caught:
                load_config(section(**{"from": "nobody/nothing"}), "causal-lm")
            assert "the hub cannot be reached from here" in (caught.value.hint or "")
        with pytest.raises(UsageError, match=r"nobody/nothing cannot be downloaded"):
            resolve_weights(section(**{"from": "nobody/nothing"}))
    finally:
        hub._is_reachable.cache_clear()
    assert len(asked) == 1, "not once more for each file and attempt"


def test_config_fields_under_their_common_names() -> None:
    """A class's own names and the names that transformers accepts for them."""
    config = load_config(section(config={"model_type": "gpt2", "hidden_size": 64, "n_layer": 3}), "causal-lm")
    assert (config.n_embd, config.num_hidden_layers) == (64, 3)


def test_vocabulary_and_padding_of_the_tokenizer() -> None:
    assert load_config(section(config={"model_type": "llama"}), "causal-lm", vocab_size=500).vocab_size == 500
    larger = {"model_type": "llama", "vocab_size": 512}
    config = load_config(section(config=larger), "causal-lm", vocab_size=500, pad_token_id=7)
    assert (config.vocab_size, config.pad_token_id) == (512, 7)
    with pytest.raises(UsageError, match="tokenizer has 600 entries, the model's vocab_size is 512") as caught:
        load_config(section(config=larger), "causal-lm", vocab_size=600)
    assert "at least 600" in (caught.value.hint or "")


def test_dropout_sets_every_probability() -> None:
    config = load_config(section(config={"model_type": "gpt2"}, dropout=0.3), "causal-lm")
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.3, 0.3, 0.3)
    config = load_config(section(config={"model_type": "bert"}, dropout=0.0), "masked-lm")
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.0, 0.0)
    assert load_config(section(config={"model_type": "bert"}), "masked-lm").hidden_dropout_prob == 0.1
    config = load_config(section(config={"model_type": "m2m_100"}, dropout=0.2), "translation")
    assert (config.dropout, config.attention_dropout) == (0.2, 0.2)
    assert (config.encoder_layerdrop, config.decoder_layerdrop) == (0.0, 0.0)


def test_what_a_task_needs() -> None:
    config = load_config(section(config={"model_type": "bert"}), "classification", num_labels=5)
    assert (config.num_labels, config.problem_type) == (5, "single_label_classification")
    assert load_config(section(config={"model_type": "bert"}), "causal-lm").is_decoder is True
    assert load_config(section(config={"model_type": "t5"}), "translation").decoder_start_token_id == 0


def test_from_a_folder_with_changes(tmp_path: Path) -> None:
    tiny_config("llama", attention_dropout=0.0).save_pretrained(tmp_path)
    config = load_config(section(**{"from": str(tmp_path), "config": {"rms_norm_eps": 0.5}}), "causal-lm")
    assert (config.model_type, config.hidden_size, config.rms_norm_eps) == ("llama", 32, 0.5)
    assert resolve_weights(section(**{"from": str(tmp_path)})) == tmp_path
    with pytest.raises(UsageError, match="no config field 'rms_eps'"):
        load_config(section(**{"from": str(tmp_path), "config": {"rms_eps": 0.5}}), "causal-lm")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_config(section(**{"from": str(tmp_path)}), "causal-lm")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {"bits": 4}}))
    with pytest.raises(UsageError, match="quantised"):
        load_config(section(**{"from": str(tmp_path)}), "causal-lm")
    with pytest.raises(UsageError, match="names no model"):
        load_config(section(), "causal-lm")


def test_class_of_a_task() -> None:
    assert model_class(tiny_config("llama"), "chat").__name__ == "LlamaForCausalLM"
    assert model_class(tiny_config("bert"), "classification").__name__ == "BertForSequenceClassification"
    assert model_class(tiny_config("t5", "translation"), "translation").__name__ == "T5ForConditionalGeneration"
    with pytest.raises(UsageError, match="no llama model for task translation") as caught:
        model_class(tiny_config("llama"), "translation")
    assert "causal-lm" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("task", "model_type"),
    [
        ("causal-lm", "llama"),
        ("chat", "gpt2"),
        ("masked-lm", "roberta"),
        ("classification", "bart"),
        ("question-answering", "bert"),
        ("token-classification", "bert"),
        ("translation", "marian"),
    ],
)
def test_example_inputs_give_a_loss(task: str, model_type: str) -> None:
    config = tiny_config(model_type, task)
    inputs = example_inputs(config, task, 2, 8)
    assert inputs["input_ids"].shape == (2, 8)
    assert all(tensor.dtype is torch.int64 for tensor in inputs.values())
    assert torch.isfinite(tiny_model(config, task)(**inputs).loss)
