"""Numbers as people read them: durations, memory, rates and losses; used by every report."""

from __future__ import annotations

import math


def duration(seconds: float | None) -> str:
    """`0:42`, `12:05`, `2 h 05 min`, `3 d 4 h`; a dash for an unknown one."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return "–"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    minutes = whole // 60
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = minutes // 60
    return f"{hours // 24} d {hours % 24} h"


def memory(num_bytes: float | None) -> str:
    """`312 MiB`, `1.4 GiB`; a dash for an unknown one."""
    if not num_bytes:
        return "–"
    if num_bytes < 1000 * 2**20:
        return f"{num_bytes / 2**20:.0f} MiB"
    return f"{num_bytes / 2**30:.{1 if num_bytes < 100 * 2**30 else 0}f} GiB"


def count(value: float | None) -> str:
    """`953`, `18,930`, `1.89 M`, `2.40 B`."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value / 1e6:,.2f} M" if abs(value) < 1e9 else f"{value / 1e9:,.2f} B"


def loss(value: float | None) -> str:
    """Four significant digits, never an exponent for usual losses: `10.42`, `4.213`, `0.0312`."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    digits = 2 if abs(value) >= 10 else 3 if abs(value) >= 0.1 else 4
    return f"{value:.{digits}f}"


def learning_rate(value: float | None) -> str:
    """`3.00e-4`."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def metric(name: str, value: float) -> str:
    """An evaluation metric: losses as `loss`, perplexities with few digits, shares with four."""
    if "perplexity" in name:
        return f"{value:,.2f}" if value < 1e4 else f"{value:,.0f}"
    return loss(value) if "loss" in name else f"{value:.4f}"


def precise(name: str, value: float) -> str:
    """A metric as the result of a job, with six significant digits where they mean something."""
    return f"{value:,.0f}" if abs(value) >= 1e6 else f"{value:.6g}" if "perplexity" in name else f"{value:.6f}"


def percent(share: float | None) -> str:
    """`81%`."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.0f}%"


def layout(sizes: dict[str, int]) -> str:
    """`1 device`, `2 stages`, `2 stages × 2 replicas`, `2 stages × 2 shards × 2 replicas`."""
    words = [("pipeline", "stage"), ("tensor", "shard"), ("data", "replica")]
    parts = [f"{sizes[key]} {word}s" for key, word in words if sizes.get(key, 1) > 1]
    return " × ".join(parts) or "1 device"
