"""The way of a job that starts ranks, shared by train, evaluate and generate.

    recipe -> prepared data -> plan -> run directory -> launcher -> watched until it ends

Everything up to the run directory can fail without leaving anything behind.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpipe_cli.cli import console
from llmpipe_cli.cli.dry_run import describe, show
from llmpipe_cli.cli.launchers import ClusterFlags, make_launcher
from llmpipe_cli.cli.signals import StopSignals
from llmpipe_cli.cluster.launchers.base import Job, Launcher, LaunchSpec
from llmpipe_cli.cluster.outcome import Outcome, write_status
from llmpipe_cli.errors import EXIT_STOPPED, LlmpipeError, UsageError
from llmpipe_cli.run import MetricsReader, RunDirectory, list_runs, read_json, write_json, write_text

if TYPE_CHECKING:
    from llmpipe_cli.cluster.devices import Devices
    from llmpipe_cli.data.prepare import PreparedData
    from llmpipe_cli.plan.forecast import Forecast
    from llmpipe_cli.plan.plan import Job as PlannedJob
    from llmpipe_cli.plan.plan import Plan
    from llmpipe_cli.recipe.load import LoadedRecipe
    from llmpipe_cli.recipe.schema import Recipe
    from llmpipe_cli.report.live import View
    from llmpipe_cli.report.progress import Progress

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class LaunchOptions:
    """Flags of every command that starts ranks."""

    devices: int | None
    launcher: str | None
    dry_run: bool
    as_json: bool
    environment: dict[str, str]
    grace_seconds: float
    cluster: ClusterFlags = field(default_factory=ClusterFlags)

    @cached_property
    def starter(self) -> Launcher:
        """The launcher: one for all that a command does, since it may hold connections."""
        return make_launcher(self.launcher, self.cluster)

    def __enter__(self) -> LaunchOptions:
        """Raises UsageError for a mistake in the launcher's flags, so that it is told before anything else is done."""
        _ = self.starter
        return self

    def __exit__(self, *details: object) -> None:
        self.starter.close()


@dataclass(frozen=True)
class Finished:
    """A job that has ended well or was stopped on request."""

    run: RunDirectory
    exit_code: int
    progress: Progress
    ended_early: str | None = None
    """What `stop_when` said."""


def read_environment(entries: Sequence[str] | None) -> dict[str, str]:
    """``--env`` entries as variables; ``KEY`` alone takes the shell's value.

    Raises:
        UsageError: an entry without a name, or a variable that is not set.
    """
    variables = {}
    for entry in entries or ():
        key, equals, value = entry.partition("=")
        if not key or "\0" in entry:
            raise UsageError("--env needs KEY or KEY=VALUE", where=f"--env {entry}")
        if not equals and key not in os.environ:
            raise UsageError(f"{key} is not set in this shell", where=f"--env {key}", hint=f"write --env {key}=VALUE")
        variables[key] = value if equals else os.environ[key]
    return variables


def load(recipe: Path, overrides: Sequence[str], job: str | None) -> LoadedRecipe:
    """The checked recipe; its warnings are printed.

    Raises:
        RecipeError: every mistake of the recipe.
    """
    from llmpipe_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, list(overrides), job=job)
    for notice in loaded.warnings:
        console.say(f"warning: {notice}", "yellow")
    return loaded


def check_model(loaded: LoadedRecipe) -> None:
    """Whether transformers can make the model that a recipe describes; asked before any data is read.

    Raises:
        UsageError: an unknown type, a field that it does not have, or a task that it has no model for.
    """
    section = loaded.recipe.model
    if section.from_ is not None or section.config is None:
        return  # a pretrained one is read when the job is planned
    from llmpipe_cli.model.auto import load_config, model_class

    with places(loaded):
        model_class(load_config(section, loaded.recipe.task), loaded.recipe.task)


def prepare(loaded: LoadedRecipe, checkpoint: Path | str | None = None) -> PreparedData | None:
    """The recipe's data, tokenised and packed, with its progress shown; None when the recipe has none.

    Args:
        loaded: the recipe. When it trains its tokenizer and the text has changed since the checkpoint, its tokenizer
            becomes the checkpoint's: other ids would mean other words to the model.
        checkpoint: what the data is for, if there is one.

    Raises:
        UsageError: nothing found, an unreadable line, an empty corpus, another tokenizer than the checkpoint's.
    """
    if loaded.recipe.data.train is None and loaded.recipe.data.validation is None:
        return None
    check_model(loaded)
    data = _prepare(loaded)
    if checkpoint is not None and _is_other_tokenizer(data.tokenizer_dir, Path(checkpoint)):
        if isinstance(loaded.recipe.tokenizer, str):
            raise UsageError(
                "this is not the tokenizer that the checkpoint was trained with",
                where=loaded.where("tokenizer"),
                hint=f"write tokenizer: {checkpoint}",
            )
        console.say("warning: the text has changed since the checkpoint was made: its own tokenizer is kept", "yellow")
        loaded.recipe = loaded.recipe.model_copy(update={"tokenizer": str(checkpoint)})
        data = _prepare(loaded)
    for name, split in (("train", data.train), ("validation", data.validation)):
        if split is not None and split.num_skipped:
            example = f", the first: {split.skipped_examples[0]}" if split.skipped_examples else ""
            console.say(f"warning: {split.num_skipped:,} records of data.{name} are left out{example}", "yellow")
    return data


def prepare_fold(loaded: LoadedRecipe, fold: tuple[int, int]) -> PreparedData:
    """The data of one fold of a cross-validation: (index, number of folds)."""
    return _prepare(loaded, fold)


def warn_of_other_data(data: PreparedData | None, checkpoint: Path) -> None:
    """Say so when training goes on from a checkpoint on other samples than before."""
    before = RunDirectory(checkpoint.parent.parent).read_plan().get("data") or {}
    fingerprint = (before.get("train") or {}).get("fingerprint")
    if data is not None and data.train is not None and fingerprint not in (None, data.train.fingerprint):
        console.say("warning: the training data is not the one that the checkpoint has seen so far", "yellow")


def refuse_other_training(loaded: LoadedRecipe, checkpoint: Path) -> None:
    """What a checkpoint decides cannot be changed by going on from it; without a word the recipe's would be ignored.

    Compared is what the checkpoint's run was asked for; one that lies elsewhere than in its run is taken as it is.

    Raises:
        UsageError: a field of the model's config or the optimizer is another one than before.
    """
    before = RunDirectory(checkpoint.parent.parent).read_plan()
    asked = before.get("recipe") or {}
    config = {**(before.get("model_config_fields") or {}), **((asked.get("model") or {}).get("config") or {})}
    saved = {f"model.config.{name}": value for name, value in config.items()}
    saved["train.optimizer"] = (asked.get("train") or {}).get("optimizer")
    wanted = {f"model.config.{name}": value for name, value in (loaded.recipe.model.config or {}).items()}
    wanted["train.optimizer"] = loaded.recipe.train.optimizer
    for field_name, value in wanted.items():
        if saved.get(field_name, value) not in (None, value):
            name = field_name.rpartition(".")[2]
            raise loaded.error(
                field_name,
                f"the checkpoint was trained with {name} {saved[field_name]}, the recipe says {value}",
                f"write {name}: {saved[field_name]}, or start a new training: under another name, or from these "
                "weights with `llmpipe finetune --from`",
            )


def _prepare(loaded: LoadedRecipe, fold: tuple[int, int] | None = None) -> PreparedData:
    from llmpipe_cli.data.prepare import prepare as prepare_data

    with places(loaded), console.preparation() as progress:
        return prepare_data(loaded.recipe, loaded.base_dir, progress=progress, fold=fold)


def _is_other_tokenizer(directory: str | None, checkpoint: Path) -> bool:
    """Whether both are fast tokenizers and give their tokens other ids."""
    vocabularies = [
        ((read_json(folder / "tokenizer.json") or {}).get("model") or {}).get("vocab")
        for folder in (Path(directory or ""), checkpoint)
    ]
    return None not in vocabularies and vocabularies[0] != vocabularies[1]


def devices_for(options: LaunchOptions, *, job_follows: bool = True) -> Devices:
    """The devices to plan for; warnings about them are printed. A dry run reaches no node.

    Args:
        options: flags.
        job_follows: one job is started as soon as it is planned.

    Raises:
        PreflightError: more accelerators are asked for than there are, or a node cannot be used.
    """
    launcher = options.starter
    if options.dry_run:
        devices = launcher.planned_devices(options.devices)
    else:
        with console.working("reaching the nodes") if launcher.name != "local" else nullcontext():
            devices = launcher.devices(options.devices)
    if devices.warning:
        console.say(f"warning: {devices.warning}", "yellow")
    if job_follows:
        warm_up(options)
    return devices


def warm_up(options: LaunchOptions) -> None:
    """Let the launcher begin with the next job, where its ranks are started from here and in this environment."""
    if not (options.dry_run or options.cluster.detach or options.environment):
        options.starter.warm_up()


def plan_job(
    recipe: Recipe,
    data: PreparedData | None,
    devices: Devices,
    *,
    job: PlannedJob,
    loaded: LoadedRecipe | None = None,
    checkpoint: Path | str | None = None,
    options: dict[str, Any] | None = None,
) -> Plan:
    """What runs where; errors about a field of the recipe get the field's place in the file.

    Raises:
        UsageError: recipe, model and data do not fit each other.
        PreflightError: too few devices.
    """
    with places(loaded), console.working("planning"):
        from llmpipe_cli.plan.resolve import make_plan_on

        if devices.kind == "cuda" and job in ("train", "bench") and checkpoint is None:
            from llmpipe_cli.plan.propose import cluster_of, fill_auto

            cluster = cluster_of(devices)
            recipe = recipe if cluster is None else fill_auto(recipe, cluster)
        return make_plan_on(
            recipe,
            data,
            devices,
            job=job,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            options=options,
        )


@contextmanager
def places(loaded: LoadedRecipe | None) -> Iterator[None]:
    """Errors that name a field of the recipe (``train.max_steps``) leave with its place (``recipe.yaml:12:3``).

    Without a recipe of the user's the fields are those of one made from flags: no place that he could look at.
    """
    try:
        yield
    except LlmpipeError as error:
        if error.where is not None and _is_field(error.where):
            error.where = f"{loaded.where(error.where)} ({error.where})" if loaded is not None else None
        raise


def _is_field(where: str) -> bool:
    from llmpipe_cli.recipe.schema import Recipe

    return where.split(".")[0] in Recipe.model_fields and "/" not in where and ":" not in where


def run_plan(
    plan: Plan,
    loaded: LoadedRecipe | None,
    output_dir: Path,
    options: LaunchOptions,
    stop_when: Callable[[Progress], str | None] | None = None,
) -> Finished | None:
    """Start the plan's ranks and stay until they are gone; with ``--dry-run`` print what would be started.

    Args:
        plan: what runs where.
        loaded: the recipe as given, kept in the run directory; None for jobs without one.
        output_dir: folder of the run directories.
        options: flags.
        stop_when: asked again and again while the job runs; what it answers ends the job as a request to stop does.

    Returns:
        How it ended when it ended well or was stopped on request; None after a dry run, and with ``--detach``.

    Raises:
        LlmpipeError: a rank, the node or the launcher failed; the run's status is written.
    """
    from llmpipe_cli.report.tables import progress_of

    if options.dry_run:
        show(dry_run(plan, output_dir, options), options.as_json)
        return None
    launcher = options.starter
    expected = _forecast(plan, output_dir, options)
    run = RunDirectory.create(output_dir, plan.name if plan.job == "train" else f"{plan.name}-{plan.job}")
    if loaded is not None:
        write_text(run.recipe, loaded.text)
        _write_lock(run, plan)
    plan.save(run.plan)
    if options.cluster.detach:
        from llmpipe_cli.cli.detached import hand_over

        launcher.close()
        hand_over(launch_spec(plan, run, options), options)
        if options.as_json:
            console.print_json({"run": str(run.path), "state": "running"})
        else:
            console.say(f"started {run.name}; `llmpipe runs show {run.name}`, `llmpipe runs cancel {run.name}`")
        return None
    run.write_controller()
    if expected is not None:
        write_json(run.path / "forecast.json", expected.to_json())
    progress = progress_of(run)
    with StopSignals() as signals:
        limit = None if stop_when is None else EarlyEnd(stop_when)
        outcome = watch(launcher.start(launch_spec(plan, run, options)), run, progress, signals, expected, limit)
    finished = conclude(run, outcome, progress)
    return finished if limit is None or signals.stop else replace(finished, ended_early=limit.reason)


def dry_run(plan: Plan, output_dir: Path, options: LaunchOptions) -> dict[str, Any]:
    """What `run_plan` would start; a plan that does not fit is refused as there.

    Raises:
        PreflightError: a stage needs more memory than a device has.
    """
    _forecast(plan, output_dir, options)
    run = RunDirectory((output_dir / f"{plan.name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute())
    return describe(plan, options.starter, launch_spec(plan, run, options))


@dataclass
class EarlyEnd:
    """A condition that ends a job, and what it said when it did."""

    condition: Callable[[Progress], str | None]
    reason: str | None = None


def _forecast(plan: Plan, output_dir: Path, options: LaunchOptions) -> Forecast | None:
    """What a training is expected to take on its devices, where they are known; refused when it does not fit.

    Raises:
        PreflightError: a stage needs more memory than a device has.
    """
    if plan.job not in ("train", "bench"):
        return None
    from llmpipe_cli.plan.forecast import forecast
    from llmpipe_cli.plan.propose import machines_for

    with console.working("predicting memory and time"):
        launcher = options.starter
        find = launcher.planned_devices if options.dry_run else launcher.devices
        threads = (dict(options.environment).get("OMP_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or "").strip()
        cluster = machines_for(plan, find(options.devices), int(threads) if threads.isdecimal() else None)
        return None if cluster is None else forecast(plan, cluster, list_runs(output_dir))


def watch(
    job: Job,
    run: RunDirectory,
    progress: Progress,
    signals: StopSignals,
    expected: Forecast | None = None,
    limit: EarlyEnd | None = None,
) -> Outcome:
    """Show the job and pass on requests to stop until all its processes are gone.

    After the first steps it says how they compare with what was `expected`.
    """
    from llmpipe_cli.report.live import make_view

    comparison = None
    if expected is not None:
        from llmpipe_cli.plan.forecast import Comparison

        comparison = Comparison(expected)
    reader = MetricsReader(run.metrics)
    view: View = make_view(progress, console.stderr())
    told = killed = False
    note = ""
    view.start()
    try:
        while (outcome := job.poll()) is None:
            lines = reader.read()
            view.add(lines)
            for sentence in comparison.add(lines) if comparison is not None else ():
                view.say(sentence)
            if signals.kill and not killed:
                killed = True
                job.kill()
            elif (signals.stop or run.stop_file.exists()) and not told:  # the file: `runs cancel`
                told = True
                job.request_stop()
                view.say("stopping: the ranks finish their step and save; Ctrl-C again kills them")
            elif limit is not None and not told and (reason := limit.condition(progress)) is not None:
                limit.reason, told = reason, True
                job.request_stop()
                view.say(reason)
            if job.note != note:
                note = job.note
                view.say(note)
            view.tick()
            time.sleep(_POLL_SECONDS)
        view.add(reader.read())
        return outcome
    except BaseException:
        job.kill()
        raise
    finally:
        view.stop()


def conclude(run: RunDirectory, outcome: Outcome, progress: Progress) -> Finished:
    """Write how the run ended; raise what went wrong."""
    ended_well = outcome.exit_code in (0, EXIT_STOPPED)
    if not ended_well or run.status()["state"] not in ("done", "stopped"):
        write_status(run, outcome)
    if outcome.error is not None:
        if outcome.traceback:
            console.say(outcome.traceback.rstrip(), "dim")
        raise outcome.error
    return Finished(run, outcome.exit_code, progress)


def launch_spec(plan: Plan, run: RunDirectory, options: LaunchOptions) -> LaunchSpec:
    """What the launcher needs to know."""
    # DeepSpeed numbers ranks stage by stage: all replicas and shards of stage 0 first.
    ranks_a_stage = plan.layout.data * plan.layout.tensor
    return LaunchSpec(
        run=run,
        stages=tuple(rank // ranks_a_stage for rank in range(plan.layout.num_ranks)),
        device=plan.device,
        grace_seconds=options.grace_seconds,
        environment=options.environment,
        inputs=_inputs(plan),
    )


def _inputs(plan: Plan) -> tuple[Path, ...]:
    """Folders and files that the ranks read."""
    data, training = plan.data or {}, plan.training
    splits = [data.get(name) or {} for name in ("train", "validation")]
    splits += [part for split in splits for part in split.get("parts", [])]
    folders = [split.get("directory") for split in splits] + [data.get("tokenizer_dir"), plan.weights]
    folders += [plan.adapter_weights, training.resume_from if training is not None else None]
    folders += [plan.options.get("tokenizer"), plan.options.get("prompts_file")]
    return tuple(Path(folder) for folder in dict.fromkeys(folders) if folder and Path(folder).exists())


def _write_lock(run: RunDirectory, plan: Plan) -> None:
    """Every default resolved, the versions, and what the data was."""
    from llmpipe_cli.recipe.lock import write_lock
    from llmpipe_cli.recipe.schema import Recipe

    splits = {name: (plan.data or {}).get(name) for name in ("train", "validation")}
    fingerprints = {name: {"fingerprint": split["fingerprint"]} for name, split in splits.items() if split}
    write_lock(run.recipe_lock, Recipe.model_validate(plan.recipe), fingerprints)
