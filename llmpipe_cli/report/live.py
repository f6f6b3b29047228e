"""The live view of a running job: curve, rates, a bar a stage, last evaluation and checkpoint.

`render` draws a `Progress` for a given size; `LiveView` shows it in a terminal, `PlainView` writes lines elsewhere.
Both are fed line by line and redrawn by their caller, without threads of their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llmpipe_cli.report import curve, formats
from llmpipe_cli.report.progress import Progress, StageUse

ACCENT = "cyan"
LINE = "bold bright_cyan"
VALIDATION = "bold magenta"
BUSY = "green"
WAITING = "yellow"
_MAX_WIDTH = 120
_REDRAW_SECONDS = 0.25
_PLAIN_SECONDS = 5.0
_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class View(Protocol):
    """Something that shows a job while it runs."""

    def start(self) -> None:
        """Begin to show."""

    def stop(self) -> None:
        """Show the last state and leave the terminal as it was."""

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Take in new lines of metrics.jsonl."""

    def say(self, message: str) -> None:
        """Show a notice above the view."""

    def tick(self) -> None:
        """Redraw if it is time to."""


def make_view(progress: Progress, console: Console) -> View:
    """A live view on a capable terminal, plain lines anywhere else (pipes, dumb terminals, NO_COLOR, no UTF-8)."""
    capable = console.is_terminal and not console.is_dumb_terminal and not console.no_color
    if capable and console.encoding.lower().startswith("utf"):
        return LiveView(progress, console)
    return PlainView(progress, console)


class LiveView:
    """Redraws one block at the bottom of the terminal."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress, self._console = progress, console
        self._live = Live(console=console, auto_refresh=False, transient=False, vertical_overflow="crop")
        self._drawn = 0.0
        self._notices = 0

    def start(self) -> None:
        self._live.start()
        self._draw()

    def stop(self) -> None:
        self._draw()
        self._live.stop()

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        for line in lines:
            self._progress.add(line)
        for warning in self._progress.warnings[self._notices :]:
            self.say(f"warning: {warning}")
        self._notices = len(self._progress.warnings)

    def say(self, message: str) -> None:
        self._console.print(Text(message, style="yellow"))

    def tick(self) -> None:
        if time.monotonic() - self._drawn >= _REDRAW_SECONDS:
            self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        size = self._console.size
        # The cursor rests on an empty line: a terminal writes `^C` there, which behind a full line would begin a line
        # that the next drawing does not know of.
        self._live.update(Group(render(self._progress, size.width, size.height - 2), Text()), refresh=True)


class PlainView:
    """Writes a line for the first and the last step, every few seconds in between, and for every event."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress, self._console = progress, console
        self._written = -math.inf
        self._pending: dict[str, Any] | None = None

    def start(self) -> None:
        self.say(f"{self._progress.title}: {self._progress.subtitle}")

    def stop(self) -> None:
        self._flush()

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        for line in lines:
            self._progress.add(line)
            if "event" not in line:
                self._pending = line
                first = len(self._progress.steps) == 1
                if first or time.monotonic() - self._written >= _PLAIN_SECONDS:
                    self._flush()
            elif line["event"] in ("progress", "token"):
                self._say_progress()
            elif self._progress.job == "train" and (text := _event_line(line)) is not None:
                self._flush()
                self.say(text)

    def say(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def tick(self) -> None:
        """Nothing to redraw."""

    def _say_progress(self) -> None:
        now, progress = time.monotonic(), self._progress
        if now - self._written >= _PLAIN_SECONDS:
            self._written = now
            self.say(f"{progress.phase}: {progress.done:,} of {progress.total or 0:,}")

    def _flush(self) -> None:
        if self._pending is not None and "loss" in self._pending:
            self._written = time.monotonic()
            self.say(_step_line(self._progress, self._pending))
        self._pending = None


def render(progress: Progress, width: int, height: int) -> RenderableType:
    """The view as it fits `width` columns and `height` rows; it never takes more than that."""
    width = min(width, _MAX_WIDTH) - 2
    head = [_title(progress, width), Text("─" * width, style="dim"), *_bar(progress, width)]
    if not progress.steps:
        return _indented(head)
    tail = _footer(progress)
    stages = progress.stages()
    numbers = _numbers(progress, width)
    free = height - len(head) - len(numbers) - len(tail) - 2
    # The curve keeps its six rows of ten when there are many stages; two stages are always shown.
    stage_rows = _stage_rows(stages, width, max(2, free - 9))
    curve_rows = max(0, min(10, free - len(stage_rows) - 3))
    body: list[Text] = [Text(), *numbers]
    if curve_rows >= 3:
        body += [
            Text(),
            *curve.draw(
                progress.loss_points(),
                progress.validation_points(),
                width,
                curve_rows,
                line_style=LINE,
                mark_style=VALIDATION,
            ),
        ]
    if stage_rows:
        body += [Text(), *stage_rows]
    if tail and len(head) + len(body) + len(tail) < height:
        body.append(Text())
    return _indented([*head, *body, *tail])


def export_svg(progress: Progress, path: Path, width: int = 100) -> None:
    """Draw the view of a run into an SVG file."""
    rendered = render(progress, width, 28)
    with Path("/dev/null").open("w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=width, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(rendered)
        path.write_text(console.export_svg(title=f"llmpipe {progress.job}"), encoding="utf-8")


def _indented(rows: list[Text]) -> RenderableType:
    indented = [Text(" ") + row for row in rows]
    for row in indented:
        row.no_wrap, row.overflow = True, "crop"
    return Group(*indented)


def _title(progress: Progress, width: int) -> Text:
    left = Text.assemble(("llmpipe", f"bold {ACCENT}"), "  ", (progress.title, "bold"))
    return _spread(left, Text(progress.subtitle, style="dim"), width)


def _bar(progress: Progress, width: int) -> list[Text]:
    if not progress.steps and progress.fraction == 0.0:
        frame = _FRAMES[int(time.monotonic() * 8) % len(_FRAMES)]
        return [Text.assemble((frame, ACCENT), " ", progress.phase)]
    if progress.max_steps and not progress.total:
        left = Text.assemble("step ", (f"{progress.step:,}", "bold"), f" of {progress.max_steps:,} ")
        rest = progress.ended or f"{formats.duration(progress.seconds_left())} left"
        right = Text(f" {formats.percent(progress.fraction):>4}   {rest}")
        if progress.fraction >= 1.0:
            right = Text(f" {progress.phase}" if progress.phase != "training" else " finishing")
    else:
        left = Text(f"{progress.phase} ")
        right = Text(f" {formats.percent(progress.fraction):>4}")
    length = max(4, width - left.cell_len - right.cell_len)
    filled = round(progress.fraction * length)
    return [left + Text("━" * filled, style=ACCENT) + Text("━" * (length - filled), style="bright_black") + right]


def _numbers(progress: Progress, width: int) -> list[Text]:
    last = progress.last
    pairs = [
        ("loss", formats.loss(last.get("loss"))),
        ("tokens/s", formats.count(progress.tokens_per_second())),
        ("learning rate", formats.learning_rate(last.get("learning_rate"))),
        ("grad norm", formats.loss(last.get("grad_norm"))),
    ]
    if last.get("aux_loss"):
        pairs.insert(1, ("aux loss", formats.loss(last["aux_loss"])))
    if last.get("epoch") is not None and width >= 90:
        pairs.append(("epoch", f"{last['epoch']:.2f}"))
    cells = [
        Text.assemble((name, "dim"), " ", (value, f"bold {ACCENT}" if index == 0 else "bold"))
        for index, (name, value) in enumerate(pairs)
    ]
    while len(cells) > 1 and sum(cell.cell_len + 2 for cell in cells) - 2 > width:
        cells.pop()
    spare = width - sum(cell.cell_len for cell in cells)
    gap = min(9, spare // max(1, len(cells) - 1))
    return [Text(" " * gap).join(cells)]


def _stage_rows(stages: list[StageUse], width: int, limit: int) -> list[Text]:
    if not stages:
        return []
    shown = stages if len(stages) <= limit else stages[: limit - 1]
    digits = len(str(len(stages) - 1))
    rows = [_stage_row(f"stage {index:>{digits}}", stage, width) for index, stage in enumerate(shown)]
    rest = stages[len(shown) :]
    if rest:
        busy = [stage.busy for stage in rest]
        rows.append(
            Text(
                f"and {len(rest)} more stages, busy {formats.percent(min(busy))} to {formats.percent(max(busy))}",
                style="dim",
            )
        )
    return rows


def _stage_row(name: str, stage: StageUse, width: int) -> Text:
    right = Text.assemble(
        (f" {formats.percent(stage.busy):>4}", BUSY),
        (" busy ", "dim"),
        (f"{formats.percent(stage.waiting):>4}", WAITING),
        (" waiting ", "dim"),
        f"{formats.memory(stage.memory_bytes):>9}",
    )
    left = Text(f"{name} ")
    length = max(4, width - left.cell_len - right.cell_len)
    busy = round(stage.busy * length)
    return left + Text("█" * busy, style=BUSY) + Text("░" * (length - busy), style=WAITING) + right


def _footer(progress: Progress) -> list[Text]:
    rows = []
    if progress.evaluations and progress.job == "train":
        rows.append(_evaluation_row(progress.evaluations[-1]))
    if progress.checkpoint:
        rows.append(_checkpoint_row(progress.checkpoint))
    return rows


def _evaluation_row(line: dict[str, Any]) -> Text:
    row = Text.assemble(("validation ", VALIDATION))
    for name, value in list(line.get("metrics", {}).items())[:4]:
        if isinstance(value, (int, float)):
            row.append(f" {name} ", style="dim").append(formats.metric(name, value), style="bold")
    return row.append(f"  at step {line.get('step', 0):,}", style="dim")


def _checkpoint_row(line: dict[str, Any]) -> Text:
    row = Text.assemble(("checkpoint ", f"bold {ACCENT}"), f" {Path(str(line.get('path', ''))).name}")
    if line.get("seconds") is not None:
        row.append(f"  saved in {line['seconds']:.1f} s", style="dim")
    return row


def _spread(left: Text, right: Text, width: int) -> Text:
    """`left` at the left and `right` at the right edge; `right` is left out where there is no room."""
    gap = width - left.cell_len - right.cell_len
    return left + Text(" " * gap) + right if gap >= 2 else left


def _step_line(progress: Progress, line: dict[str, Any]) -> str:
    of = f"/{progress.max_steps}" if progress.max_steps else ""
    return (
        f"step {line['step']}{of}  loss {formats.loss(line['loss'])}"
        f"  learning rate {formats.learning_rate(line.get('learning_rate'))}"
        f"  grad norm {formats.loss(line.get('grad_norm'))}"
        f"  {formats.count(progress.tokens_per_second())} tokens/s  {formats.duration(progress.seconds_left())} left"
    )


def _event_line(line: dict[str, Any]) -> str | None:
    event = line["event"]
    if event == "evaluation":
        return _evaluation_row(line).plain
    if event == "checkpoint":
        return _checkpoint_row(line).plain
    if event in ("warning", "fault"):
        return f"{event}: {line.get('message', '')}"
    if event == "resume":
        return f"goes on from step {line.get('step')}"
    return None


def stage_table(stages: list[StageUse]) -> Table:
    """Use of each stage as a table."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("stage", "busy", "waiting", "peak memory"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for index, stage in enumerate(stages):
        cells = [formats.percent(stage.busy), formats.percent(stage.waiting), formats.memory(stage.memory_bytes)]
        table.add_row(str(index), *cells)
    return table
