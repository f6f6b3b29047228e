"""Lines of a metrics.jsonl as a real run writes them, from a falling loss with noise; for tests and for drawing."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any


def metrics_lines(
    num_steps: int, num_stages: int = 2, *, max_steps: int | None = None, first: int = 1, evaluate_every: int = 50
) -> list[dict[str, Any]]:
    """Start event, one line a step, evaluations and checkpoints."""
    total = max_steps or num_steps
    lines: list[dict[str, Any]] = [{"event": "start", "max_steps": total, "time": 1.7e9}]
    for step in range(first, num_steps + 1):
        noise = random.Random(step)
        smooth = 4.1 + 4.9 * math.exp(-step / 60)
        loss = smooth + noise.gauss(0, 0.06)
        seconds = 2.1 + 0.1 * noise.random()
        stages = []
        for stage in range(num_stages):
            busy = seconds * (0.78 + 0.12 * ((stage * 7) % 5) / 5 + 0.02 * noise.random())
            stages.append(
                {"busy_seconds": busy, "wait_seconds": seconds - busy, "memory_bytes": (310 + 12 * stage) * 2**20}
            )
        lines.append(
            {
                "step": step,
                "loss": loss,
                "num_target_tokens": 4080,
                "learning_rate": 3e-4 * min(1.0, step / 20),
                "grad_norm": 0.9 + 0.2 * noise.random(),
                "step_seconds": seconds,
                "tokens_per_second": 4096 / seconds,
                "memory_bytes": [stage["memory_bytes"] for stage in stages],
                "stages": stages,
                "epoch": step / 400,
                "time": 1.7e9 + 2.1 * step,
            }
        )
        if step % evaluate_every == 0:
            metrics = {"loss": smooth + 0.05, "perplexity": math.exp(smooth + 0.05)}
            lines.append({"event": "evaluation", "step": step, "metrics": metrics})
            path = f"checkpoints/step-{step:08d}"
            lines.append({"event": "checkpoint", "step": step, "path": path, "seconds": 1.24})
    return lines


def write_metrics(path: Path, lines: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
