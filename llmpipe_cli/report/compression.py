"""What compressing a model changed: size, speed and metrics before and after."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from llmpipe_cli.report import formats


def compression_table(report: dict[str, Any]) -> Table:
    """A line a figure.

    Args:
        report: what `llmpipe compress` writes beside the model.
    """
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    table.add_column("")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    table.add_column("ratio", justify="right")
    size, speed = report["bytes"], report["tokens_per_second"]
    rows = [("size", f"{size['before'] / 1e6:,.2f} MB", f"{size['after'] / 1e6:,.2f} MB", size["ratio"])]
    rows.append(
        (
            "forward tokens/s",
            formats.count(speed["before"]),
            formats.count(speed["after"]),
            speed["after"] / speed["before"],
        )
    )
    for *cells, ratio in rows:
        table.add_row(*cells, f"{ratio:.3f}")
    for name in ("neurons", "heads"):
        if name in report:
            table.add_row(f"{name} a layer", str(report[name]["before"]), str(report[name]["after"]), "")
    if "zeros" in report:
        table.add_row("zeros among weights", *(f"{report['zeros'][name]:.1%}" for name in ("before", "after")), "")
    for name, value in report.get("metrics", {}).items():
        table.add_row(name, formats.precise(name, value["before"]), formats.precise(name, value["after"]), "")
    return table
