"""Counts the activations that are really alive on a rank, instead of trusting the executor's own bookkeeping.

One layer stands for each chunk of a stage. What goes into its last linear layer is needed until the chunk's weight
gradients are computed, so a weak reference to every such input tells for how many micro-batches activations are alive.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

from llmpipe_cli.run import RunDirectory


def most_alive(run: RunDirectory, rank: int) -> int | None:
    """The most inputs that were alive on a rank after a forward pass; none if one of its chunks has no layer."""
    return json.loads(_written(run.path, rank).read_text())


def count_live_activations() -> None:
    """Make this process's executors count, for Llama and its like; they write what `most_alive` reads."""
    from llmpipe_cli.engine.executor import StageExecutor

    plain_init, plain_forward, plain_run = StageExecutor.__init__, StageExecutor._forward, StageExecutor.run

    @functools.wraps(plain_init)
    def init(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        plain_init(self, module, *args, **kwargs)
        self.inputs, self.most_alive = [], 0
        layers = [_first_layer(module, chunk) for chunk in range(module.placement.num_chunks)]
        self.counts = all(layer is not None for layer in layers)
        for layer in layers if self.counts else []:
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: self.inputs.append(weakref.ref(args[0])))

    @functools.wraps(plain_forward)
    def forward(self: Any, *args: Any) -> None:
        plain_forward(self, *args)
        self.inputs = [reference for reference in self.inputs if reference() is not None]
        self.most_alive = max(self.most_alive, len(self.inputs))

    @functools.wraps(plain_run)
    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        plain_run(self, *args, **kwargs)
        written = _written(Path(sys.argv[1]), int(os.environ["RANK"]))
        written.write_text(json.dumps(self.most_alive if self.counts else None))

    StageExecutor.__init__, StageExecutor._forward, StageExecutor.run = init, forward, run  # type: ignore[method-assign]


def _written(run: Path, rank: int) -> Path:
    return run / f"alive-{rank}.json"


def _first_layer(module: Any, chunk: int) -> Any:
    """The first decoder layer of a chunk whose MLP runs there, be it in a segment of its own."""
    part = module.placement.part(module.stage_id, chunk)
    segments = range(module.bounds[part], module.bounds[part + 1])
    calls = [call.module.removesuffix(".mlp") for call in module.slice_plan.calls if call.segment in segments]
    called = [module.skeleton.get_submodule(name) for name in calls]
    return next((layer for layer in called if hasattr(layer, "mlp")), None)
