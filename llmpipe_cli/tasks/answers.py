"""Questions with long contexts as rows of tokens: overlapping windows, and where the answer lies in each.

A row is the question and as much of the context as fits; the next one begins `stride` tokens before the end of this
one, so that every answer that is shorter lies whole in one of them (Devlin et al. 2019). Where a row does not hold the
whole answer, or there is none, both labels point at the classification token (the first token, without one).

`facts` of a row are [1 for the first row of its question else 0, label of the answer's first token, of its last,
position of the context's first token, number of tokens of the context in this row]; `offsets` the first and
last-plus-one character of each token of the context, one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmpipe_cli.data.tokenizer import Encoder

FACTS = ("is_first", "start", "end", "context_start", "num_context")


def encode_question(
    encoder: Encoder, value: dict[str, Any], max_length: int, stride: int, *, scored: bool
) -> list[dict[str, list[int]]]:
    """The rows of one question, by column.

    Raises:
        ValueError: the question leaves no room for the context.
    """
    rows = []
    windows = encoder.encode_windows(value["question"].lstrip(), value["context"], max_length, stride)
    for number, window in enumerate(windows):
        first, count = window.context_start, len(window.offsets)
        start, end = _labels(window.offsets, first, value["answers"], window.null_position)
        row = {
            "input_ids": window.ids,
            "token_types": window.type_ids,
            "facts": [int(number == 0), start, end, first, count],
        }
        if scored:
            row["offsets"] = [bound for offset in window.offsets for bound in offset]
        rows.append(row)
    return rows


def _labels(
    offsets: list[tuple[int, int]], first: int, answers: list[tuple[str, int]], null_position: int
) -> tuple[int, int]:
    """Positions of the first and the last token of the first answer."""
    if not answers or not offsets:
        return null_position, null_position
    text, begin = answers[0]
    stop = begin + len(text)
    if offsets[0][0] > begin or offsets[-1][1] < stop:
        return null_position, null_position
    start = max(index for index, (left, _) in enumerate(offsets) if left <= begin)
    end = min(index for index, (_, right) in enumerate(offsets) if right >= stop)
    return first + start, first + end
