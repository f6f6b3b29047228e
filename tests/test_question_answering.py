"""Question answering at two stages against plain transformers, and SQuAD's scores against torchmetrics and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Job, full_model, losses, steps, train_plain
from rank_pool import RankPool
from torchmetrics.functional.text import squad
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from llmpipe_cli.data.dataset import open_split
from llmpipe_cli.data.prepare import prepare
from llmpipe_cli.errors import UsageError
from llmpipe_cli.recipe.schema import Recipe
from llmpipe_cli.run import read_json
from llmpipe_cli.tasks.squad import squad_scores

CITIES = ["Paris", "Oslo", "Lima", "Cairo", "Quito", "Rabat", "Hanoi", "Dakar"]
LENGTH, STRIDE = 40, 8


def _context(number: int) -> str:
    start = " ".join(f"Stop {index} was long and slow." for index in range(number % 5))
    return f"{start} In the end the train came to {CITIES[number % 8]}, where it stayed for {number} days.".strip()


def squad_json(path: Path, count: int, *, impossible: bool) -> Path:
    """A file in SQuAD's own form; with `impossible` every fourth question has no answer."""
    paragraphs = []
    for number in range(count):
        context = _context(number)
        city = CITIES[number % 8]
        answers = [{"text": city, "answer_start": context.index(city)}]
        asked = {"id": f"q{number}", "question": "Where did the train come to?", "answers": answers}
        if impossible:
            asked["is_impossible"] = number % 4 == 3
            asked["answers"] = [] if number % 4 == 3 else answers
        paragraphs.append({"context": context, "qas": [asked]})
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "trains", "paragraphs": paragraphs}]}))
    return path


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as members:
        yield members


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("questions")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = {"model_type": "bert", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **sizes}
    return Job(
        folder,
        {
            "name": "questions",
            "task": "question-answering",
            "model": {"config": config},
            "tokenizer": {"train": {"vocab_size": 300}},
            "data": {
                "train": {"files": str(squad_json(folder / "train.json", 40, impossible=True))},
                "validation": {"files": str(squad_json(folder / "validation.json", 22, impossible=True))},
                "sequence_len": LENGTH,
                "stride": STRIDE,
            },
            "train": {"max_steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 4e-3},
            "evaluation": {"n_best": 6, "max_answer_len": 8},
        },
    )


def test_two_stages_learn_what_one_process_does(job: Job, pool: RankPool) -> None:
    """Losses and gradient norms of transformers' own model and loss; then the metrics of the checkpoint, computed again
    from transformers' own tokenizer call and logits."""
    plan = job.plan(parallel={"pipeline": 2})
    expected, norms, _ = train_plain(plan, full_model(plan))
    run = job.train(pool, parallel={"pipeline": 2})
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert [step["grad_norm"] for step in steps(run)] == pytest.approx(norms, rel=1e-4)
    assert expected[-1] < expected[0]

    checkpoint = (run.checkpoints / "latest").resolve()
    reported = []
    for parallel in ({"pipeline": 2}, {"pipeline": 2, "data": 2}):
        evaluation = job.start(job.plan(resume=checkpoint, job="evaluate", parallel=parallel))
        pool.run_well(evaluation, 2 * parallel.get("data", 1))
        reported.append((read_json(evaluation.evaluation), read_json(evaluation.path / "predictions.json")))
    (result, predictions), other = reported
    assert other[0]["metrics"] == pytest.approx(result["metrics"], rel=1e-6)
    assert other[1] == predictions
    document = json.loads((job.folder / "validation.json").read_text())
    plain = _answers_of_transformers(checkpoint, document)
    assert predictions == plain
    asked = [asked for paragraph in document["data"][0]["paragraphs"] for asked in paragraph["qas"]]
    answered = [each for each in asked if each["answers"]]
    scores = squad(
        [{"id": each["id"], "prediction_text": plain[each["id"]]} for each in answered],
        [
            {"id": e["id"], "answers": {"text": [a["text"] for a in e["answers"]], "answer_start": [0]}}
            for e in answered
        ],
    )
    assert result["metrics"]["HasAns_exact"] == pytest.approx(float(scores["exact_match"]), abs=1e-4)
    assert result["metrics"]["HasAns_f1"] == pytest.approx(float(scores["f1"]), abs=1e-4)
    silent = [plain[each["id"]] == "" for each in asked if not each["answers"]]
    assert result["metrics"]["NoAns_exact"] == pytest.approx(100 * sum(silent) / len(silent))
    assert set(result["metrics"]) == {
        "loss", "exact_match", "f1",
        "HasAns_exact", "HasAns_f1", "HasAns_total", "NoAns_exact", "NoAns_f1", "NoAns_total",
    }  # fmt: skip


def _answers_of_transformers(checkpoint: Path, document: dict[str, Any]) -> dict[str, str]:
    """Every pair of tokens of every window, the slow way: the best text, unless no answer is likelier."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForQuestionAnswering.from_pretrained(checkpoint).eval()
    found = {}
    for paragraph in document["data"][0]["paragraphs"]:
        for asked in paragraph["qas"]:
            windows = tokenizer(
                asked["question"],
                paragraph["context"],
                truncation="only_second",
                max_length=LENGTH,
                stride=STRIDE,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                padding="max_length",
                return_tensors="pt",
            )
            names = ("input_ids", "attention_mask", "token_type_ids")
            with torch.no_grad():
                output = model(**{name: windows[name] for name in names if name in windows})
            best, null = (-float("inf"), ""), float("inf")
            for row in range(len(windows["input_ids"])):
                first, last = output.start_logits[row], output.end_logits[row]
                null = min(null, float(first[0] + last[0]))
                inside = [i for i, part in enumerate(windows.sequence_ids(row)) if part == 1]
                starts, ends = (set(scores.argsort(descending=True)[:6].tolist()) for scores in (first, last))
                for start in starts & set(inside):
                    for end in ends & set(range(start, min(start + 8, inside[-1] + 1))):
                        bounds = windows["offset_mapping"][row][start][0], windows["offset_mapping"][row][end][1]
                        best = max(best, (float(first[start] + last[end]), paragraph["context"][bounds[0] : bounds[1]]))
            found[asked["id"]] = "" if null > best[0] else best[1]
    return found


def test_windows_overlap_and_hold_the_answer(job: Job) -> None:
    """Each answer lies whole in a window, the labelled tokens spell it, and windows share `stride` tokens."""
    assert job.data.train is not None
    tokenizer = AutoTokenizer.from_pretrained(job.data.tokenizer_dir)
    samples = open_split(job.data.train)
    assert len(samples) > 40, "long contexts have several windows"
    question, spelt, tail = -1, set(), None
    for index in range(len(samples)):
        tokens, (is_first, start, end, first, count) = samples[index]["input_ids"], samples[index]["facts"].tolist()
        assert len(tokens) <= LENGTH
        context = tokens[first : first + count].tolist()
        if not is_first:
            assert context[:STRIDE] == tail
        question, tail = question + is_first, context[-STRIDE:]
        if start:
            assert tokenizer.decode(tokens[start : end + 1]).strip(" ,") == CITIES[question % 8]
            spelt.add(question)
    assert spelt == {number for number in range(40) if number % 4 != 3}


def test_scores_of_hand_made_answers() -> None:
    examples = [
        {"id": "a", "answers": ["the Eiffel Tower", "Eiffel Tower in Paris"]},
        {"id": "b", "answers": ["42"]},
        {"id": "c", "answers": []},
        {"id": "d", "answers": []},
    ]
    right = {"a": "Eiffel tower!", "b": "about 42 days", "c": "", "d": "something"}
    scores = squad_scores(right, examples)
    assert scores["HasAns_exact"] == 50
    assert scores["HasAns_f1"] == pytest.approx(100 * (1 + 0.5) / 2)  # 42: precision 1/3, recall 1
    assert scores["NoAns_exact"] == scores["NoAns_f1"] == 50
    assert scores["exact_match"] == 50
    assert scores["f1"] == pytest.approx(100 * 2.5 / 4)
    assert scores["HasAns_total"] == scores["NoAns_total"] == 2
    assert set(squad_scores({}, examples[:2])) == {"exact_match", "f1"}


def test_columns_of_the_hub_and_answers_that_are_not_there(tmp_path: Path) -> None:
    def rows(start: int) -> list[dict[str, Any]]:
        context = "The train came to Oslo."
        return [
            {"id": "0", "context": context, "question": "Where?", "answers": {"text": ["Oslo"], "answer_start": [18]}},
            {"id": "1", "context": context, "question": "Who?", "answers": {"text": [], "answer_start": []}},
            {
                "id": "2",
                "context": context,
                "question": "What?",
                "answers": {"text": ["train"], "answer_start": [start]},
            },
        ]

    def prepared(start: int, **source: Any) -> Any:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(start)))
        sections = {"train": {"files": str(path), **source}, "sequence_len": 60, "stride": 10}
        values = {"name": "t", "task": "question-answering", "model": {}, "data": sections}
        recipe = Recipe.model_validate({**values, "tokenizer": {"train": {"vocab_size": 300}}})
        return prepare(recipe, tmp_path, tmp_path / "cache")

    assert prepared(4).train.num_samples == 3
    with pytest.raises(UsageError) as caught:
        prepared(5)
    assert caught.value.where == f"{tmp_path}/a.jsonl:3"
    assert "'train' is not in the context at character 5" in caught.value.message
    assert "it is at character 4" in (caught.value.hint or "")
    skipped = prepared(5, on_error="skip").train
    assert (skipped.num_samples, skipped.num_skipped) == (2, 1)
    assert skipped.skipped_examples[0].startswith(f"{tmp_path}/a.jsonl:3: ")
