"""A sliced model computes the loss and the gradients of the undivided one, on many architectures.

Each case cuts at every boundary, so that every segment is a stage alone, with a padded batch of another size and length
than traced. The whole table of architectures takes minutes (`make models`); what is checked here is that it has a row
for every registered type, that a fixed part of each task's rows holds, and settings that are hard to cut.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import Pipeline, assert_same, run_whole, tiny_config, tiny_inputs, tiny_model

from llmpipe_cli.model import parity
from llmpipe_cli.model.auto import model_class
from llmpipe_cli.model.parity import Verdict, check_type, require_parity
from llmpipe_cli.model.slicing import trace_config
from llmpipe_cli.model.slicing.trace import NotSliceableError
from llmpipe_cli.model.table import TASKS, read_table, registered_types, render

ROWS = read_table()["tasks"]
LEAST_PASSING = {"causal-lm": 160, "masked-lm": 40, "classification": 100, "translation": 20}
EVERY = {"causal-lm": 4, "masked-lm": 6, "classification": 10, "token-classification": 10, "question-answering": 10}
SAMPLE = [
    (task, name)
    for task, rows in ROWS.items()
    for name in [name for name, row in rows.items() if row["status"] == "pass"][:: EVERY.get(task, 3)]
]
REFUSED = [(task, name) for task, rows in ROWS.items() for name, row in rows.items() if row["status"] == "refused"]


def test_the_table_has_a_row_for_every_registered_type() -> None:
    table = read_table()
    assert table["transformers"] == transformers.__version__
    for task in TASKS:
        assert list(table["tasks"][task]) == registered_types(task)
        assert {row["status"] for row in table["tasks"][task].values()} <= {"pass", "refused", "untested"}
        assert all(row["status"] == "pass" or row["reason"] for row in table["tasks"][task].values())
        passing = sum(row["status"] == "pass" for row in table["tasks"][task].values())
        refused = sum(row["status"] == "refused" for row in table["tasks"][task].values())
        assert passing >= LEAST_PASSING.get(task, 0.8 * (passing + refused))
    assert (Path(__file__).parent.parent / "docs" / "models.md").read_text() == render(table), "run `make models`"


@pytest.mark.parametrize(("task", "model_type"), SAMPLE)
def test_passing_rows_hold(task: str, model_type: str) -> None:
    assert check_type(model_type, task).status == "pass"


@pytest.mark.parametrize(("task", "model_type"), REFUSED)
def test_refused_rows_hold(task: str, model_type: str) -> None:
    assert check_type(model_type, task) == Verdict("refused", ROWS[task][model_type]["reason"])


@pytest.mark.parametrize(
    ("task", "model_type", "changes"),
    [
        ("causal-lm", "mixtral", {"attn_implementation": "eager"}),
        ("causal-lm", "gemma2", {"attn_implementation": "eager"}),  # softcaps, sliding windows
        ("causal-lm", "gpt_oss", {"attn_implementation": "eager"}),  # attention sinks
        ("causal-lm", "llama", {"tie_word_embeddings": True}),
        ("causal-lm", "olmoe", {"output_router_logits": True}),
        ("causal-lm", "opt", {"do_layer_norm_before": False}),
        ("masked-lm", "albert", {"attn_implementation": "eager", "num_hidden_groups": 3}),
        ("classification", "albert", {"attn_implementation": "eager"}),  # shared layers
        ("translation", "t5", {"tie_word_embeddings": False}),
        ("translation", "t5", {"feed_forward_proj": "gated-gelu"}),
        ("translation", "bart", {"scale_embedding": True}),
        ("translation", "marian", {"share_encoder_decoder_embeddings": False}),
    ],
)
def test_settings_that_are_hard_to_cut(task: str, model_type: str, changes: dict[str, Any]) -> None:
    assert check_type(model_type, task, **changes).status == "pass"


@pytest.mark.parametrize(
    ("task", "model_type"),
    [
        ("causal-lm", "llama"),
        ("causal-lm", "gpt2"),
        ("causal-lm", "gemma3_text"),
        ("causal-lm", "mixtral"),
        ("causal-lm", "mamba2"),
        ("masked-lm", "modernbert"),
        ("classification", "deberta-v2"),
        ("token-classification", "bert"),
        ("question-answering", "roberta"),
        ("translation", "t5"),
        ("translation", "marian"),
    ],
)
def test_bf16(task: str, model_type: str) -> None:
    """The same operations in the same order; only sums of tied gradients may round otherwise."""
    verdict = check_type(model_type, task, dtype=torch.bfloat16)
    assert verdict.status == "pass", verdict.reason


@pytest.mark.parametrize(
    ("task", "model_type"),
    [
        ("causal-lm", "gpt2"),
        ("causal-lm", "gemma3n_text"),
        ("causal-lm", "zamba2"),
        ("classification", "albert"),
        ("translation", "t5"),
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


def test_what_the_table_does_not_hold_is_checked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checked: list[Any] = []

    def wrong(model_type: str, task: str, **options: Any) -> Verdict:
        checked.append((model_type, options))
        return Verdict("differs", "the loss is 2.0, undivided 1.0")

    monkeypatch.setattr(parity, "check_type", wrong)
    parity._check_once.cache_clear()
    require_parity(tiny_config("llama"), "causal-lm")  # a row of the table
    assert not checked
    with pytest.raises(NotSliceableError, match=r"llama cannot be cut .* the loss is 2\.0"):
        require_parity(tiny_config("llama", mlp_bias=True), "chat")
    assert checked == [("llama", {"attn_implementation": "auto", "mlp_bias": True})]
    table = read_table()
    del table["tasks"]["causal-lm"]["llama"]
    monkeypatch.setattr(parity, "read_table", lambda: table)
    with pytest.raises(NotSliceableError, match="llama"):
        require_parity(tiny_config("llama"), "causal-lm")
    monkeypatch.undo()
    parity._check_once.cache_clear()
    require_parity(tiny_config("llama", mlp_bias=True), "causal-lm")
    untested = next(name for name, row in ROWS["causal-lm"].items() if row["status"] == "untested")
    config = tiny_config("llama")
    monkeypatch.setattr(type(config), "model_type", untested)
    with caplog.at_level(logging.WARNING):
        require_parity(config, "causal-lm")
    assert f"{untested} is untested" in caplog.text
