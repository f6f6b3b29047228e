"""Prepared data for people: how much there is, and samples token by token in colour."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from llmpipe_cli.data.prepared import PreparedData
    from llmpipe_cli.tasks.view import SampleView

_TARGET, _CONTEXT, _LABEL = "bold green", "dim", "bold magenta"


def data_summary(data: PreparedData) -> RenderableType:
    """Samples, documents and tokens of each split, what was left out or cut with its first places, and the cache."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    for title in ("split", "samples", "documents", "tokens", "left out", "cut"):
        table.add_column(title, justify="left" if title == "split" else "right")
    notes: list[Text] = []
    for name, split in (("train", data.train), ("validation", data.validation)):
        if split is None:
            continue
        if split.kind == "stream":
            table.add_row(name, "a stream")
            continue
        figures = (split.num_samples, split.num_documents, split.num_tokens, split.num_skipped, split.num_truncated)
        table.add_row(name, *(f"{figure:,}" for figure in figures))
        for part, draws in zip(split.parts, split.draws, strict=True):
            figures = (part.num_samples, part.num_documents, part.num_tokens, part.num_skipped, part.num_truncated)
            table.add_row(f"  {part.origin}", *(f"{figure:,}" for figure in figures))
            share, times = draws / split.num_samples, draws / part.num_samples
            notes.append(Text(f"{part.origin}: {draws:,} samples an epoch ({share:.1%}), each {times:.2f} times"))
        notes += [Text(f"left out of {name}: {example}", style="yellow") for example in split.skipped_examples]
        notes += [Text(f"cut in {name}: {place}", style="yellow") for place in split.truncated_examples]
        folders = [part.directory for part in split.parts or [split]]
        notes += [Text(f"{name} lies in {folder or 'no file: random ids'}", style="dim") for folder in folders]
    if data.label_names:
        notes.insert(0, Text("labels: " + ", ".join(data.label_names)))
    return Group(table, *notes)


def sample_view(view: SampleView) -> RenderableType:
    """One sample: targets green, everything else dim, predictions that are not the token itself behind it."""
    line = Text()
    for token in view.tokens:
        line.append(token.text, style=_TARGET if token.is_target else _CONTEXT)
        if token.target is not None:
            line.append(f"[{token.target.strip()}]", style=_LABEL)
    parts: list[RenderableType] = [Text(f"sample {view.index}", style="bold"), line]
    if view.labels is not None:
        parts.append(Text.assemble(("label: ", _CONTEXT), (view.labels, _LABEL)))
    targets = sum(token.is_target for token in view.tokens)
    figures = f"{len(view.tokens)} tokens, {targets} targets, {view.num_padding} padding"
    return Group(*parts, Text(figures, style=_CONTEXT), Text())


def sample_as_json(view: SampleView) -> dict[str, Any]:
    """One sample as plain values."""
    return asdict(view)
