"""What each rank did during one step, drawn: a Gantt in the terminal, as PNG or SVG, and a trace for Perfetto.

The worker writes timeline/step-00000003.json with every rank's records (`engine.recorder`). Clocks of different nodes
differ, so the ranks are laid over each other where their step ended: in an exchange that none leaves before all are in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from llmpipe_cli.engine.schedules import SCHEDULES, Instruction, Placement
from llmpipe_cli.errors import UsageError
from llmpipe_cli.plan.simulate import play
from llmpipe_cli.report import formats
from llmpipe_cli.run import RunDirectory, read_json, write_json

_FILE = re.compile(r"^step-(\d+)\.json$")
WAIT = "wait"
# kind -> (letter, name, color)
_KINDS = {
    "F": ("F", "forward", "#3b6fd4"),
    "B": ("B", "backward", "#2f8f4e"),
    "I": ("I", "input gradients", "#2f8f4e"),
    "W": ("W", "weight gradients", "#8fbf4d"),
    WAIT: ("·", "waiting", "#d9dde1"),
    "data": ("d", "reading data", "#8a6d1d"),
    "send": ("s", "sending", "#b8348b"),
    "reduce": ("r", "reducing gradients", "#d1603d"),
    "optimizer": ("o", "optimizer", "#5b4b9a"),
}
_INK = "#20262c"


@dataclass(frozen=True)
class Bar:
    """A stretch of one rank's step in which it did one thing; times in seconds from the step's first record."""

    kind: str
    micro_batch: int | None
    start: float
    end: float
    chunk: int = 0

    @property
    def instruction(self) -> Instruction:
        """What the schedule had here; of bars of `RankTimeline.instructions` only."""
        assert self.micro_batch is not None
        return Instruction(self.kind, self.micro_batch, self.chunk)  # type: ignore[arg-type]


@dataclass(frozen=True)
class RankTimeline:
    """One rank's step, in order."""

    rank: int
    stage: int
    replica: int
    bars: list[Bar]
    peak_activations: int = 0

    def seconds(self, kind: str) -> float:
        """All time spent on this kind."""
        return sum(bar.end - bar.start for bar in self.bars if bar.kind == kind)

    def instructions(self) -> list[Bar]:
        """The work of the pipeline: forward and backward passes."""
        return [bar for bar in self.bars if bar.kind in ("F", "B", "I", "W")]


@dataclass(frozen=True)
class Timeline:
    """One step of all ranks; `name` says what it is where it is no whole step of a run."""

    step: int
    schedule: str
    ranks: list[RankTimeline]
    virtual_stages: int = 1
    name: str = ""

    @property
    def placement(self) -> Placement:
        """Which stage holds which part of the model."""
        num_stages = 1 + max(rank.stage for rank in self.ranks)
        if self.virtual_stages == 1:
            return Placement(num_stages)
        return SCHEDULES[self.schedule].placement(num_stages, self.virtual_stages)

    @property
    def seconds(self) -> float:
        """Length of the step."""
        return max(bar.end for rank in self.ranks for bar in rank.bars)


def steps_recorded(run: RunDirectory) -> list[int]:
    """Steps of the run that have a timeline, rising."""
    matches = (_FILE.match(path.name) for path in run.timeline.glob("step-*.json"))
    return sorted(int(match[1]) for match in matches if match)


def load_timeline(run: RunDirectory, step: int | None = None) -> Timeline:
    """The timeline of a step, by default the last one recorded.

    Raises:
        UsageError: there is none, or none of this step.
    """
    steps = steps_recorded(run)
    if not steps:
        raise UsageError("the run has no timeline", where=str(run.path), hint="training writes one at its third step")
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps))
        raise UsageError(f"step {step} was not recorded", where=str(run.path), hint=f"recorded: {known}")
    path = run.timeline / f"step-{steps[-1] if step is None else step:08d}.json"
    written = read_json(path)
    if not isinstance(written, dict):
        raise UsageError("the timeline cannot be read", where=str(path))
    return parse_timeline(written)


def parse_timeline(written: dict[str, Any]) -> Timeline:
    """A timeline from what the worker wrote; waiting becomes bars of its own."""
    ends = [rank["records"][-1]["end"] for rank in written["ranks"]]
    ranks = []
    for rank, end in zip(written["ranks"], ends, strict=True):
        shift = max(ends) - end
        bars: list[Bar] = []
        for record in rank["records"]:
            begin, start, stop = (record[name] + shift for name in ("begin", "start", "end"))
            if start > begin:
                bars.append(Bar(WAIT, record["micro_batch"], begin, start, record.get("chunk", 0)))
            if stop > start:
                bars.append(Bar(record["kind"], record["micro_batch"], start, stop, record.get("chunk", 0)))
        peak = rank.get("peak_activations", 0)
        ranks.append(RankTimeline(rank["rank"], rank["stage"], rank["replica"], bars, peak))
    return Timeline(written["step"], written["schedule"], ranks, written.get("virtual_stages", 1))


def summary(timeline: Timeline) -> dict[str, Any]:
    """Where the step's time went, and what the pipeline would take if nothing but its schedule made it wait.

    Returns:
        ``ranks``: seconds of each kind; ``pipeline_seconds``: from the first instruction's start to the last one's end;
        ``bubble_fraction``: mean idle share of the stages in that time; ``simulated_pipeline_seconds`` and
        ``simulated_bubble_fraction``: the same instructions, each with its own time, played through without transfers;
        ``simulated_step_seconds``: the whole step that way (`simulated_step`).
    """
    ranks = [
        {
            "rank": rank.rank,
            "stage": rank.stage,
            "replica": rank.replica,
            "seconds": {kind: rank.seconds(kind) for kind in _KINDS if rank.seconds(kind)},
        }
        for rank in timeline.ranks
    ]
    first = [rank for rank in timeline.ranks if rank.replica == 0]
    work = [rank.instructions() for rank in first]
    length = max(bars[-1].end for bars in work) - min(bars[0].start for bars in work)
    busy = sum(bar.end - bar.start for bars in work for bar in bars) / len(work)
    orders = [[bar.instruction for bar in bars] for bars in work]
    played = play(orders, [[bar.end - bar.start for bar in bars] for bars in work], 0.0, timeline.placement)
    played_busy = sum(span.end - span.start for span in played.spans) / len(work)
    return {
        "step": timeline.step,
        "schedule": timeline.schedule,
        "step_seconds": timeline.seconds,
        "pipeline_seconds": length,
        "bubble_fraction": 1.0 - busy / length,
        "simulated_pipeline_seconds": played.step,
        "simulated_bubble_fraction": 1.0 - played_busy / played.step,
        "simulated_step_seconds": simulated_step(timeline),
        "ranks": ranks,
        "verdict": verdict(timeline),
    }


def simulated_step(timeline: Timeline) -> float:
    """Length that the step would have if ranks waited for nothing but their instructions' inputs and for each other
    where all of them meet: the recorded times played through, without transfers and without what no record names."""
    ranks = [rank for rank in timeline.ranks if rank.replica == 0]
    orders, durations, tails = [], [], []
    for rank in ranks:
        work = rank.instructions()
        before = sum(bar.end - bar.start for bar in rank.bars if bar.end <= work[0].start and bar.kind != WAIT)
        seconds = [bar.end - bar.start for bar in work]
        orders.append([bar.instruction for bar in work])
        durations.append([before + seconds[0], *seconds[1:]])
        tails.append([bar for bar in rank.bars if bar.start >= work[-1].end])
    spans = play(orders, durations, 0.0, timeline.placement).spans
    clock = [max(span.end for span in spans if span.stage == stage) for stage in range(len(ranks))]
    meetings = min(sum(bar.kind == WAIT for bar in tail) for tail in tails)
    for _ in range(meetings):
        for index, tail in enumerate(tails):
            while (bar := tail.pop(0)).kind != WAIT:
                clock[index] += bar.end - bar.start
        clock = [max(clock)] * len(clock)
    rest = (sum(bar.end - bar.start for bar in tail if bar.kind != WAIT) for tail in tails)
    return max(time + more for time, more in zip(clock, rest, strict=True))


def describe(facts: dict[str, Any]) -> str:
    """`summary` in words."""
    pipeline, simulated = facts["pipeline_seconds"], facts["simulated_pipeline_seconds"]
    return (
        f"pipeline {pipeline:.3f} s, idle {facts['bubble_fraction']:.1%}; the schedule alone, with these times: "
        f"{simulated:.3f} s, idle {facts['simulated_bubble_fraction']:.1%}\n"
        f"whole step {facts['step_seconds']:.3f} s; with these times {facts['simulated_step_seconds']:.3f} s\n"
        f"{facts['verdict']}"
    )


def verdict(timeline: Timeline) -> str:
    """The slowest stage, and why the step is no shorter."""
    busy = [sum(bar.end - bar.start for bar in rank.instructions()) for rank in timeline.ranks]
    slowest = max(range(len(busy)), key=busy.__getitem__)
    rank, total = timeline.ranks[slowest], timeline.seconds
    mean = sum(busy) / len(busy)
    others = {kind: rank.seconds(kind) for kind in ("data", "send", "reduce", "optimizer", WAIT)}
    kind = max(others, key=others.__getitem__)
    text = f"stage {rank.stage} computes longest: {formats.percent(busy[slowest] / total)} of the step"
    if len(busy) > 1 and busy[slowest] > 1.05 * mean:
        text += f", {formats.percent(busy[slowest] / mean - 1.0)} more than the mean stage (uneven cut)"
    if others[kind] > 0.02 * total:
        text += f"; then {_KINDS[kind][1]}: {formats.percent(others[kind] / total)}"
    return text


def render(timeline: Timeline, width: int = 100) -> Text:
    """The step for a terminal: one row a rank, time from left to right, each column what took most of its time."""
    label = max(len(_label(rank)) for rank in timeline.ranks)
    columns = max(20, width - label - 2)
    text = Text(no_wrap=True, overflow="crop")
    title = f"{timeline.name or f'step {timeline.step}'} · {timeline.schedule} · {timeline.seconds:.3f} s"
    text.append(title + "\n", style="bold")
    for rank in timeline.ranks:
        text.append(f"{_label(rank):>{label}}  ")
        for kind in _columns(rank, timeline.seconds, columns):
            letter, _, color = _KINDS.get(kind, (" ", "", "default"))
            text.append(letter, style=f"{_INK} on {color}" if kind in _KINDS else "")
        text.append("\n")
    used = [kind for kind in _KINDS if any(rank.seconds(kind) for rank in timeline.ranks)]
    text.append(" " * (label + 2))
    for kind in used:
        letter, name, color = _KINDS[kind]
        text.append(f" {letter} ", style=f"{_INK} on {color}")
        text.append(f" {name}  ")
    return text


def _label(rank: RankTimeline) -> str:
    return f"stage {rank.stage}" + (f" replica {rank.replica}" if rank.replica else "")


def _number(bar: Bar) -> str:
    """The bar's micro-batch, with an apostrophe for each chunk before its own."""
    return f"{bar.micro_batch}{'′' * bar.chunk}"


def _columns(rank: RankTimeline, seconds: float, columns: int) -> list[str]:
    """The kind that fills most of each of `columns` equal stretches of the step; empty for none."""
    filled: list[dict[str, float]] = [{} for _ in range(columns)]
    width = seconds / columns
    for bar in rank.bars:
        for column in range(int(bar.start / width), min(columns - 1, int(bar.end / width)) + 1):
            overlap = min(bar.end, (column + 1) * width) - max(bar.start, column * width)
            if overlap > 0.0:
                filled[column][bar.kind] = filled[column].get(bar.kind, 0.0) + overlap
    return [max(kinds, key=kinds.__getitem__) if kinds else "" for kinds in filled]


def plot(timeline: Timeline, path: Path) -> Path:
    """Draw the step into a PNG or SVG, by the name's ending."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    height = 1.2 + 0.55 * len(timeline.ranks)
    figure, axes = plt.subplots(figsize=(11, height), layout="constrained")
    for row, rank in enumerate(timeline.ranks):
        for bar in rank.bars:
            _, _, color = _KINDS.get(bar.kind, ("", "", "#ffffff"))
            axes.barh(
                row, bar.end - bar.start, left=bar.start, height=0.8, color=color, edgecolor="white", linewidth=0.4
            )
            wide = bar.end - bar.start > 0.015 * timeline.seconds
            if bar.micro_batch is not None and bar.kind != WAIT and wide:
                middle = (bar.start + bar.end) / 2
                axes.text(middle, row, _number(bar), ha="center", va="center", color="white", fontsize=8)
    axes.set_yticks(range(len(timeline.ranks)), [_label(rank) for rank in timeline.ranks])
    axes.invert_yaxis()
    axes.set_xlim(0.0, timeline.seconds)
    axes.set_xlabel("seconds")
    axes.set_title(f"{timeline.name or f'step {timeline.step}'}, {timeline.schedule}", loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    used = [kind for kind in _KINDS if any(rank.seconds(kind) for rank in timeline.ranks)]
    handles = [Patch(color=_KINDS[kind][2], label=_KINDS[kind][1]) for kind in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(used), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def write_trace(timeline: Timeline, path: Path) -> Path:
    """Write the step as Chrome-trace JSON, which ui.perfetto.dev and chrome://tracing open."""
    events: list[dict[str, Any]] = []
    for rank in timeline.ranks:
        place = {"pid": rank.replica, "tid": rank.stage}
        events.append({"name": "process_name", "ph": "M", **place, "args": {"name": f"replica {rank.replica}"}})
        events.append({"name": "thread_name", "ph": "M", **place, "args": {"name": f"stage {rank.stage}"}})
        for bar in rank.bars:
            name = _KINDS.get(bar.kind, ("", bar.kind, ""))[1]
            events.append(
                {
                    "name": name if bar.micro_batch is None else f"{name} {bar.micro_batch}",
                    "cat": bar.kind,
                    "ph": "X",
                    "ts": bar.start * 1e6,
                    "dur": (bar.end - bar.start) * 1e6,
                    **place,
                    "args": {"micro_batch": bar.micro_batch, "chunk": bar.chunk, "rank": rank.rank},
                }
            )
    write_json(path, {"traceEvents": events, "displayTimeUnit": "ms"})
    return path
