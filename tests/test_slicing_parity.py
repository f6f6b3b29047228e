"""A sliced model computes the loss and the gradients of the undivided one, on many architectures.

Each case cuts at every boundary, so that every segment is a stage alone, with a batch and a length other than traced.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_models import Pipeline, assert_same, run_whole, tiny_config, tiny_inputs, tiny_model

from llmpipe_cli.model.auto import model_class
from llmpipe_cli.model.slicing import trace_config

CAUSAL_LM = [
    "apertus", "arcee", "bamba", "bart", "bert", "big_bird", "biogpt", "bitnet", "blenderbot", "bloom", "camembert",
    "codegen", "cohere", "cohere2", "ctrl", "cwm", "data2vec-text", "deepseek_v2", "deepseek_v3", "diffllama", "doge",
    "dots1", "electra", "ernie", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon", "falcon_mamba", "flex_olmo", "gemma",
    "gemma2", "gemma3_text", "gemma3n_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
    "gpt_oss", "gptj", "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "jais2", "jamba",
    "jetmoe", "lfm2", "llama", "mamba", "mamba2", "marian", "mbart", "megatron-bert", "minimax", "ministral", "mistral",
    "mixtral", "modernbert-decoder", "mpt", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "openai-gpt",
    "opt", "pegasus", "persimmon", "phi", "phi3", "phimoe", "plbart", "prophetnet", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "qwen3_next", "recurrent_gemma", "rembert", "roberta", "roformer", "rwkv", "seed_oss", "smollm3",
    "stablelm", "starcoder2", "trocr", "vaultgemma", "xglm", "xlm-roberta", "xlnet", "xmod", "zamba2",
]  # fmt: skip
CLASSIFICATION = [
    "albert", "bert", "canine", "deberta-v2", "distilbert", "electra", "gpt2", "llama", "mobilebert", "modernbert",
    "mpnet", "qwen3", "roberta", "xlm-roberta",
]  # fmt: skip
MASKED_LM = [
    "albert",
    "bert",
    "camembert",
    "deberta",
    "distilbert",
    "electra",
    "fnet",
    "modernbert",
    "mpnet",
    "roberta",
]
TRANSLATION = [
    "bart", "bigbird_pegasus", "blenderbot", "led", "longt5", "m2m_100", "marian", "mbart", "mt5", "mvp", "pegasus",
    "plbart", "prophetnet", "t5", "umt5",
]  # fmt: skip
CASES = [
    *(("causal-lm", name) for name in CAUSAL_LM),
    *(("classification", name) for name in CLASSIFICATION),
    *(("masked-lm", name) for name in MASKED_LM),
    *(("translation", name) for name in TRANSLATION),
]


@pytest.mark.parametrize(("task", "model_type"), CASES)
def test_every_segment_alone(task: str, model_type: str) -> None:
    config = tiny_config(model_type, task)
    model = tiny_model(config, task)
    plan = trace_config(model_class(config, task), config, task, sequence_len=16)
    inputs = tiny_inputs(task, batch=3, sequence_len=15)
    expected = run_whole(model, inputs)
    found = Pipeline(model, plan, list(range(1, plan.num_segments))).run(inputs)
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("task", "model_type"),
    [
        ("causal-lm", "llama"),
        ("causal-lm", "gpt2"),
        ("causal-lm", "mixtral"),
        ("causal-lm", "gemma3n_text"),
        ("causal-lm", "zamba2"),
        ("classification", "bert"),
        ("classification", "albert"),
        ("masked-lm", "roberta"),
        ("translation", "t5"),
        ("translation", "marian"),
    ],
)
def test_two_and_three_stages(task: str, model_type: str) -> None:
    config = tiny_config(model_type, task)
    model = tiny_model(config, task)
    plan = trace_config(model_class(config, task), config, task, sequence_len=16)
    inputs = tiny_inputs(task)
    expected = run_whole(model, inputs)
    last = plan.num_segments
    for cuts in ([], [1], [last // 2], [last - 1], [last // 3, 2 * last // 3], [2, last - 2]):
        assert_same(Pipeline(model, plan, cuts).run(inputs), expected)


def test_the_documentation_lists_what_is_tested() -> None:
    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    sections = text.split("\n## ")[1:]
    listed = [re.findall(r"`([^`]+)`", section) for section in sections]
    assert listed == [CAUSAL_LM, CLASSIFICATION, MASKED_LM, TRANSLATION]
