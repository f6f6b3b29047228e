"""Each task at two stages against plain transformers on the same data, and its metrics against the trusted tools."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Job, full_model, losses, steps, train_plain
from rank_pool import RankPool
from seqeval.metrics import f1_score, precision_score, recall_score
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from sklearn.utils.class_weight import compute_class_weight
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.trainer_pt_utils import LabelSmoother

from llmpipe_cli.data.chat import DEFAULT_TEMPLATE, ChatEncoder
from llmpipe_cli.data.dataset import open_split
from llmpipe_cli.data.prepare import prepare
from llmpipe_cli.data.tokenizer import train_tokenizer
from llmpipe_cli.errors import UsageError
from llmpipe_cli.recipe.schema import Recipe, TokenizerTraining
from llmpipe_cli.run import RunDirectory, read_json
from llmpipe_cli.tasks.registry import get_task
from llmpipe_cli.tasks.text_scores import text_scores
from llmpipe_cli.tasks.token_classification import entities

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
BERT = {"model_type": "bert", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **SIZES}
LLAMA = {"model_type": "llama", "max_position_embeddings": 128, **SIZES}
TRAIN = {"max_steps": 6, "global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 4e-3}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as members:
        yield members


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def job_of(folder: Path, task: str, config: dict[str, Any], rows: list[dict[str, Any]], **changes: Any) -> Job:
    """A job on `rows`, the last third of which is held back for validation."""
    cut = len(rows) * 2 // 3
    data = {
        "train": {"files": write(folder / "train.jsonl", rows[:cut])},
        "validation": {"files": write(folder / "validation.jsonl", rows[cut:])},
        "sequence_len": 48,
        **changes.pop("data", {}),
    }
    values = {"name": task, "task": task, "model": {"config": config}, "data": data, "train": TRAIN}
    return Job(folder, {**values, "tokenizer": {"train": {"vocab_size": 300}}, **changes})


def trained(job: Job, pool: RankPool) -> RunDirectory:
    """Trains at two stages; losses and gradient norms are those of transformers' own model and loss."""
    expected, norms, _ = train_plain(plan := job.plan(parallel={"pipeline": 2}), full_model(plan))
    run = job.train(pool, parallel={"pipeline": 2})
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert [step["grad_norm"] for step in steps(run)] == pytest.approx(norms, rel=1e-4)
    return run


def evaluated(job: Job, run: RunDirectory, pool: RankPool, **parallel: int) -> RunDirectory:
    plan = job.plan(resume=(run.checkpoints / "latest").resolve(), job="evaluate", parallel=parallel or {"pipeline": 2})
    evaluation = job.start(plan)
    pool.run_well(evaluation, plan.layout.num_ranks)
    return evaluation


# ---------------------------------------------------------------------------------------------- token-classification

NAMES = {"PER": ["Ada", "Alan Turing", "Lima"], "LOC": ["Oslo", "New York", "Lima"]}


def tagged(count: int) -> list[dict[str, Any]]:
    draw = random.Random(5)
    rows = []
    for _ in range(count):
        words, tags = [], []
        for part in draw.sample(["PER", "LOC", "went", "to", "with", "PER"], 5):
            names = draw.choice(NAMES.get(part, [part])).split()
            words += names
            tags += [f"{'BI'[index > 0]}-{part}" if part in NAMES else "O" for index in range(len(names))]
        rows.append({"tokens": words, "ner_tags": tags})
    return rows


def test_token_classification(tmp_path: Path, pool: RankPool) -> None:
    job = job_of(tmp_path, "token-classification", BERT, tagged(60), train={**TRAIN, "max_steps": 14})
    run = trained(job, pool)
    metrics = read_json(evaluated(job, run, pool).evaluation)["metrics"]
    two_replicas = read_json(evaluated(job, run, pool, pipeline=2, data=2).evaluation)["metrics"]
    assert two_replicas == pytest.approx(metrics, rel=1e-6)
    model = AutoModelForTokenClassification.from_pretrained(run.checkpoints / "latest").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.checkpoints / "latest")
    right, found = [], []
    for row in map(json.loads, (tmp_path / "validation.jsonl").read_text().splitlines()):
        encoded = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            best = model(**encoded).logits[0].argmax(-1).tolist()
        first = [encoded.word_ids().index(word) for word in range(len(row["tokens"]))]
        right.append(row["ner_tags"])
        found.append([model.config.id2label[best[position]] for position in first])
    assert 0 < metrics["f1"] < 1, "neither nothing nor everything is right: the figures can differ"
    assert metrics["precision"] == pytest.approx(precision_score(right, found), abs=1e-12)
    assert metrics["recall"] == pytest.approx(recall_score(right, found), abs=1e-12)
    assert metrics["f1"] == pytest.approx(f1_score(right, found), abs=1e-12)
    assert metrics["f1_macro"] == pytest.approx(f1_score(right, found, average="macro"), abs=1e-12)


def test_entities_are_those_of_seqeval() -> None:
    from seqeval.metrics.sequence_labeling import get_entities

    draw = random.Random(1)
    tags = [f"{mark}-{kind}" for mark in "BIES" for kind in ("X", "Y")] + ["O"] * 3
    for _ in range(500):
        sentence = draw.choices(tags, k=draw.randrange(1, 9))
        assert entities(sentence) == get_entities(sentence), sentence


def test_conll_files_with_mistakes(tmp_path: Path) -> None:
    text = "-DOCSTART- -X- O\n\nAda NNP B-PER\nran VBD O\n\nto\n\nOslo NNP B-LOC\n"
    (tmp_path / "a.conll").write_text(text)

    def prepared(**source: Any) -> Any:
        data = {"train": {"files": str(tmp_path / "a.conll"), **source}, "sequence_len": 16}
        values = {"name": "t", "task": "token-classification", "model": {}, "data": data}
        recipe = Recipe.model_validate({**values, "tokenizer": {"train": {"vocab_size": 300}}})
        return prepare(recipe, tmp_path, tmp_path / "cache")

    with pytest.raises(UsageError) as caught:
        prepared()
    assert (caught.value.where, caught.value.message) == (f"{tmp_path}/a.conll:6", "the word 'to' has no tag")
    data = prepared(on_error="skip")
    assert (data.train.num_samples, data.train.num_skipped) == (2, 1)
    assert data.label_names == ["B-LOC", "B-PER", "O"]
    sample = open_split(data.train)[0]
    assert [tag for tag in sample["tags"].tolist() if tag >= 0] == [1, 2]


# -------------------------------------------------------------------------------------------------------------- chat

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


def conversations(count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number in range(count):
        question, answer = f"What is {number} plus 1?", f"It is {number + 1}."
        forms = [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
            {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
            {"instruction": "Add 1.", "input": str(number), "output": answer},
            {"prompt": question, "completion": answer},
            {"dialog": [question, answer, "Thanks.", "You are welcome.", "Bye."]},
        ]
        rows.append(forms[number % len(forms)])
    return rows


def test_chat(tmp_path: Path, pool: RankPool) -> None:
    job = job_of(tmp_path, "chat", LLAMA, conversations(45), data={"sequence_len": 96})
    run = trained(job, pool)
    metrics = read_json(evaluated(job, run, pool, pipeline=3).evaluation)["metrics"]
    model = AutoModelForCausalLM.from_pretrained(run.checkpoints / "latest").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.checkpoints / "latest")
    assert tokenizer.chat_template == DEFAULT_TEMPLATE, "generation has to use the template of the training"
    total, count = 0.0, 0
    for number in range(30, 45):
        question, answer = f"What is {number} plus 1?", f"It is {number + 1}."
        turns = [("user", question if number % 5 != 2 else f"Add 1.\n{number}"), ("assistant", answer)]
        if number % 5 == 4:
            turns += [("user", "Thanks."), ("assistant", "You are welcome.")]
        messages = [{"role": role, "content": content} for role, content in turns]
        said = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = torch.tensor([said["input_ids"]]), torch.tensor([said["assistant_masks"]])
        labels = ids.masked_fill(mask == 0, -100)
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * int(mask.sum())
        count += int(mask.sum())
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)


def test_what_the_assistant_says_is_found_without_marks() -> None:
    """The same tokens as those that the template's own marks give, ends of turns included."""
    tokenizer = train_tokenizer(iter(["What is it? It is 42. <user>"]), TokenizerTraining(vocab_size=300), "causal")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    messages = [
        {"role": "system", "content": "Be brief. It is 42."},
        {"role": "user", "content": "What is it? It is 42."},
        {"role": "assistant", "content": "It is 42."},
        {"role": "user", "content": "It is 42."},
        {"role": "assistant", "content": "  What?\nIt is.  "},
    ]
    tokenizer.chat_template = CHATML
    expected = ChatEncoder(tokenizer).encode(messages)
    tokenizer.chat_template = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert ChatEncoder(tokenizer).encode(messages) == expected
    ids, said = expected
    assert tokenizer.decode([token for token, mark in zip(ids, said, strict=True) if mark]) == (
        "It is 42.<|im_end|>  What?\nIt is.  <|im_end|>"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "assistant", "content": "a"}]}, "turn 1 is the assistant's, where the user's is due"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}, "turn 2 is the user's"),
        ({"messages": [{"role": "user", "content": "a"}]}, "ends without an answer"),
        (
            {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "b"}]},
            "turn 1 (user) is empty",
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, "the role 'tool', which is not known"),
        ({"prompt": "a", "completion": None}, "turn 2 (assistant) holds null, not text"),
        ({"text": "a"}, "there is no field 'messages' with turns"),
        ({"prompt": "a", "completion": "b " * 90}, "longer than 96 tokens"),
    ],
)
def test_conversations_that_cannot_be_learned(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    def prepared(on_error: str, on_too_long: str) -> Any:
        path = write(tmp_path / "a.jsonl", [*conversations(2), row])
        data = {"train": {"files": path, "on_error": on_error, "on_too_long": on_too_long}, "sequence_len": 96}
        values = {"name": "t", "task": "chat", "model": {}, "tokenizer": {"train": {"vocab_size": 300}}, "data": data}
        return prepare(Recipe.model_validate(values), tmp_path, tmp_path / "cache").train

    with pytest.raises(UsageError) as caught:
        prepared("stop", "stop")
    assert message in caught.value.message
    assert caught.value.where == f"{tmp_path}/a.jsonl:3"
    split = prepared("skip", "skip")
    assert (split.num_samples, split.num_skipped) == (2, 1)
    assert split.skipped_examples[0].startswith(f"{tmp_path}/a.jsonl:3: ")


# ---------------------------------------------------------------------------------------------------- classification

TOPICS = {"music": ["drum", "song", "violin"], "sport": ["ball", "goal", "race"], "food": ["soup", "bread", "salt"]}


def _told(count: int, *, several: bool) -> list[dict[str, Any]]:
    draw = random.Random(7)
    rows = []
    for _ in range(count):
        topics = draw.sample(sorted(TOPICS), draw.randrange(3)) if several else [draw.choice([*TOPICS, "food", "food"])]
        words = [draw.choice(TOPICS[draw.choice(sorted(TOPICS)) if draw.random() < 0.2 else topic]) for topic in topics]
        rows.append({"text": " ".join(["today", *words]), "label": topics if several else topics[0]})
    return rows


class _Weighted(torch.nn.Module):
    """transformers' model whose loss is the mean over texts of weight x cross entropy."""

    def __init__(self, model: torch.nn.Module, weights: list[float]) -> None:
        super().__init__()
        self.model, self.factors = model, torch.tensor(weights)

    def forward(self, labels: torch.Tensor, **inputs: Any) -> Any:
        output = self.model(**inputs, labels=labels)
        single = torch.nn.functional.cross_entropy(output.logits, labels, reduction="none")
        output.loss = (single * self.factors[labels]).mean()
        return output


def _logits(run: RunDirectory, rows: list[dict[str, Any]]) -> tuple[Any, torch.Tensor]:
    model = AutoModelForSequenceClassification.from_pretrained(run.checkpoints / "latest").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.checkpoints / "latest")
    with torch.no_grad():
        return model, torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])


def test_classification_with_class_weights(tmp_path: Path, pool: RankPool) -> None:
    rows = _told(90, several=False)
    job = job_of(tmp_path, "classification", BERT, rows, data={"class_weights": "balanced"})
    names = sorted(TOPICS)
    counts = [sum(row["label"] == name for row in rows[:60]) for name in names]
    weights = compute_class_weight("balanced", classes=np.array(names), y=[row["label"] for row in rows[:60]])
    assert job.data.class_weights == pytest.approx(weights.tolist())
    assert job.data.train is not None
    assert job.data.train.label_counts == counts
    plan = job.plan(parallel={"pipeline": 2})
    expected, norms, _ = train_plain(plan, _Weighted(full_model(plan), weights.tolist()))
    run = job.train(pool, parallel={"pipeline": 2})
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert [step["grad_norm"] for step in steps(run)] == pytest.approx(norms, rel=1e-4)
    evaluation = evaluated(job, run, pool)
    metrics = read_json(evaluation.evaluation)["metrics"]
    model, logits = _logits(run, rows[60:])
    right, found = ([names.index(row["label"]) for row in rows[60:]], logits.argmax(-1).tolist())
    assert metrics["accuracy"] == accuracy_score(right, found)
    for average in ("macro", "micro"):
        scores = precision_recall_fscore_support(right, found, average=average, zero_division=0)[:3]
        for name, score in zip(("precision", "recall", "f1"), scores, strict=True):
            assert metrics.get(f"{name}_{average}", score) == pytest.approx(score, abs=1e-12)
    document = read_json(evaluation.path / "confusion_matrix.json")
    assert document["labels"] == names == [model.config.id2label[index] for index in range(3)]
    assert document["matrix"] == confusion_matrix(right, found, labels=[0, 1, 2]).tolist()


def test_several_labels_a_text(tmp_path: Path, pool: RankPool) -> None:
    rows = _told(90, several=True)
    config = {**LLAMA, "num_key_value_heads": 2}
    job = job_of(tmp_path, "classification", config, rows, data={"multi_label": True}, train={**TRAIN, "max_steps": 20})
    run = trained(job, pool)
    metrics = read_json(evaluated(job, run, pool).evaluation)["metrics"]
    model, logits = _logits(run, rows[60:])
    assert model.config.problem_type == "multi_label_classification"
    names = [model.config.id2label[index] for index in range(3)]
    right = np.array([[name in row["label"] for name in names] for row in rows[60:]], dtype=int)
    found = (logits.sigmoid() >= 0.5).int().numpy()
    assert found.any()
    expected = {"accuracy": accuracy_score(right, found)}
    for average in ("macro", "micro"):
        scores = precision_recall_fscore_support(right, found, average=average, zero_division=0)[:3]
        expected |= {
            f"{name}_{average}": score for name, score in zip(("precision", "recall", "f1"), scores, strict=True)
        }
    losses_ = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(right).float())
    assert metrics.pop("loss") == pytest.approx(losses_.item(), rel=1e-5)
    assert metrics == pytest.approx(expected, abs=1e-12)


def test_labels_that_are_not_in_the_list(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [{"text": "a", "label": ["x"]}, {"text": "b", "label": ["y", "x"]}])
    other = write(tmp_path / "other.jsonl", [{"text": "a", "label": []}, {"text": "b", "label": ["x", "z"]}])
    data = {"train": {"files": train}, "validation": {"files": other}, "multi_label": True, "sequence_len": 16}
    values = {"name": "t", "task": "classification", "model": {}, "tokenizer": {"train": {"vocab_size": 300}}}
    with pytest.raises(UsageError) as caught:
        prepare(Recipe.model_validate({**values, "data": data}), tmp_path, tmp_path / "cache")
    assert caught.value.where == f"{other}:2"
    assert caught.value.message == "unknown label 'z'"
    assert "the labels are 'x', 'y'" in (caught.value.hint or "")


# --------------------------------------------------------------------------------------------------- translation


def test_translation_from_scratch(tmp_path: Path, pool: RankPool) -> None:
    """Marian with smoothed labels: Hugging Face's label smoother, `generate`, and sacrebleu's command line."""
    draw = random.Random(3)
    words = {"one": "eins", "two": "zwei", "three": "drei", "dog": "Hund", "cat": "Katze", "house": "Haus"}
    rows = []
    for _ in range(66):
        chosen = draw.choices(sorted(words), k=draw.randrange(2, 6))
        rows.append({"source": " ".join(chosen), "target": " ".join(["das", "ist", "ein", *map(words.get, chosen)])})
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = {"model_type": "marian", "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, **layers}
    train = {**TRAIN, "max_steps": 40, "global_batch_size": 16, "micro_batch_size": 4, "learning_rate": 1e-2}
    model = {"config": {**config, "max_position_embeddings": 64}, "dropout": 0.0}
    job = job_of(
        tmp_path,
        "translation",
        config,
        rows,
        model=model,
        data={"sequence_len": 24, "target_sequence_len": 20, "source_prefix": "say: "},
        train={**train, "label_smoothing": 0.1},
        tokenizer={"train": {"vocab_size": 340}},
    )
    plan = job.plan(parallel={"pipeline": 2})
    expected, norms, _ = train_plain(plan, _Smoothed(full_model(plan)))
    run = job.train(pool, parallel={"pipeline": 2})
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert [step["grad_norm"] for step in steps(run)] == pytest.approx(norms, rel=1e-3)

    evaluation = evaluated(job, run, pool)
    result = read_json(evaluation.evaluation)
    hypotheses = (evaluation.path / "hypotheses.txt").read_text().splitlines()
    loaded = AutoModelForSeq2SeqLM.from_pretrained(run.checkpoints / "latest").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.checkpoints / "latest")
    assert loaded.config.decoder_start_token_id == tokenizer.pad_token_id
    for row, hypothesis in zip(rows[44:], hypotheses, strict=True):
        inputs = tokenizer("say: " + row["source"], return_tensors="pt")
        best = loaded.generate(**inputs, max_new_tokens=20, do_sample=False, num_beams=1, forced_eos_token_id=None)
        assert hypothesis == " ".join(tokenizer.decode(best[0], skip_special_tokens=True).split())
    command = [sys.executable, "-m", "sacrebleu", "references.txt", "-i", "hypotheses.txt", "-m", "bleu", "chrf"]
    printed = subprocess.run(
        [*command, "--format", "json", "-w", "10"], cwd=evaluation.path, capture_output=True, text=True, check=True
    )
    bleu, chrf = json.loads(printed.stdout)
    assert result["metrics"]["bleu"] > 5, "it has learned some words"
    assert result["metrics"]["bleu"] == pytest.approx(bleu["score"], abs=1e-9)
    assert result["metrics"]["chrf"] == pytest.approx(chrf["score"], abs=1e-9)
    assert bleu["signature"].split("|version")[0] in result["signature"]

    replicas = evaluated(job, run, pool, pipeline=1, data=2)
    assert (replicas.path / "hypotheses.txt").read_text().splitlines() == hypotheses
    assert read_json(replicas.evaluation)["metrics"] == pytest.approx(result["metrics"], rel=1e-6)

    checkpoint = (run.checkpoints / "latest").resolve()
    stopped = job.start(job.plan(resume=checkpoint, job="evaluate", parallel={"pipeline": 1, "data": 2}))
    stopped.request_stop()
    assert pool.run(stopped, 2) == [75, 75], "one rank sees the request"
    assert not stopped.evaluation.exists()


class _Smoothed(torch.nn.Module):
    """transformers' model with the loss of its Trainer's label smoothing."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> Any:
        output = self.model(**inputs)
        output.loss = LabelSmoother(0.1)(output, inputs["labels"])
        return output


def test_rouge_is_that_of_rouge_score() -> None:
    scores, _ = text_scores(["the cat sat", "a dog"], ["the cat sat down", "dogs"], ["rouge"])
    assert scores["rouge1"] == pytest.approx(100 * (2 * 1 * 0.75 / 1.75 + 2 * 0.5 * 1 / 1.5) / 2)
    assert set(scores) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}


# ------------------------------------------------------------------------------------------------------ masked-lm


@pytest.mark.parametrize("packing", [True, False])
def test_whole_words_are_hidden(tmp_path: Path, packing: bool) -> None:
    path = write(
        tmp_path / "a.jsonl", [{"text": f"extraordinary circumstances {n} notwithstanding"} for n in range(60)]
    )
    data = {"train": {"files": path}, "sequence_len": 32, "packing": packing, "whole_word_masking": True}
    values = {"name": "t", "task": "masked-lm", "model": {}, "tokenizer": {"train": {"vocab_size": 270}}, "data": data}
    prepared = prepare(Recipe.model_validate(values), tmp_path, tmp_path / "cache")
    assert prepared.train is not None
    samples, task = open_split(prepared.train), get_task(prepared)
    share = []
    for step in range(30):
        chosen = [samples[(3 * step + row) % len(samples)] for row in range(3)]
        batch = task.collate(chosen, seed=(1, step))
        for row, sample in enumerate(chosen):
            words, hidden = sample["words"], (batch["labels"][row, : len(sample["words"])] != -100).numpy()
            share.append(hidden[words > 0].mean())
            assert not hidden[words == 0].any()
            for position in range(1, len(words)):
                if words[position] == words[position - 1] > 0:
                    assert hidden[position] == hidden[position - 1], "a word is hidden whole or not at all"
    assert 0.1 < np.mean(share) < 0.3
