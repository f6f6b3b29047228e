"""Scores of generated texts against one reference each: BLEU and chrF by sacrebleu, ROUGE by rouge-score.

BLEU and chrF are corpus scores from 0 to 100 (Papineni et al. 2002; Popovic 2015; Post 2018 on signatures): the same as
``sacrebleu references.txt -i hypotheses.txt -m bleu chrf`` gives on the files that an evaluation writes. ROUGE is the
mean F-measure over the texts, times 100, with stemming (Lin 2004); `rougeLsum` takes each line for a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from llmpipe_cli.errors import UsageError

TextMetric = Literal["bleu", "chrf", "rouge"]
_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def text_scores(
    hypotheses: Sequence[str], references: Sequence[str], metrics: Sequence[TextMetric], *, bleu_tokenize: str = "13a"
) -> tuple[dict[str, float], list[str]]:
    """The scores, and the signatures that say how they were computed.

    Raises:
        UsageError: a package is missing, or sacrebleu has no such tokenizer.
    """
    scores: dict[str, float] = {}
    signatures = []
    if "bleu" in metrics or "chrf" in metrics:
        from sacrebleu.metrics import BLEU, CHRF

        if bleu_tokenize not in BLEU.TOKENIZERS:
            raise UsageError(
                f"sacrebleu has no tokenizer {bleu_tokenize!r}",
                where="evaluation.bleu_tokenize",
                hint=f"one of {', '.join(sorted(BLEU.TOKENIZERS))}",
            )
        for name, metric in (("bleu", BLEU(tokenize=bleu_tokenize)), ("chrf", CHRF())):
            if name in metrics:
                scores[name] = metric.corpus_score(list(hypotheses), [list(references)]).score
                signatures.append(f"{name}:{metric.get_signature()}")
    if "rouge" in metrics:
        scores |= _rouge(hypotheses, references)
    return scores, signatures


def _rouge(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UsageError(
            "ROUGE needs the package rouge-score", where="evaluation.text_metrics", hint="pip install rouge-score"
        ) from None
    scorer = RougeScorer(list(_ROUGE), use_stemmer=True)
    rows = [scorer.score(reference, found) for reference, found in zip(references, hypotheses, strict=True)]
    return {name: 100.0 * sum(row[name].fmeasure for row in rows) / len(rows) for name in _ROUGE}
