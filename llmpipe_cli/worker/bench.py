"""The bench loop of one rank: training steps as `train` does them, without evaluations and checkpoints."""

from __future__ import annotations

from llmpipe_cli.errors import EXIT_STOPPED
from llmpipe_cli.worker.process import Context
from llmpipe_cli.worker.training import Trainer


def bench(context: Context) -> int:
    """Do all steps of the plan and write the timeline of the last one; returns the exit code."""
    trainer = Trainer(context)
    plan = context.plan
    assert plan.training is not None
    trainer.metrics.event(
        "start",
        step=0,
        max_steps=plan.training.max_steps,
        layout=plan.layout.model_dump(),
        schedule=plan.schedule,
        partition=plan.partition,
    )
    stopped = False
    while trainer.position.step < plan.training.max_steps and not stopped:
        stopped = trainer.step()
    trainer.write_timeline()
    trainer.metrics.event("end", step=trainer.position.step, state="stopped" if stopped else "done")
    return EXIT_STOPPED if stopped else 0
