"""``llmpipe evaluate --folds``: train and evaluate once for each part of the training data.

Each fold is an ordinary training run and an ordinary evaluation run, named after the recipe and the fold. What is
finished is kept in ``<output_dir>/<recipe>-folds-<K>-<fingerprint>.json``; the same command goes on where it was
stopped, with the checkpoint of the fold it was in.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpipe_cli.cli import console, jobs
from llmpipe_cli.errors import UsageError
from llmpipe_cli.run import read_json, write_json

if TYPE_CHECKING:
    from llmpipe_cli.recipe.load import LoadedRecipe


def cross_validate(loaded: LoadedRecipe, folds: str, options: jobs.LaunchOptions) -> tuple[dict[str, Any] | None, int]:
    """All folds; the result (None when stopped before the end) and the exit code.

    Raises:
        UsageError: `folds` is neither a number of at least 2 nor ``all``, or the recipe has no training data to divide.
    """
    recipe, base_name = loaded.recipe, loaded.recipe.name
    if recipe.data.train is None or recipe.data.train.synthetic:
        raise UsageError("there is no training data to divide into folds", where="--folds")
    from llmpipe_cli.data.cache import fingerprint
    from llmpipe_cli.data.prepare import count_documents

    num_documents = count_documents(recipe, loaded.base_dir)
    count = _number(folds, num_documents)
    output_dir = Path(recipe.output_dir)
    identity = recipe.model_dump(mode="json", by_alias=True) | {"documents": num_documents}
    state = output_dir / f"{base_name}-folds-{count}-{fingerprint(identity)[:8]}.json"
    output_dir.mkdir(parents=True, exist_ok=True)
    done: list[dict[str, Any]] = (read_json(state) or {}).get("folds", [])
    if done:
        console.say(f"{len(done)} of {count} folds are done already, see {state}")
    for index in range(len(done), count):
        # The file's digest is part of the name: a changed recipe must not go on from another's checkpoint.
        name = f"{base_name}-fold-{index + 1}-of-{count}-{fingerprint(identity)[:4]}"
        loaded.recipe = recipe.model_copy(update={"name": name})
        console.say(f"fold {index + 1} of {count}")
        result, exit_code = _run_fold(loaded, (index, count), output_dir, options)
        if result is None:
            return None, exit_code
        done.append(result)
        write_json(state, {"recipe": base_name, "count": count, "folds": done})
    loaded.recipe = recipe
    return _summary(recipe.task, done), 0


def _run_fold(
    loaded: LoadedRecipe, fold: tuple[int, int], output_dir: Path, options: jobs.LaunchOptions
) -> tuple[dict[str, Any] | None, int]:
    """Trains on the other folds and measures on this one."""
    from llmpipe_cli.cli.models import find_resume

    devices = jobs.devices_for(options)
    data = jobs.prepare_fold(loaded, fold)
    checkpoint = find_resume("auto", loaded.recipe.name, output_dir)
    plan = jobs.plan_job(loaded.recipe, data, devices, job="train", loaded=loaded, checkpoint=checkpoint)
    finished = jobs.run_plan(plan, loaded, output_dir, options)
    if finished is None or finished.exit_code != 0:
        return None, finished.exit_code if finished is not None else 0
    checkpoint = finished.run.latest_checkpoint() or checkpoint
    jobs.warm_up(options)
    plan = jobs.plan_job(loaded.recipe, data, devices, job="evaluate", loaded=loaded, checkpoint=checkpoint)
    measured = jobs.run_plan(plan, loaded, output_dir, options)
    if measured is None or measured.exit_code != 0:
        return None, measured.exit_code if measured is not None else 0
    result = read_json(measured.run.evaluation)
    assert result is not None
    return {key: result[key] for key in ("metrics", "num_samples", "checkpoint")}, 0


def _number(folds: str, num_documents: int) -> int:
    if folds == "all":
        return num_documents
    count = int(folds) if folds.isdecimal() else 0
    if not 2 <= count <= num_documents:
        raise UsageError(
            f"{num_documents} documents cannot be divided into {folds!r} folds",
            where="--folds",
            hint="write a number from 2 to that of the documents, or all to leave each out once",
        )
    return count


def _summary(task: str, folds: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation (of a sample, n - 1) of each metric over the folds."""
    means, deviations = {}, {}
    for name in folds[0]["metrics"]:
        values = [fold["metrics"][name] for fold in folds if name in fold["metrics"]]
        mean = sum(values) / len(values)
        means[name] = mean
        deviations[name] = math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))
    return {
        "task": task,
        "folds": len(folds),
        "metrics": means,
        "deviation": deviations,
        "num_samples": sum(fold["num_samples"] for fold in folds),
        "per_fold": folds,
    }
