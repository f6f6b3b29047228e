"""Evaluation over pipeline stages: the task's passes, forward only.

The micro-batches of a pass are dealt to the replicas in turn. On the last stage each adds its share to a vector of
sums, and where sums are not enough to a list of records; vectors are summed and records collected over all ranks, so
the result does not depend on the layout. Between chunks of micro-batches the ranks agree whether one of them was asked
to stop; then all of them leave together, without a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from llmpipe_cli.data.dataset import open_split
from llmpipe_cli.data.prepared import PreparedData, PreparedSplit
from llmpipe_cli.engine.exchange import gather_json
from llmpipe_cli.engine.executor import MicroBatch, StageExecutor
from llmpipe_cli.engine.schedules import forward_only
from llmpipe_cli.errors import EXIT_STOPPED, UsageError
from llmpipe_cli.run import write_json, write_text
from llmpipe_cli.tasks.base import EvaluationBatch, EvaluationPass, Metrics, Task
from llmpipe_cli.tasks.registry import get_task
from llmpipe_cli.worker.hypotheses import score_hypotheses
from llmpipe_cli.worker.process import Context, load_stage
from llmpipe_cli.worker.stop import StopRequested
from llmpipe_cli.worker.telemetry import MetricsWriter

# Micro-batches handed to the pipeline at once: enough to fill it, few enough to hold their inputs.
_CHUNK_PER_STAGE = 8


class Evaluator:
    """Runs a task's passes over one split.

    Args:
        context: the worker's context.
        executor: runs this rank's stage.
        task: makes batches and metrics.
        split: the data.
    """

    def __init__(self, context: Context, executor: StageExecutor, task: Task, split: PreparedSplit) -> None:
        self._context, self._executor, self._task = context, executor, task
        self._samples = open_split(split)
        self.num_samples = 0
        self.num_target_tokens = 0
        self.files: dict[str, str] = {}
        """What the last evaluation leaves besides numbers, such as predictions: text by file name."""

    def run(
        self, max_samples: int | None = None, *, quick: bool = False, metrics: MetricsWriter | None = None
    ) -> dict[str, float]:
        """All metrics of the task; the same on every rank.

        Args:
            max_samples: score the first samples of each pass only.
            quick: run the first pass only, the one that training watches.
            metrics: receives progress events.

        Raises:
            StopRequested: a rank was asked to stop.
        """
        results: dict[str, float] = {}
        passes = self._task.evaluation_passes(self._samples, self._context.plan.micro_batch_size, max_samples)
        for number, chosen in enumerate(passes[:1] if quick else passes):
            vector, records = self._sums(chosen, metrics)
            results.update(chosen.result(vector))
            scores, files = chosen.scores(records)
            results.update(scores)
            self.files |= {**chosen.tables(vector), **files}
            if number == 0:
                self.num_samples, self.num_target_tokens = chosen.num_samples, chosen.num_targets(vector)
        return results

    def _sums(self, chosen: EvaluationPass, metrics: MetricsWriter | None) -> tuple[torch.Tensor, list[Any]]:
        """The pass's vector of sums over all micro-batches and ranks, float64 on the CPU, and all records."""
        sums, done = chosen.new_metrics(), 0
        was_training = self._executor.module.training
        self._executor.module.eval()
        with torch.no_grad():
            for indices in self._chunks(len(chosen)):
                self._leave_if_stopped()
                self._run_chunk([chosen[index] for index in indices], indices, sums)
                done += len(indices) * self._context.plan.layout.data
                if metrics is not None:
                    metrics.event("progress", name=chosen.name, done=min(done, len(chosen)), total=len(chosen))
        self._executor.module.train(was_training)
        vector = sums.vector.to(self._context.device)
        dist.all_reduce(vector)
        records = [record for mine in gather_json(sums.records) for record in mine]
        return vector.cpu(), records

    def _leave_if_stopped(self) -> None:
        flag = torch.tensor(float(self._context.stop.is_set()), device=self._context.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if flag.item():
            raise StopRequested

    def _run_chunk(self, batches: list[EvaluationBatch], indices: list[int], sums: Metrics) -> None:
        device, plan = self._context.device, self._context.plan
        inputs = [{name: value.to(device) for name, value in batch.inputs.items()} for batch in batches]
        micro_batches = [MicroBatch(index, each, 0) for index, each in zip(indices, inputs, strict=True)]
        order = forward_only(self._context.stage, plan.layout.pipeline, len(micro_batches), plan.placement)

        def add(position: int, output: Any) -> None:
            if self._context.shard == 0:  # all tensor shards have the same logits
                sums.update(batches[position], self._task.logits(output))

        self._executor.run(order, micro_batches, on_output=add)

    def _chunks(self, num_batches: int) -> Iterator[list[int]]:
        """This replica's micro-batches, a few at a time; every replica has as many chunks, the last may be empty."""
        replicas = self._context.plan.layout.data
        size = _CHUNK_PER_STAGE * self._context.plan.layout.pipeline
        for start in range(0, num_batches, size * replicas):
            stop = min(start + size * replicas, num_batches)
            yield list(range(start + self._context.replica, stop, replicas))


def evaluate(context: Context) -> int:
    """Evaluate the plan's model on the validation data; rank 0 writes evaluation.json. Returns the exit code."""
    data = PreparedData.model_validate(context.plan.data)
    split = data.validation
    if split is None:
        raise UsageError(
            "there is no validation data", where="data.validation", hint="add data.validation to the recipe"
        )
    metrics = MetricsWriter(context.run.metrics if context.is_first else None)
    executor = StageExecutor(load_stage(context), context.device)
    evaluator = Evaluator(context, executor, get_task(data), split)
    metrics.event("start", step=0, max_steps=0, layout=context.plan.layout.model_dump())
    signature = [data.task, f"sequence_len:{split.sequence_len}", f"data:{split.fingerprint[:12]}"]
    try:
        values = evaluator.run(metrics=metrics)
        if data.task == "translation" and split.kind != "synthetic" and context.recipe.evaluation.text_metrics:
            assert data.tokenizer_dir is not None
            texts = score_hypotheses(context, executor, split, data.tokenizer_dir)
            values |= texts.metrics
            signature += texts.signatures
    except StopRequested:
        metrics.event("end", step=0, state="stopped")
        return EXIT_STOPPED
    metrics.event("evaluation", step=0, metrics=values)
    if context.is_first:
        for name, text in evaluator.files.items():
            write_text(context.run.path / name, text)
        write_json(
            context.run.evaluation,
            {
                "task": data.task,
                "checkpoint": context.plan.adapter_weights or context.plan.weights,
                "metrics": values,
                "num_samples": evaluator.num_samples,
                "num_target_tokens": evaluator.num_target_tokens,
                "signature": "|".join(signature),
            },
        )
    metrics.event("end", step=0, state="done")
    return 0
