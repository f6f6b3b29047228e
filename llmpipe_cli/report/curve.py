"""A line chart made of braille characters, for terminals.

Each character cell holds 2 x 4 dots. The first series is drawn as a line, later ones as points over it in their own
colour; a labelled axis stands at the left and below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.text import Text

Points = Sequence[tuple[float, float]]

_BRAILLE = 0x2800
_DOT_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def draw(line: Points, marks: Points, width: int, height: int, *, line_style: str, mark_style: str) -> list[Text]:
    """Chart rows, each exactly `width` characters wide: `height` rows of curve and two of axis.

    Args:
        line: (x, y) with rising x.
        marks: single points drawn over the line.
        width: characters, axis labels included.
        height: rows of the curve.
        line_style: rich style of the line.
        mark_style: rich style of the marks.
    """
    low, high = _range([y for _, y in [*line, *marks]])
    labels = [_label(value, high - low) for value in (high, (low + high) / 2, low)]
    margin = max(len(label) for label in labels) + 2
    columns = max(8, width - margin)
    steps = [x for x, _ in [*line, *marks]] or [0.0]
    first, last = min(steps), max(steps)
    canvas = _Canvas(columns, height, (first, max(last, first + 1)), (low, high))
    canvas.draw_line(_thin(line, columns * 2))
    canvas.draw_marks(marks)

    label_rows = {0: labels[0], height - 1: labels[2]}
    if height >= 5:
        label_rows[(height - 1) // 2] = labels[1]
    rows = []
    for row in range(height):
        label = label_rows.get(row, "")
        axis = Text.assemble((f"{label:>{margin - 2}} {'┤' if label else '│'}", "dim"))
        rows.append(axis + canvas.row(row, line_style, mark_style))
    rows.append(Text(" " * (margin - 1) + "└" + "─" * columns, style="dim"))
    start, end = f"{first:.0f}", f"step {max(last, first):.0f}"
    rows.append(Text(" " * margin + start + end.rjust(columns - len(start)), style="dim"))
    return rows


class _Canvas:
    def __init__(self, columns: int, rows: int, x: tuple[float, float], y: tuple[float, float]) -> None:
        self._columns, self._rows = columns, rows
        self._x, self._y = x, y
        self._dots = [[0] * columns for _ in range(rows)]
        self._marks: dict[tuple[int, int], int] = {}

    def draw_line(self, points: Points) -> None:
        dots = [self._dot(point) for point in points]
        for before, after in zip(dots, dots[1:] or dots, strict=False):
            self._segment(before, after)

    def draw_marks(self, points: Points) -> None:
        for point in points:
            column, row = self._dot(point)
            for x in (column, column ^ 1):
                for y in (row, row ^ 1):
                    cell = (y // 4, x // 2)
                    self._marks[cell] = self._marks.get(cell, 0) | _DOT_BITS[x % 2][y % 4]

    def row(self, row: int, line_style: str, mark_style: str) -> Text:
        text = Text()
        for column in range(self._columns):
            mark = self._marks.get((row, column), 0)
            bits = self._dots[row][column] | mark
            text.append(chr(_BRAILLE | bits) if bits else " ", style=mark_style if mark else line_style)
        return text

    def _dot(self, point: tuple[float, float]) -> tuple[int, int]:
        wide, tall = self._columns * 2 - 1, self._rows * 4 - 1
        across = (point[0] - self._x[0]) / (self._x[1] - self._x[0])
        up = (point[1] - self._y[0]) / (self._y[1] - self._y[0])
        return round(min(1.0, max(0.0, across)) * wide), round((1.0 - min(1.0, max(0.0, up))) * tall)

    def _segment(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
        for index in range(length + 1):
            x = round(start[0] + (end[0] - start[0]) * index / length)
            y = round(start[1] + (end[1] - start[1]) * index / length)
            self._dots[y // 4][x // 2] |= _DOT_BITS[x % 2][y % 4]


def _thin(points: Points, limit: int) -> list[tuple[float, float]]:
    """At most `limit` points: means of equally many neighbours, the last point kept as it is."""
    if len(points) <= limit:
        return list(points)
    thinned = []
    for index in range(limit):
        chunk = points[index * len(points) // limit : (index + 1) * len(points) // limit]
        thinned.append((sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)))
    return [*thinned, points[-1]]


def _range(values: list[float]) -> tuple[float, float]:
    """Lowest and highest value, never equal."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    # Less than a hundredth of the loss would draw nothing but rounding.
    missing = max(abs(high) * 0.01, 1e-6) - (high - low)
    return (low - missing / 2, high + missing / 2) if missing > 0 else (low, high)


def _label(value: float, span: float) -> str:
    """As many digits as tell three labels apart that are `span` / 2 away from each other."""
    digits = max(1 if abs(value) >= 10 else 2, math.ceil(-math.log10(span)) + 1)
    return f"{value:.{digits}f}"
