"""lm-evaluation-harness on a model that is split over pipeline stages (``llmpipe evaluate --harness``).

The harness asks its own `hf` model; `PipelinedLM` is that class with the two places replaced where it would compute:
scores of continuations and generated texts come from the ranks (`worker.serving`). Tokenisation, truncation, rolling
windows and metrics are the harness's own, so the figures are those of its `hf` model.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpipe_cli.cli import console, jobs
from llmpipe_cli.cli.dry_run import show
from llmpipe_cli.cli.generate import tokenizer_source
from llmpipe_cli.cli.served import ServedModel
from llmpipe_cli.errors import UsageError
from llmpipe_cli.run import write_json

if TYPE_CHECKING:
    from llmpipe_cli.recipe.schema import Recipe

# Rows that are sent to the ranks at once: enough for many micro-batches.
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class HarnessOptions:
    """What to run.

    Attributes:
        tasks: names of tasks or groups.
        include: folder with more tasks.
        num_fewshot: examples before each question; a task's own number by default.
        limit: documents a task; all by default.
    """

    tasks: list[str]
    include: Path | None
    num_fewshot: int | None
    limit: int | None


def evaluate_with_harness(
    model: Path | str, recipe: Recipe, output_dir: Path, chosen: HarnessOptions, options: jobs.LaunchOptions
) -> None:
    """Run the tasks and print their metrics; they are also written to evaluation.json of the run.

    Raises:
        UsageError: the harness is not installed, a task is unknown, or the model is no causal language model.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "lm-evaluation-harness is not installed", where="--harness", hint="pip install 'llmpipe_cli[harness]'"
        )
    if options.starter.name != "local":
        raise UsageError("--harness runs on this machine", where="--launcher", hint="leave --launcher out")
    if recipe.task not in ("causal-lm", "chat"):
        raise UsageError(f"--harness needs a causal language model, this is one for {recipe.task}", where="--harness")
    from lm_eval.tasks import TaskManager

    # Reading the harness's own thousands of tasks takes a while; often those of the folder are all that is wanted.
    folder = str(chosen.include) if chosen.include is not None else None
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if folder is not None and _unknown(chosen.tasks, manager):
        manager = TaskManager(include_path=folder)
    if unknown := _unknown(chosen.tasks, manager):
        raise UsageError(f"the harness has no task '{unknown[0]}'", where="--harness", hint="see `lm_eval ls tasks`")
    plan = jobs.plan_job(
        recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": None, "validation": None})}),
        None,
        jobs.devices_for(options),
        job="serve",
        checkpoint=model,
        options={"tokenizer": tokenizer_source(model)},
    )
    if plan.layout.data > 1 or plan.layout.tensor > 1:
        raise UsageError("--harness runs on pipeline stages alone", where="parallel", hint="set data and tensor to 1")
    if options.dry_run:
        show(jobs.dry_run(plan, output_dir, options), options.as_json)
        return
    with ServedModel(plan, output_dir, options) as served:
        result = _run(served, plan, chosen, manager)
    write_json(served.run.evaluation, result)
    if options.as_json:
        console.print_json(result)
        return
    from rich.table import Table

    table = Table("task", "metric", "value")
    for task, metrics in result["metrics"].items():
        for name, value in metrics.items():
            table.add_row(task, name, f"{value:.4f}")
    console.stdout().print(table)
    console.say(f"run        {served.run.path}")


def _unknown(tasks: list[str], manager: Any) -> list[str]:
    """The names that are no task of the harness."""
    return [task for task in tasks if not manager.match_tasks([task])]


def _run(served: ServedModel, plan: Any, chosen: HarnessOptions, manager: Any) -> dict[str, Any]:
    """The metrics of all tasks, as `evaluate --json` prints them."""
    import lm_eval
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plan.options["tokenizer"])
    found = lm_eval.simple_evaluate(
        model=_pipelined_lm(served, plan, tokenizer),
        tasks=list(chosen.tasks),
        num_fewshot=chosen.num_fewshot,
        limit=chosen.limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    assert found is not None
    metrics = {
        task: {
            name.removesuffix(",none"): value
            for name, value in values.items()
            if isinstance(value, (int, float)) and "stderr" not in name and not isinstance(value, bool)
        }
        for task, values in found["results"].items()
    }
    samples = sum(number["effective"] for number in found["n-samples"].values())
    return {
        "task": "harness",
        "checkpoint": plan.adapter_weights or plan.weights,
        "metrics": metrics,
        "num_samples": samples,
        "num_target_tokens": None,
        "signature": f"lm-eval:{lm_eval.__version__}|{','.join(chosen.tasks)}|shots:{chosen.num_fewshot}",
    }


def _pipelined_lm(served: ServedModel, plan: Any, tokenizer: Any) -> Any:
    """The harness's `hf` model, answered by the ranks."""
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    from llmpipe_cli.model.skeleton import build_skeleton
    from llmpipe_cli.worker.process import config_from_fields

    class PipelinedLM(HFLM):
        """Asks the ranks for everything that needs the model."""

        def __init__(self) -> None:
            skeleton = build_skeleton(getattr(transformers, plan.model_class), config_from_fields(plan))
            super().__init__(
                pretrained=skeleton, tokenizer=tokenizer, backend="causal", batch_size=plan.micro_batch_size
            )
            self._device = torch.device("cpu")  # the skeleton is on meta, the harness's ids are here

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None
        ) -> list[tuple[float, bool]]:
            results: list[tuple[float, bool]] = []
            for first in range(0, len(requests), _ROWS_AT_ONCE):
                some = requests[first : first + _ROWS_AT_ONCE]
                rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in some]
                starts = [len(row) - len(continuation) for row, (_, _, continuation) in zip(rows, some, strict=True)]
                answer = served.ask({"op": "score", "tokens": rows, "from": starts})
                results += [(total, bool(is_greedy)) for total, is_greedy in answer["scores"]]
            for (pair, _, _), result in zip(requests, results, strict=True):
                if pair is not None:
                    self.cache_hook.add_partial("loglikelihood", pair, result)
            return results

        def _model_generate(
            self, context: Any, max_length: int, stop: list[str], attention_mask: Any = None, **kwargs: Any
        ) -> Any:
            mask = attention_mask if attention_mask is not None else torch.ones_like(context)
            rows = [row[kept.bool()].tolist() for row, kept in zip(context, mask, strict=True)]
            temperature = kwargs.pop("temperature", 0.0) if kwargs.pop("do_sample", False) else 0.0
            sampling = {"temperature": temperature}
            sampling |= {name: kwargs.pop(name) for name in ("top_k", "top_p", "repetition_penalty") if name in kwargs}
            kwargs.pop("temperature", None)
            if kwargs:
                raise UsageError(f"the task generates with {', '.join(kwargs)}, which is not supported here")
            end = self.tokenizer.eos_token
            request = {
                "op": "generate",
                "tokens": rows,
                "settings": {"max_new_tokens": max_length - context.shape[1], "num_beams": 1},
                "sampling": sampling,
                "stop": [text for text in stop if text and text != end],
            }
            new = served.ask(request)["texts"]
            longest = max(map(len, new))
            padding = self.tokenizer.pad_token_id or 0
            padded = [row + [padding] * (longest - len(row)) for row in new]
            return torch.cat([context, torch.tensor(padded, dtype=torch.int64).view(len(new), longest)], dim=1)

    return PipelinedLM()
