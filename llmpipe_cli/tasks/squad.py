"""SQuAD's scores: exact match and F1 over the words of an answer (Rajpurkar et al. 2016, 2018).

Answers are compared in lower case, without punctuation, without the articles a, an and the, and with single spaces. Of
several right answers the one that gives the best score counts. A question without an answer is answered rightly by an
empty text. All figures are percentages; `HasAns_*` and `NoAns_*` are given where some question has no answer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """An answer as it is compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 where both are the same once normalised, else 0."""
    return float(normalised(prediction) == normalised(answer))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words, each counted as often as it occurs; of two texts of which one
    has no words, whether both have none."""
    predicted, right = normalised(prediction).split(), normalised(answer).split()
    if not predicted or not right:
        return float(predicted == right)
    common = sum((Counter(predicted) & Counter(right)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(right)
    return 2 * precision * recall / (precision + recall)


def squad_scores(predictions: dict[str, str], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The scores of a set of predictions.

    Args:
        predictions: text by question id; a missing one counts as wrong, as the official script does for v1.
        examples: questions with `id` and `answers`, a list of texts that is empty where there is no answer.
    """
    exact: dict[bool, list[float]] = {True: [], False: []}
    overlap: dict[bool, list[float]] = {True: [], False: []}
    for example in examples:
        # An answer of which nothing is left does not count; a question without any is answered by an empty text.
        answers = [answer for answer in example["answers"] if normalised(answer)]
        has_answer = bool(example["answers"])
        prediction = predictions.get(example["id"])
        right = answers or [""]
        exact[has_answer].append(0.0 if prediction is None else max(exact_match(prediction, each) for each in right))
        overlap[has_answer].append(0.0 if prediction is None else max(f1(prediction, each) for each in right))
    scores = {"exact_match": _mean(exact[True] + exact[False]), "f1": _mean(overlap[True] + overlap[False])}
    if exact[False]:
        for name, part in (("HasAns", True), ("NoAns", False)):
            if exact[part]:
                scores |= {f"{name}_exact": _mean(exact[part]), f"{name}_f1": _mean(overlap[part])}
                scores[f"{name}_total"] = float(len(exact[part]))
    return scores


def _mean(values: list[float]) -> float:
    return 100.0 * sum(values) / len(values) if values else float("nan")
