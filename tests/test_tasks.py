"""Batches and metrics of each task, against plain one-process computations with transformers."""

from __future__ import annotations

import json
import math
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from llmpipe_cli.data.batches import BatchPlan
from llmpipe_cli.data.dataset import open_split
from llmpipe_cli.data.prepare import prepare
from llmpipe_cli.data.prepared import PreparedData
from llmpipe_cli.errors import UsageError
from llmpipe_cli.recipe.schema import Recipe
from llmpipe_cli.tasks.base import IGNORED, EvaluationBatch, EvaluationPass, Task, negative_log_likelihood
from llmpipe_cli.tasks.classification import classification_scores
from llmpipe_cli.tasks.registry import get_task

STDLIB = Path(sysconfig.get_paths()["stdlib"])
NAMES = ["json/scanner.py", "json/tool.py", "keyword.py"]
FILES = [f"{{stdlib}}/{name}" for name in NAMES]
LENGTH = 96
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def prepared(cache: Path, task: str, **data: Any) -> PreparedData:
    sections = {"train": {"files": FILES}, "validation": {"files": FILES}, "sequence_len": LENGTH, **data}
    recipe = Recipe.model_validate(
        {"name": "test", "task": task, "model": {}, "tokenizer": {"train": {"vocab_size": 400}}, "data": sections}
    )
    return prepare(recipe, Path.cwd(), cache)


def evaluate(
    model: Callable[..., Any],
    data: PreparedData,
    micro_batch_size: int,
    num_ranks: int = 1,
    max_samples: int | None = None,
) -> dict[str, float]:
    """All metrics, as the ranks of a pipeline compute them: micro-batches dealt out, vectors summed."""
    task = get_task(data)
    assert data.validation is not None
    samples = open_split(data.validation)
    metrics: dict[str, float] = {}
    for one in task.evaluation_passes(samples, micro_batch_size, max_samples):
        ranks = [one.new_metrics() for _ in range(num_ranks)]
        for index in range(len(one)):
            batch = one[index]
            with torch.no_grad():
                output = model(**batch.inputs)
            ranks[index % num_ranks].update(batch, output.logits)
        metrics |= one.result(torch.stack([rank.vector for rank in ranks]).sum(dim=0))
    return metrics


def shapes(batch: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    assert {value.dtype for value in batch.values()} == {torch.int64}
    return {name: tuple(value.shape) for name, value in batch.items()}


def check_shapes(data: PreparedData, micro_batch_size: int = 4) -> dict[str, tuple[int, ...]]:
    """The largest shape of each input; rows end at the first multiple of 8 that holds the longest, or are full."""
    task = get_task(data)
    assert data.train is not None
    assert data.validation is not None
    batches = BatchPlan(open_split(data.train), task, global_batch_size=8, micro_batch_size=micro_batch_size, seed=1)
    all_batches = [batches.micro_batch(step, 1) for step in range(5)]
    for one in task.evaluation_passes(open_split(data.validation), micro_batch_size):
        all_batches += [one[index].inputs for index in range(len(one))]
    largest: dict[str, tuple[int, ...]] = {}
    for batch in all_batches:
        seen = shapes(batch)
        assert batch.keys() == all_batches[0].keys()
        assert all(shape[0] == micro_batch_size for shape in seen.values())
        longest = batch["attention_mask"].sum(dim=1).max() if "attention_mask" in batch else seen["input_ids"][1]
        assert seen["input_ids"][1] == min(-(-int(longest) // 8) * 8, task.sequence_len)
        largest = {name: max(shape, largest.get(name, shape)) for name, shape in seen.items()}
    return largest


# ---------------------------------------------------------------------------------------------------- causal-lm


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=400, max_position_embeddings=LENGTH, initializer_range=0.3, **SMALL)
    return LlamaForCausalLM(config).eval()


def texts() -> list[str]:
    return [(STDLIB / name).read_text("utf-8") for name in NAMES]


def plain_block_loss(model: LlamaForCausalLM, tokens: list[int]) -> float:
    """Loss over consecutive blocks, one at a time, with the model's own loss."""
    losses = []
    for start in range(0, len(tokens) - LENGTH + 1, LENGTH):
        block = torch.tensor([tokens[start : start + LENGTH]])
        with torch.no_grad():
            losses.append(model(input_ids=block, labels=block).loss.item())
    return math.fsum(losses) / len(losses)


def plain_rolling_sum(model: LlamaForCausalLM, tokens: list[int], prefix: int) -> float:
    """Sum of -log p over a document's tokens: each in the window that ends with it or, where windows are full, in the
    one that ends at the next multiple of the window's length."""
    total, done = 0.0, 0
    while done < len(tokens):
        stop = min(done + LENGTH, len(tokens))
        seen = ([prefix, *tokens])[max(0, stop - LENGTH) : stop]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([seen])).logits[0].double()
        for position in range(done, stop):
            row = logits[len(seen) - (stop - position)]
            total -= (row[tokens[position]] - torch.logsumexp(row, 0)).item()
        done = stop
    return total


@pytest.mark.parametrize("packing", [True, False])
def test_causal_metrics_equal_a_plain_computation(cache: Path, llama: LlamaForCausalLM, packing: bool) -> None:
    data = prepared(cache, "causal-lm", packing=packing)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_dir)
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts()]
    loss = plain_block_loss(llama, [token for document in documents for token in document])
    total = math.fsum(plain_rolling_sum(llama, document, tokenizer.bos_token_id) for document in documents)
    num_words = sum(len(re.split(r"\s+", text)) for text in texts())
    num_bytes = sum(len(text.encode("utf-8")) for text in texts())
    expected = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "word_perplexity": math.exp(total / num_words),
        "byte_perplexity": math.exp(total / num_bytes),
        "bits_per_byte": total / num_bytes / math.log(2),
    }
    measured = evaluate(llama, data, micro_batch_size=7)
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, rel=1e-5), name
    for micro_batch_size, num_ranks in ((1, 1), (5, 3)):
        again = evaluate(llama, data, micro_batch_size, num_ranks)
        assert again == pytest.approx(measured, rel=1e-6)


def test_each_token_is_scored_once_after_what_comes_before_it(cache: Path) -> None:
    data = prepared(cache, "causal-lm", sequence_len=16)
    assert data.validation is not None
    samples = open_split(data.validation)
    documents = samples.documents
    assert documents is not None
    windows = get_task(data).evaluation_passes(samples, 3)[1]
    scored = []
    for index in range(len(windows)):
        batch = windows[index]
        for inputs, targets in zip(batch.inputs["input_ids"].tolist(), batch.targets.tolist(), strict=True):
            scored += [target for target in targets if target != IGNORED]
            for position, target in enumerate(targets[:-1]):  # an input is the target of the place before
                if target != IGNORED and targets[position + 1] != IGNORED:
                    assert inputs[position + 1] == target
    expected = [token for index in range(len(documents)) for token in documents.document(index).tolist()]
    assert scored == expected


def test_the_first_samples_only(cache: Path, llama: LlamaForCausalLM) -> None:
    data = prepared(cache, "causal-lm")
    assert data.validation is not None
    samples = open_split(data.validation)
    documents = samples.documents
    assert documents is not None
    rows = [-(-int(count) // LENGTH) for count in documents.counts["input_ids"]]
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_dir)
    first = texts()[0]
    tokens = tokenizer(first)["input_ids"]

    limit = rows[0] + 1  # the first document, and one window that the second does not fit into
    blocks, windows = get_task(data).evaluation_passes(samples, 4, limit)
    assert (blocks.num_samples, windows.num_samples) == (limit, rows[0])
    total = plain_rolling_sum(llama, tokens, tokenizer.bos_token_id)
    measured = evaluate(llama, data, 4, max_samples=limit)
    assert measured["bits_per_byte"] == pytest.approx(total / math.log(2) / len(first.encode()), rel=1e-5)

    blocks, windows = get_task(data).evaluation_passes(samples, 4, 2)
    assert (blocks.num_samples, windows.num_samples) == (2, 2)
    total = plain_rolling_sum(llama, tokens[: 2 * LENGTH], tokenizer.bos_token_id)
    num_bytes = len(first.encode()) * 2 * LENGTH / len(tokens)
    measured = evaluate(llama, data, 4, max_samples=2)
    assert measured["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)


def test_a_text_shorter_than_a_block_is_one_short_block(cache: Path, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("def f(x):\n    return x\n")
    data = prepared(cache, "causal-lm", validation={"files": str(path)})
    ids = torch.tensor([AutoTokenizer.from_pretrained(data.tokenizer_dir)(path.read_text())["input_ids"]])
    with torch.no_grad():
        expected = llama(input_ids=ids, labels=ids).loss.item()
    assert evaluate(llama, data, 4)["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_causal_batches(cache: Path, llama: LlamaForCausalLM, packing: bool) -> None:
    data = prepared(cache, "causal-lm", packing=packing)
    keys = ["input_ids", "labels"] if packing else ["attention_mask", "input_ids", "labels"]
    expected = check_shapes(data)
    assert sorted(expected) == keys
    assert set(expected.values()) == {(4, LENGTH)}
    task = get_task(data)
    rows = [{"input_ids": np.arange(5, 5 + length)} for length in ((LENGTH, 10) if not packing else (LENGTH, LENGTH))]
    batch = task.collate(rows, seed=(0,))
    assert task.num_targets(batch) == sum(len(row["input_ids"]) - 1 for row in rows)
    if not packing:
        assert batch["labels"][1, 10:].unique().tolist() == [IGNORED]
        assert batch["attention_mask"].sum(dim=1).tolist() == [LENGTH, 10]
        assert batch["input_ids"][1, 10:].unique().tolist() == [data.special_token_ids["pad"]]
    with torch.no_grad():  # the loss is the mean over exactly the counted targets
        output = llama(**batch)
    total, count = negative_log_likelihood(output.logits[:, :-1], batch["labels"][:, 1:])
    assert count == task.num_targets(batch)
    assert output.loss.item() == pytest.approx(total / count, rel=1e-5)


# ---------------------------------------------------------------------------------------------------- masked-lm


@pytest.fixture(scope="module")
def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=400, max_position_embeddings=LENGTH, **SMALL)).eval()


def test_masking_hides_15_percent_and_nothing_special(cache: Path) -> None:
    data = prepared(cache, "masked-lm")
    task = get_task(data)
    assert data.train is not None
    samples = open_split(data.train)
    originals = torch.tensor(np.stack([samples[index]["input_ids"] for index in range(len(samples))]))
    batch = task.collate([samples[index] for index in range(len(samples))], seed=(1, 2, 3))
    inputs, labels = batch["input_ids"], batch["labels"]
    chosen = labels != IGNORED
    special = torch.isin(originals, torch.tensor(data.all_special_ids))
    assert special.any()
    assert not chosen[special].any()
    assert torch.equal(inputs[~chosen], originals[~chosen])
    assert torch.equal(labels[chosen], originals[chosen])
    num = chosen.sum().item()
    assert num == task.num_targets(batch)
    ordinary = (~special).sum().item()
    assert abs(num / ordinary - 0.15) < 5 * math.sqrt(0.15 * 0.85 / ordinary)
    masked = (inputs[chosen] == data.special_token_ids["mask"]).float().mean().item()
    same = (inputs[chosen] == originals[chosen]).float().mean().item()
    assert abs(masked - 0.8) < 5 * math.sqrt(0.8 * 0.2 / num)
    assert abs(same - 0.1) < 5 * math.sqrt(0.1 * 0.9 / num)
    assert torch.equal(task.collate([samples[0], samples[1]], seed=(9,))["labels"], labels[:2]) is False


def test_masked_evaluation_hides_the_same_tokens_each_time(cache: Path, bert: BertForMaskedLM) -> None:
    data = prepared(cache, "masked-lm")
    one = evaluate(bert, data, micro_batch_size=8)
    assert evaluate(bert, data, micro_batch_size=8) == one
    assert evaluate(bert, data, micro_batch_size=3, num_ranks=2) == pytest.approx(one, rel=1e-6)
    assert one["perplexity"] == pytest.approx(math.exp(one["loss"]))
    assert data.validation is not None
    samples = open_split(data.validation)
    (pass_,) = get_task(data).evaluation_passes(samples, 1)
    total, count = 0.0, 0
    for index in range(len(pass_)):  # the model's own loss of each sample
        batch = pass_[index].inputs
        number = int((batch["labels"] != IGNORED).sum())
        with torch.no_grad():
            total += bert(**batch).loss.item() * number
        count += number
    assert one["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_masked_batches(cache: Path, packing: bool) -> None:
    data = prepared(cache, "masked-lm", packing=packing)
    expected = check_shapes(data, micro_batch_size=2)
    assert sorted(expected) == (["input_ids", "labels"] if packing else ["attention_mask", "input_ids", "labels"])
    assert data.train is not None
    first = open_split(data.train)[0]["input_ids"]
    assert first[0] == data.special_token_ids["cls"]
    if not packing:
        assert first[-1] == data.special_token_ids["sep"]
        assert len(first) == LENGTH


def test_a_sample_always_has_a_target(cache: Path) -> None:
    task = get_task(prepared(cache, "masked-lm", packing=False))
    for seed in range(50):
        assert task.num_targets(task.collate([{"input_ids": np.array([2, 300, 3])}], seed=(seed,))) == 1


# ----------------------------------------------------------------------------------------------- classification


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(tmp_path: Path) -> str:
    """Lines of three modules, to be told apart."""
    rows = []
    for name in ("csv", "heapq", "this"):
        lines = [line for line in (STDLIB / f"{name}.py").read_text("utf-8").splitlines() if line.strip()]
        rows += [{"text": line, "label": name} for line in lines[:15]]
    return write_lines(tmp_path / "lines.jsonl", rows)


def test_classification_metrics_equal_a_plain_computation(cache: Path, tmp_path: Path) -> None:
    files = {"files": labelled(tmp_path)}
    data = prepared(cache, "classification", train=files, validation=files)
    assert data.label_names == ["csv", "heapq", "this"]
    torch.manual_seed(1)
    config = BertConfig(vocab_size=400, max_position_embeddings=LENGTH, num_labels=3, initializer_range=0.5, **SMALL)
    model = BertForSequenceClassification(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_dir)
    rows = [json.loads(line) for line in Path(files["files"]).read_text().splitlines()]
    true = [data.label_names.index(row["label"]) for row in rows]
    losses, predicted = [], []
    for row, label in zip(rows, true, strict=True):
        encoded = tokenizer(row["text"], return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            output = model(**encoded, labels=torch.tensor([label]))
        losses.append(output.loss.item())
        predicted.append(output.logits.argmax().item())
    assert len(set(predicted)) > 1
    measured = evaluate(model, data, micro_batch_size=4, num_ranks=2)
    assert measured["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert measured["accuracy"] == pytest.approx(np.mean(np.equal(true, predicted)))
    per_class = []
    for label in range(3):
        hits = sum(t == p == label for t, p in zip(true, predicted, strict=True))
        precision = hits / max(1, predicted.count(label))
        recall = hits / true.count(label)
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        per_class.append((precision, recall, f1))
    for name, values in zip(("precision_macro", "recall_macro", "f1_macro"), zip(*per_class, strict=True), strict=True):
        assert measured[name] == pytest.approx(sum(values) / 3), name


# By hand. Truth 6 x a, 4 x b, 2 x c; a is found 4 times (1 as b, 1 as c), b 3 times (1 as a), c never (1 as a, 1 as b).
HAND = [[4, 1, 1], [1, 3, 0], [1, 1, 0]]


def test_scores_of_a_known_confusion_matrix() -> None:
    scores = classification_scores(torch.tensor(HAND, dtype=torch.float64))
    assert scores == pytest.approx(
        {
            "accuracy": 7 / 12,
            "precision_macro": (4 / 6 + 3 / 5 + 0 / 1) / 3,
            "recall_macro": (4 / 6 + 3 / 4 + 0 / 2) / 3,
            "f1_macro": (2 / 3 + 2 / 3 + 0) / 3,
            "f1_micro": 7 / 12,
        }
    )
    larger = torch.zeros(5, 5, dtype=torch.float64)  # two classes that occur nowhere change nothing
    larger[:3, :3] = torch.tensor(HAND)
    assert classification_scores(larger) == pytest.approx(scores)


def test_classification_batches(cache: Path, tmp_path: Path) -> None:
    files = {"files": labelled(tmp_path)}
    data = prepared(cache, "classification", train=files, validation=files, sequence_len=12)
    assert check_shapes(data) == {"input_ids": (4, 12), "attention_mask": (4, 12), "labels": (4,)}
    task = get_task(data)
    assert task.num_targets({"labels": torch.tensor([1, IGNORED, 0])}) == 2
    assert data.validation is not None
    (one,) = task.evaluation_passes(open_split(data.validation), 4)
    assert len(one) == 12  # 45 lines
    assert one[11].targets.tolist()[1:] == [IGNORED] * 3
    assert data.validation.num_truncated > 0


# -------------------------------------------------------------------------------------------------- translation


def test_translation_loss_equals_a_plain_computation(cache: Path, tmp_path: Path) -> None:
    source = (STDLIB / "this.py").read_text("utf-8").splitlines()
    pairs = [{"source": line, "target": line[::-1]} for line in source if len(line) > 3]
    files = {"files": write_lines(tmp_path / "a.jsonl", pairs)}
    lengths = {"sequence_len": 80, "target_sequence_len": 70}
    data = prepared(cache, "translation", train=files, validation=files, source_prefix="r: ", **lengths)
    assert check_shapes(data) == {"input_ids": (4, 48), "attention_mask": (4, 48), "labels": (4, 48)}
    torch.manual_seed(0)
    config = T5Config(vocab_size=400, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_dir)
    total, count = 0.0, 0
    for pair in pairs:
        encoded = tokenizer("r: " + pair["source"], return_tensors="pt", truncation=True, max_length=80)
        labels = tokenizer(text_target=pair["target"], return_tensors="pt", truncation=True, max_length=70)["input_ids"]
        with torch.no_grad():
            output = model(input_ids=encoded["input_ids"], labels=labels)
        total += output.loss.item() * labels.numel()
        count += labels.numel()
    measured = evaluate(model, data, micro_batch_size=4, num_ranks=2)
    assert measured["loss"] == pytest.approx(total / count, rel=1e-4)
    assert measured["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-3)


# ------------------------------------------------------------------------------------------------------- common


def test_likelihood_skips_ignored_places_and_is_exact_in_half_precision() -> None:
    torch.manual_seed(0)
    logits = (torch.randn(3, 5, 7) * 4).bfloat16()
    targets = torch.randint(0, 7, (3, 5))
    targets[0, 2], targets[2] = IGNORED, IGNORED
    expected = torch.nn.functional.cross_entropy(
        logits.double().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    total, count = negative_log_likelihood(logits, targets)
    assert count == 9
    assert total == pytest.approx(expected.item(), rel=1e-6)


def test_synthetic_data_has_loss_and_perplexity_only() -> None:
    made = {"synthetic": True, "max_documents": 6}
    for task, names in (
        ("causal-lm", {"loss", "perplexity"}),
        ("masked-lm", {"loss", "perplexity"}),
        ("translation", {"loss", "perplexity"}),
        (
            "classification",
            {"loss", "accuracy", "precision_macro", "recall_macro", "f1_macro", "f1_micro"},
        ),
    ):
        sections = {"train": made, "validation": made, "sequence_len": 8}
        model = {"config": {"model_type": "llama", "vocab_size": 50}}
        recipe = Recipe.model_validate({"name": "t", "task": task, "model": model, "data": sections})
        data = prepare(recipe, Path.cwd(), Path("unused"))
        check_shapes(data)
        outputs: set[str] = set()
        assert data.validation is not None
        for one in get_task(data).evaluation_passes(open_split(data.validation), 4):
            outputs |= set(run_uniform(one, 2 if task == "classification" else 50))
        assert outputs == names


def run_uniform(one: EvaluationPass, num_classes: int) -> dict[str, float]:
    """A model that knows nothing: its loss is the logarithm of the number of classes."""
    metrics = one.new_metrics()
    for index in range(len(one)):
        batch: EvaluationBatch = one[index]
        metrics.update(batch, torch.zeros(*batch.targets.shape, num_classes))
    result = one.result(metrics.vector)
    assert result["loss"] == pytest.approx(math.log(num_classes), rel=1e-6)
    assert one.num_targets(metrics.vector) == sum(int((one[i].targets != IGNORED).sum()) for i in range(len(one)))
    return result


def test_tasks_that_are_not_there_yet_are_refused_by_name(cache: Path) -> None:
    data = prepared(cache, "causal-lm")
    assert isinstance(get_task(data), Task)
    data.task = "summarisation"
    with pytest.raises(UsageError) as caught:
        get_task(data)
    assert "'summarisation'" in caught.value.message
    assert "causal-lm, masked-lm, chat, classification" in (caught.value.hint or "")
