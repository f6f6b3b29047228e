"""Scoring of generated texts: every source of the validation data is translated, and the result compared.

The texts go to hypotheses.txt and references.txt in the run directory, one a line (line ends inside a text become
spaces), so that any other tool can score them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from llmpipe_cli.data.dataset import open_split
from llmpipe_cli.data.prepared import PreparedSplit
from llmpipe_cli.data.store import read_examples
from llmpipe_cli.engine.exchange import gather_json
from llmpipe_cli.engine.executor import StageExecutor
from llmpipe_cli.run import write_text
from llmpipe_cli.tasks.text_scores import text_scores
from llmpipe_cli.worker.generation import Generator, generate_hypotheses
from llmpipe_cli.worker.process import Context
from llmpipe_cli.worker.sampling import GenerationSettings
from llmpipe_cli.worker.stop import StopRequested


@dataclass(frozen=True)
class TextScores:
    """Scores of the generated texts, and how they were computed; empty on ranks other than 0."""

    metrics: dict[str, float]
    signatures: list[str]


def score_hypotheses(context: Context, executor: StageExecutor, split: PreparedSplit, tokenizer_dir: str) -> TextScores:
    """Generate a text for each source of the split and score it; all ranks call this together.

    Raises:
        StopRequested: a rank was asked to stop.
    """
    options = context.recipe.evaluation
    examples = read_examples(Path(split.directory))
    samples = open_split(split)
    sources = [samples[index]["input_ids"].tolist() for index in range(len(samples))]
    settings = GenerationSettings(options.max_new_tokens or split.target_sequence_len, options.num_beams)
    tokens = _generate(context, executor, sources, settings)
    if not context.is_first:
        return TextScores({}, [])
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    hypotheses = [_line(str(tokenizer.decode(row, skip_special_tokens=True))) for row in tokens]
    references = [_line(example["target"]) for example in examples]
    for name, texts in (("hypotheses.txt", hypotheses), ("references.txt", references)):
        write_text(context.run.path / name, "".join(f"{text}\n" for text in texts))
    return TextScores(*text_scores(hypotheses, references, options.text_metrics, bleu_tokenize=options.bleu_tokenize))


def _generate(
    context: Context, executor: StageExecutor, sources: list[list[int]], settings: GenerationSettings
) -> list[list[int]]:
    """The new tokens of every source, on all ranks; the sources are dealt to the replicas."""
    replicas = context.plan.layout.data
    generator = Generator(context, executor, context.stop.is_set)
    mine = sources[context.replica :: replicas]
    try:
        tokens = generate_hypotheses(context, executor, mine, settings, generator=generator)
    except StopRequested:
        answer = None
    else:
        speaks = context.stage == 0 and context.shard == 0  # the others of its replica have the same tokens
        answer = {"replica": context.replica, "tokens": tokens if speaks else []}
    answers = gather_json(answer)
    if None in answers:
        raise StopRequested
    results: list[list[int]] = [[] for _ in sources]
    for each in answers:
        if each["tokens"]:
            results[each["replica"] :: replicas] = each["tokens"]
    return results


def _line(text: str) -> str:
    return " ".join(text.split())
