"""Question answering: find the answer in a text (SQuAD v1 and v2).

A sample is a question with a part of its context (`tasks.answers`). The model gives each token a score for being the
answer's first and one for its last. In training both are classifications over the positions of a row.

In an evaluation the `n_best` likeliest first and last tokens of each row are combined to candidates: both in the
context, the last not before the first, at most `max_answer_len` tokens. The best candidate over all rows of a question,
by the sum of its two scores, is the answer. Where some question of the data has no answer, the classification token is
a candidate for "no answer", by its lowest score over the rows; it wins where it is higher than the best answer's by
more than `null_score_threshold`. -> loss, exact_match, f1, and HasAns_*, NoAns_* (`tasks.squad`); the answers go to
predictions.json in SQuAD's own form, the candidates with their probabilities to nbest_predictions.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmpipe_cli.data.dataset import Sample, Samples
from llmpipe_cli.data.store import read_examples
from llmpipe_cli.tasks.base import IGNORED, Batch, EvaluationBatch, EvaluationPass, Metrics, Task, pad
from llmpipe_cli.tasks.squad import squad_scores


class QuestionAnswering(Task):
    """First and last token of the answer; batches hold `input_ids`, `attention_mask`, for tokenizers that tell two
    texts apart `token_type_ids`, all [micro_batch, length], and `start_positions` and `end_positions`
    [micro_batch]."""

    name = "question-answering"

    def collate(self, samples: Sequence[Sample], *, seed: tuple[int, ...]) -> Batch:
        input_ids, mask = pad([sample["input_ids"] for sample in samples], self.sequence_len, self.pad_id)
        batch = {"input_ids": input_ids, "attention_mask": mask}
        if self.data.token_types:
            batch["token_type_ids"], _ = pad([sample["token_types"] for sample in samples], self.sequence_len, 0)
        facts = torch.from_numpy(np.stack([sample["facts"] for sample in samples]))
        return {**batch, "start_positions": facts[:, 1].clone(), "end_positions": facts[:, 2].clone()}

    def num_targets(self, batch: Batch) -> int:
        return len(batch["start_positions"])

    def logits(self, output: Any) -> torch.Tensor:
        """Scores of first and last tokens, [micro_batch, length, 2]."""
        return torch.stack([output.start_logits, output.end_logits], dim=-1)

    def evaluation_passes(
        self, samples: Samples, micro_batch_size: int, max_samples: int | None = None
    ) -> list[EvaluationPass]:
        return [_Answers(self, samples, micro_batch_size, max_samples)]


class _Answers(EvaluationPass):
    """One row a part of a context; of a question that has begun, all rows are read whatever `max_samples` says."""

    name = "answers"

    def __init__(
        self, task: QuestionAnswering, samples: Samples, micro_batch_size: int, max_samples: int | None
    ) -> None:
        self.task = task
        self.samples = samples
        self.examples: list[dict[str, Any]] = []
        num_rows = min(len(samples), max_samples or len(samples))
        if samples.documents is not None:
            self.examples = read_examples(Path(samples.split.directory))
            starts = samples.documents.starts["facts"]
            is_first = np.asarray(samples.documents.tokens["facts"][starts]) == 1
            self.example_of_row = np.cumsum(is_first) - 1
            while num_rows < len(samples) and not is_first[num_rows]:
                num_rows += 1
            self.examples = self.examples[: int(self.example_of_row[num_rows - 1]) + 1]
        super().__init__(num_rows, micro_batch_size)

    def rows(self, indices: Sequence[int]) -> EvaluationBatch:
        inputs = self.task.collate([self.samples[index] for index in indices], seed=())
        targets = torch.stack([inputs["start_positions"], inputs["end_positions"]], dim=-1)
        return EvaluationBatch(inputs, targets)

    def new_metrics(self) -> Metrics:
        return _Candidates(self)

    def result(self, vector: torch.Tensor) -> dict[str, float]:
        total, count = vector.tolist()
        return {"loss": total / count if count else math.nan}

    def num_targets(self, vector: torch.Tensor) -> int:
        return round(vector[1].item())

    def scores(self, records: Sequence[Any]) -> tuple[dict[str, Any], dict[str, str]]:
        if not self.examples:
            return {}, {}
        scoring = self.task.data.scoring
        may_be_empty = any(not example["answers"] for example in self.examples)
        grouped: list[list[dict[str, Any]]] = [[] for _ in self.examples]
        for record in sorted(records, key=lambda record: record["row"]):
            grouped[self.example_of_row[record["row"]]].append(record)
        answers: dict[str, str] = {}
        candidates: dict[str, list[dict[str, Any]]] = {}
        for example, rows in zip(self.examples, grouped, strict=True):
            ranked = _ranked(example["context"], rows, int(scoring["n_best"]), may_be_empty)
            answers[example["id"]] = _chosen(ranked, scoring["null_score_threshold"] if may_be_empty else None)
            candidates[example["id"]] = ranked
        files = {
            "predictions.json": json.dumps(answers, ensure_ascii=False, indent=1),
            "nbest_predictions.json": json.dumps(candidates, ensure_ascii=False, indent=1),
        }
        return squad_scores(answers, self.examples), files


class _Candidates(Metrics):
    """Vector: summed loss, number of rows. A record a row: its number, the score of no answer, and the candidates as
    (first character, last-plus-one, score of first token, of last token)."""

    def __init__(self, answers: _Answers) -> None:
        super().__init__(2)
        self.answers = answers

    def update(self, batch: EvaluationBatch, logits: torch.Tensor) -> None:
        scores = logits.detach().float().cpu()
        scored = (batch.targets != IGNORED).all(dim=-1).cpu()
        targets = batch.targets.cpu().clamp(min=0)
        losses = -torch.log_softmax(scores, dim=1).gather(1, targets[:, None, :])[:, 0].double().mean(dim=-1)
        self.vector += torch.stack([losses[scored].sum(), scored.sum()]).double()
        for position, row in enumerate(batch.rows):
            self._add(row, scores[position].numpy())

    def _add(self, row: int, scores: np.ndarray) -> None:
        samples, scoring = self.answers.samples, self.answers.task.data.scoring
        if samples.documents is None:
            return
        sample = samples[row]
        first, count = int(sample["facts"][3]), int(sample["facts"][4])
        offsets = sample["offsets"].reshape(-1, 2)
        null = _null_position(sample["input_ids"], self.answers.task)
        starts, ends = scores[:, 0], scores[:, 1]
        n_best, longest = int(scoring["n_best"]), int(scoring["max_answer_len"])
        found = []
        for start in _largest(starts, n_best):
            for end in _largest(ends, n_best):
                if first <= start <= end < first + count and end - start < longest:
                    bounds = int(offsets[start - first, 0]), int(offsets[end - first, 1])
                    found.append((*bounds, float(starts[start]), float(ends[end])))
        found.sort(key=lambda each: -(each[2] + each[3]))
        null_scores = float(starts[null]), float(ends[null])
        self.records.append({"row": row, "null": null_scores, "found": found[:n_best]})


def _null_position(tokens: np.ndarray, task: QuestionAnswering) -> int:
    """Where the labels of a row without the answer point: at the classification token, else at the first one."""
    places = np.flatnonzero(tokens == task.data.special_token_ids.get("cls", -1))
    return int(places[0]) if len(places) else 0


def _largest(scores: np.ndarray, count: int) -> list[int]:
    """Positions of the largest scores, best first; of equal ones the first."""
    return [int(position) for position in np.argsort(-scores, kind="stable")[:count]]


def _ranked(context: str, rows: list[dict[str, Any]], n_best: int, may_be_empty: bool) -> list[dict[str, Any]]:
    """Candidates of one question, best first, with their share of the probability; the empty one, if there may be none
    in the context, among them."""
    found = sorted((each for row in rows for each in row["found"]), key=lambda each: -(each[2] + each[3]))[:n_best]
    candidates = [
        {"text": context[start:stop], "start": start, "start_logit": first, "end_logit": last}
        for start, stop, first, last in found
    ]
    if may_be_empty:
        first, last = min((row["null"] for row in rows), key=sum)
        candidates.append({"text": "", "start": -1, "start_logit": first, "end_logit": last})
    if not candidates:
        candidates.append({"text": "", "start": -1, "start_logit": 0.0, "end_logit": 0.0})
    totals = [candidate["start_logit"] + candidate["end_logit"] for candidate in candidates]
    weights = [math.exp(total - max(totals)) for total in totals]
    for candidate, weight in zip(candidates, weights, strict=True):
        candidate["probability"] = weight / sum(weights)
    return sorted(candidates, key=lambda candidate: -candidate["probability"])


def _chosen(ranked: list[dict[str, Any]], null_threshold: float | None) -> str:
    """The answer; empty where no answer is likelier by more than the threshold (None: there is always one)."""
    best = next((each for each in ranked if each["text"].strip()), None)
    if best is None:
        return ""
    if null_threshold is None:
        return str(best["text"])
    null = next(each for each in ranked if each["start"] < 0)
    lead = (null["start_logit"] + null["end_logit"]) - (best["start_logit"] + best["end_logit"])
    return "" if lead > null_threshold else str(best["text"])
