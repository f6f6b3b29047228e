"""The training loop of one rank.

Every rank walks through the same steps. At the end of a step the ranks exchange one small vector, from which rank 0
writes the step's metrics and every rank takes the same decisions: stop, save, evaluate, give up.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from llmpipe_cli import __version__
from llmpipe_cli.data.batches import BatchPlan
from llmpipe_cli.data.dataset import open_split
from llmpipe_cli.data.prepared import PreparedData, PreparedSplit
from llmpipe_cli.engine.checkpoint import load_training_state, training_scalars
from llmpipe_cli.engine.exchange import gather_json
from llmpipe_cli.engine.executor import MicroBatch
from llmpipe_cli.engine.learning_rate import learning_rate_curve
from llmpipe_cli.engine.loss import make_loss
from llmpipe_cli.engine.manifest import point, remove_old, training_state
from llmpipe_cli.engine.pipeline import Engine, StepResult
from llmpipe_cli.engine.recorder import PARTS
from llmpipe_cli.engine.saver import Saved, Saver
from llmpipe_cli.errors import EXIT_STOPPED, CheckpointError, NumericsError
from llmpipe_cli.model.adapters import CONFIG_FILE as ADAPTER_CONFIG
from llmpipe_cli.recipe.metrics import is_lower_better
from llmpipe_cli.run import write_json
from llmpipe_cli.tasks.base import Batch
from llmpipe_cli.tasks.registry import get_task
from llmpipe_cli.worker.evaluation import Evaluator
from llmpipe_cli.worker.process import Context, config_from_fields, load_stage
from llmpipe_cli.worker.stop import StopRequested
from llmpipe_cli.worker.streaming import StreamBatches
from llmpipe_cli.worker.telemetry import MetricsWriter, peak_memory_bytes, reset_peak_memory
from llmpipe_cli.worker.trackers import Trackers
from llmpipe_cli.worker.watchdog import Watchdog

# fp16 skips a step whose gradients overflow and halves its loss scale; this many in a row are no longer a search.
_MAX_SKIPPED_STEPS = 50
# The step, counted from the start, that is the first one drawn: those before it still warm up.
_TIMELINE_AFTER = 3


def train(context: Context) -> int:
    """Train as the plan says; returns the exit code."""
    return Trainer(context).run()


@dataclass
class _Position:
    """Where training stands; saved with every checkpoint."""

    step: int = 0
    best_metric: float | None = None
    evaluations_without_improvement: int = 0
    stream: dict[str, Any] | None = None
    """Place in the stream that training reads, if it does."""


class Trainer:
    """Trains the stage of this rank; every rank makes one and walks through the same steps.

    Args:
        context: the job.
    """

    def __init__(self, context: Context) -> None:
        assert context.plan.training is not None
        assert context.plan.data is not None
        self.context, self.plan, self.recipe = context, context.plan, context.recipe
        self.settings = context.plan.training
        self.position = _Position()
        self.data = PreparedData.model_validate(context.plan.data)
        assert self.data.train is not None
        self.task = get_task(self.data)
        self.metrics = MetricsWriter(context.run.metrics if context.is_first else None)
        self.trackers = Trackers(
            self.recipe.report_to if context.is_first else [],
            context.run,
            self.plan.recipe,
            lambda message: self.metrics.event("warning", step=self.position.step, message=message),
        )
        self.metrics.listener = self.trackers.log
        module = load_stage(context)
        curve = learning_rate_curve(self.recipe.train, self.settings.max_steps, self.settings.warmup_steps)
        loss = make_loss(self.recipe.task, self.recipe.train.label_smoothing, self.data.class_weights)
        self.engine = Engine(self.plan, module, loss, curve)
        self.batches = self._open_batches(self.data.train)
        self.evaluator: Evaluator | None = None
        self.stop_requested = False
        if self.data.validation is not None:
            self.evaluator = Evaluator(context, self.engine.executor, self.task, self.data.validation)
        self.skipped_in_a_row = 0
        self.saver = Saver(self.engine)
        self._assets: dict[str, bytes] = {}  # what `_write_assets` writes, once it is known

    def _open_batches(self, split: PreparedSplit) -> BatchPlan | StreamBatches:
        sizes = {
            "global_batch_size": self.recipe.train.global_batch_size,
            "micro_batch_size": self.plan.micro_batch_size,
            "seed": self.recipe.train.seed,
        }
        shuffle = self.recipe.data.shuffle
        if split.kind == "stream":
            return StreamBatches(split, self.task, self.context.device, shuffle=shuffle, **sizes)
        return BatchPlan(open_split(split), self.task, shuffle=shuffle, **sizes)

    def run(self) -> int:
        """All steps from the start or the checkpoint to the end or a request to stop."""
        with self._watched():
            return self._run()

    def _run(self) -> int:
        self._resume()
        self.metrics.event(
            "start",
            step=self.position.step,
            max_steps=self.settings.max_steps,
            layout=self.plan.layout.model_dump(),
            schedule=self.plan.schedule,
            partition=self.plan.partition,
            steps_per_epoch=self.settings.steps_per_epoch,
        )
        postponed = self.engine.module.weight_gradients
        if postponed is not None and postponed.num_layers == 0:
            message = f"{self.plan.schedule}: no linear layer of stage 0 learns, so no weight gradients are postponed"
            self.metrics.event("warning", step=self.position.step, message=message)
        if self.position.step == 0 and self.recipe.evaluation.every_steps is not None:
            self._evaluate()
        saved_step, stopped = self.position.step, self.stop_requested
        timeline_step = self.position.step + _TIMELINE_AFTER
        while self.position.step < self.settings.max_steps and not stopped:
            stopped = self.step() or self.position.step == self.settings.stop_at
            last = self.position.step == self.settings.max_steps
            if last or stopped or self.position.step == timeline_step:
                self.write_timeline()
            improved = False
            if last or _is_due(self.position.step, self.recipe.evaluation.every_steps):
                improved = self._evaluate()
                stopped = stopped or self.stop_requested or self._is_stale()
            if stopped or last or improved or _is_due(self.position.step, self.recipe.checkpoint.every_steps):
                self._save(best=improved)
                saved_step = self.position.step
        self._report_saved(self.saver.wait())
        assert saved_step == self.position.step or self.position.step == 0
        requested = stopped and self.position.step < self.settings.max_steps and not self._is_stale()
        self.metrics.event("end", step=self.position.step, state="stopped" if requested else "done")
        self.trackers.close()
        return EXIT_STOPPED if requested else 0

    @contextmanager
    def _watched(self) -> Iterator[None]:
        limit = self.recipe.train.hang_timeout_seconds
        if limit is None:
            yield
            return
        watchdog = Watchdog(
            self.context.run,
            rank=self.context.rank,
            world_size=dist.get_world_size(),
            stage=self.context.stage,
            recorder=self.engine.executor.recorder,
            step=lambda: self.position.step + 1,
            limit_seconds=limit,
        )
        watchdog.start()
        try:
            yield
        finally:
            watchdog.stop()

    def _resume(self) -> None:
        if self.settings.resume_from is None:
            return
        checkpoint = Path(self.settings.resume_from)
        state = training_state(checkpoint)
        load_training_state(self.engine, checkpoint, state["scalars"])
        self.position = _Position(**state["position"])
        if isinstance(self.batches, StreamBatches):
            self.batches.resume_state = (self.position.stream or {}).get("place")
        self.metrics.event("resume", step=self.position.step, checkpoint=str(checkpoint), saved_layout=state["layout"])

    def step(self) -> bool:
        """One optimizer step; returns whether a rank was asked to stop."""
        recorder = self.engine.executor.recorder
        recorder.restart()
        reset_peak_memory(self.context.device)
        started = time.perf_counter()
        step = self.position.step
        recorder.begin("data")
        batches = [self._load(step, index) for index in range(self.plan.num_micro_batches)]
        recorder.end()
        result = self.engine.train_step(step, batches)
        rows = self._exchange(result, batches)
        self.position.step += 1
        loss = sum(row["loss_sum"] for row in rows) / max(result.num_targets, 1)
        num_auxiliary = sum(row["num_auxiliary"] for row in rows)
        auxiliary = {"aux_loss": sum(row["auxiliary_sum"] for row in rows) / num_auxiliary} if num_auxiliary else {}
        seconds = time.perf_counter() - started
        self.metrics.step(
            step=self.position.step,
            loss=loss,
            **auxiliary,
            num_target_tokens=result.num_targets,
            learning_rate=self.engine.optimizer.param_groups[0]["lr"],
            grad_norm=result.grad_norm,
            step_seconds=seconds,
            tokens_per_second=sum(row["tokens"] for row in rows) / seconds,
            memory_bytes=[stage["memory_bytes"] for stage in self._by_stage(rows)],
            stages=self._by_stage(rows),
            epoch=self.position.step / self.settings.steps_per_epoch if self.settings.steps_per_epoch else 0.0,
        )
        self._check_numbers(loss, result)
        if any(row["save_failed"] for row in rows):
            self.saver.wait()  # raises on every rank
        self._report_saved(self.saver.poll())
        return any(row["stop"] for row in rows)

    def _load(self, step: int, position: int) -> MicroBatch:
        """The replica's micro-batch at `position`; micro-batches are dealt to the replicas in turn."""
        index = position * self.plan.layout.data + self.context.replica
        batch = self.batches.micro_batch(step, index)
        inputs = {name: tensor.to(self.context.device) for name, tensor in batch.items()}
        # Counted where they were made: asking an accelerator would mean to wait for it.
        return MicroBatch(index, inputs, self.task.num_targets(batch), _num_tokens(batch))

    def _exchange(self, result: StepResult, batches: list[MicroBatch]) -> list[dict[str, float]]:
        """Tell all ranks what happened on this one."""
        recorder = self.engine.executor.recorder
        row = {
            "loss_sum": result.loss_sum,
            "auxiliary_sum": result.auxiliary_sum,
            "num_auxiliary": float(result.num_auxiliary),
            **{f"{part}_seconds": seconds for part, seconds in recorder.seconds().items()},
            "memory_bytes": float(peak_memory_bytes(self.context.device)),
            "stop": float(self.context.stop.is_set()),
            "save_failed": float(self.saver.has_failed),
            "tokens": float(sum(batch.num_tokens for batch in batches)) if self._counts_tokens else 0.0,
        }
        mine = torch.tensor(list(row.values()), dtype=torch.float64, device=self.context.device)
        everyone = torch.zeros(dist.get_world_size() * len(row), dtype=torch.float64, device=self.context.device)
        recorder.begin("exchange")
        dist.all_gather_into_tensor(everyone, mine)
        recorder.end(waited=True)
        return [dict(zip(row, values, strict=True)) for values in everyone.view(-1, len(row)).tolist()]

    @property
    def _counts_tokens(self) -> bool:
        """Of the ranks with the same micro-batches one counts them."""
        return self.context.stage == 0 and self.context.shard == 0

    def _by_stage(self, rows: list[dict[str, float]]) -> list[dict[str, Any]]:
        """Times (mean over the replicas) and peak memory (largest) of each stage."""
        width = len(rows) // self.plan.layout.pipeline
        stages = []
        for stage in range(self.plan.layout.pipeline):
            members = rows[stage * width : (stage + 1) * width]
            times = {f"{part}_seconds": sum(row[f"{part}_seconds"] for row in members) / width for part in PARTS}
            waiting = times["wait_activations_seconds"] + times["wait_gradients_seconds"]
            stages.append(
                {**times, "wait_seconds": waiting, "memory_bytes": int(max(row["memory_bytes"] for row in members))}
            )
        return stages

    def _check_numbers(self, loss: float, result: StepResult) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        what = None
        if not math.isfinite(loss):
            what = f"the loss is {loss}"
        elif result.skipped and self.skipped_in_a_row > _MAX_SKIPPED_STEPS:
            what = f"the gradients overflowed {self.skipped_in_a_row} steps in a row"
        elif result.skipped:
            self.metrics.event("warning", step=self.position.step, message="step skipped: fp16 gradients overflowed")
        elif not math.isfinite(result.grad_norm):
            what = f"the gradient norm is {result.grad_norm}"
        if what is not None:
            self.metrics.event("fault", step=self.position.step, message=what)
            self._report_saved(self.saver.wait())  # of an earlier step; all ranks end here together
            raise NumericsError(
                f"{what} at step {self.position.step}",
                hint="lower train.learning_rate, lengthen the warm-up or clip harder; "
                "the last checkpoint before this step is kept",
            )

    def write_timeline(self) -> None:
        """Write what every rank did in the last step; all ranks call this together."""
        records = [record._asdict() for record in self.engine.executor.recorder.records()]
        context = self.context
        place = {"rank": context.rank, "stage": context.stage, "replica": context.replica, "shard": context.shard}
        executor = self.engine.executor
        ranks = gather_json({**place, "records": records, "peak_activations": executor.peak_activations})
        if context.is_first:
            timeline = {
                "step": self.position.step,
                "schedule": self.plan.schedule,
                "virtual_stages": self.plan.virtual_stages,
                "threads": torch.get_num_threads(),
                "ranks": ranks,
            }
            write_json(context.run.timeline / f"step-{self.position.step:08d}.json", timeline)

    def _evaluate(self) -> bool:
        """Evaluate on the validation data; returns whether the kept metric improved. A stop leaves it out."""
        if self.evaluator is None:
            return False
        try:
            values = self.evaluator.run(self.recipe.evaluation.max_samples, quick=True)
        except StopRequested:
            self.stop_requested = True
            message = f"a stop was asked for: the evaluation at step {self.position.step} is left out"
            self.metrics.event("warning", step=self.position.step, message=message)
            return False
        self.metrics.event("evaluation", step=self.position.step, metrics=values)
        stopping = self.recipe.train.early_stopping
        name = self.recipe.checkpoint.keep_best or (stopping.metric if stopping else None)
        if name is None:
            return False
        if name not in values:
            known = ", ".join(sorted(values))
            raise CheckpointError(f"there is no validation metric {name!r}", hint=f"metrics of this task: {known}")
        value = values[name] if is_lower_better(name) else -values[name]
        margin = stopping.min_delta if stopping else 0.0
        better = self.position.best_metric is None or value < self.position.best_metric - margin
        self.position.best_metric = value if better else self.position.best_metric
        self.position.evaluations_without_improvement = (
            0 if better else self.position.evaluations_without_improvement + 1
        )
        return better and self.position.step > 0 and self.recipe.checkpoint.keep_best is not None

    def _is_stale(self) -> bool:
        stopping = self.recipe.train.early_stopping
        return stopping is not None and self.position.evaluations_without_improvement >= stopping.patience

    def _save(self, best: bool) -> None:
        """Save in the background, after the save before."""
        self._report_saved(self.saver.wait())
        directory = self.context.run.checkpoints
        if isinstance(self.batches, StreamBatches):
            assert self.data.train is not None
            place = self.batches.state(self.position.step) if self.context.is_first else None
            self.position.stream = {"fingerprint": self.data.train.fingerprint, "place": place}
            num_skipped, examples = self.batches.skipped
            if num_skipped:
                message = f"{num_skipped} records of the stream were left out, the first: {examples[0]}"
                self.metrics.event("warning", step=self.position.step, message=message)
        state = {
            "position": dict(vars(self.position)),
            "samples": self.position.step * self.recipe.train.global_batch_size,
            "global_batch_size": self.recipe.train.global_batch_size,
            "micro_batch_size": self.plan.micro_batch_size,
            "seed": self.recipe.train.seed,
            "layout": self.plan.layout.model_dump(),
            "scalars": training_scalars(self.engine),
            "llmpipe": __version__,
        }

        def finish(path: Path) -> None:
            if best:
                point(directory / "best", path.name)
            remove_old(directory, self.recipe.checkpoint.keep)

        self.saver.start(
            self.engine,
            directory,
            self.position.step,
            state,
            self._write_assets,
            self.recipe.checkpoint.max_shard_size,
            finish,
        )

    def _report_saved(self, saved: Saved | None) -> None:
        if saved is not None:
            self.metrics.event(
                "checkpoint",
                step=saved.step,
                path=str(saved.path),
                seconds=saved.seconds,
                stall_seconds=saved.stall_seconds,
            )

    def _write_assets(self, directory: Path) -> None:
        """What makes the directory a Hugging Face model besides the weights: config and tokenizer."""
        if not self._assets:
            with tempfile.TemporaryDirectory() as folder:
                self._make_assets(Path(folder))
                for path in Path(folder).rglob("*"):
                    if path.is_file():
                        self._assets[path.relative_to(folder).as_posix()] = path.read_bytes()
        for name, content in self._assets.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)

    def _make_assets(self, directory: Path) -> None:
        skeleton = self.engine.module.skeleton
        config = config_from_fields(self.plan)
        config.architectures = [self.plan.model_class]
        config.dtype = skeleton.dtype
        if self.plan.adapters is not None:
            # transformers takes a directory with a config.json for a whole model, also beside adapters.
            write_json(directory / ADAPTER_CONFIG, self.plan.adapters["config"])
            config.save_pretrained(directory / "training")
        else:
            config.save_pretrained(directory)
        if self.plan.adapters is None and skeleton.can_generate():
            skeleton.generation_config.save_pretrained(directory)
        if self.data.tokenizer_dir is not None:
            AutoTokenizer.from_pretrained(self.data.tokenizer_dir).save_pretrained(directory)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _num_tokens(batch: Batch) -> int:
    """Tokens that are not padding."""
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()
