"""metrics.jsonl: one JSON object a line, written by rank 0 as things happen."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


class MetricsWriter:
    """Appends lines to metrics.jsonl; each is complete on disk when the call returns.

    Args:
        path: the file; none for ranks that do not write.

    Attributes:
        listener: is handed each line after it was written.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("a", encoding="utf-8") if path is not None else None
        self.listener: Callable[[Mapping[str, Any]], None] | None = None

    def step(self, **fields: Any) -> None:
        """One optimizer step."""
        self._write(fields)

    def event(self, event: str, **fields: Any) -> None:
        """Anything else: start, resume, evaluation, checkpoint, warning, fault, end."""
        self._write({"event": event, **fields})

    def _write(self, fields: dict[str, Any]) -> None:
        if self._file is None:
            return
        line = {**_plain(fields), "time": time.time()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self.listener is not None:
            self.listener(line)


def reset_peak_memory(device: torch.device) -> None:
    """Let the peak of an accelerator's memory be that of what follows; a CPU's is that of the process's life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this rank has used: allocated on an accelerator, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they are written as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
