"""``llmpipe sweep``."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmpipe_cli.cli import console, jobs
from llmpipe_cli.cli.options import RecipeArgument, SetOption, launching
from llmpipe_cli.cli.signals import StopRequested
from llmpipe_cli.errors import EXIT_STOPPED, LlmpipeError, NodeError, NumericsError, RecipeError, UsageError

if TYPE_CHECKING:
    from llmpipe_cli.recipe.load import LoadedRecipe
    from llmpipe_cli.report.progress import Progress
    from llmpipe_cli.sweep.journal import SweepDirectory, Trial
    from llmpipe_cli.sweep.pruning import MedianRule
    from llmpipe_cli.sweep.search import Search
    from llmpipe_cli.sweep.space import Parameter

_FAILURES_IN_A_ROW = 3

GridOption = Annotated[
    list[str] | None,
    typer.Option("--grid", metavar="FIELD=A,B", help="Values of a field: lora.r=4,8; repeatable."),
]
UniformOption = Annotated[
    list[str] | None,
    typer.Option("--uniform", metavar="FIELD=LOW:HIGH", help="Any number between two: model.dropout=0.0:0.3."),
]
LogOption = Annotated[
    list[str] | None,
    typer.Option("--log", metavar="FIELD=LOW:HIGH", help="The same over orders of magnitude: 1e-5:1e-3."),
]
SearchOption = Annotated[
    str | None,
    typer.Option(
        "--search",
        metavar="grid|random|bayes",
        help="Every combination, random ones, or optuna's; grid by default for choices alone, else random.",
    ),
]
ResumeOption = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="auto|DIR",
        help="Go on with a sweep that was stopped or killed: auto takes this recipe's newest, or starts one.",
    ),
]


@launching()
def sweep(
    recipe: RecipeArgument,
    grid: GridOption = None,
    uniform: UniformOption = None,
    log: LogOption = None,
    search: SearchOption = None,
    trials: Annotated[
        int | None, typer.Option("--trials", metavar="N", min=1, help="Trials; 12 unless it is a grid.")
    ] = None,
    metric: Annotated[str, typer.Option("--metric", metavar="NAME", help="What is compared at the end.")] = "loss",
    goal: Annotated[
        str | None,
        typer.Option("--goal", metavar="minimize|maximize", help="By default losses and perplexities are minimized."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Decides which values are drawn.")] = 0,
    prune: Annotated[
        bool, typer.Option("--prune/--no-prune", metavar="", help="End trials below the median early.")
    ] = True,
    startup_trials: Annotated[
        int, typer.Option("--startup-trials", metavar="N", min=1, help="Whole trials before any is pruned.")
    ] = 4,
    warmup_steps: Annotated[
        int, typer.Option("--warmup-steps", metavar="N", min=0, help="Steps of a trial before it may be pruned.")
    ] = 0,
    keep: Annotated[
        str, typer.Option("--keep", metavar="best|all", help="Whose checkpoints stay.", show_default=True)
    ] = "best",
    resume: ResumeOption = None,
    set_: SetOption = None,
    *,
    options: jobs.LaunchOptions,
) -> None:
    """Search over fields of a recipe: grid, random or Bayesian; bad trials are ended early.

    Ctrl-C once saves and stops (exit code 75, go on with --resume auto); twice stops at once.
    """
    from llmpipe_cli.sweep.space import parse_parameters

    if goal not in (None, "minimize", "maximize"):
        raise UsageError("--goal is minimize or maximize", where=f"--goal {goal}")
    if keep not in ("best", "all"):
        raise UsageError("--keep is best or all", where=f"--keep {keep}")
    parameters = parse_parameters(grid or (), uniform or (), log or ())
    request = Request(
        recipe, set_ or [], parameters, search, trials, metric, goal, seed, prune, startup_trials, warmup_steps, keep
    )
    exit_code = run_sweep(request, resume, options)
    if exit_code is not None:
        raise typer.Exit(exit_code)


@dataclass(frozen=True)
class Request:
    """What the flags ask for."""

    recipe: Path
    overrides: Sequence[str]
    parameters: Sequence[Parameter]
    search: str | None = None
    num_trials: int | None = None
    metric: str = "loss"
    goal: str | None = None
    seed: int = 0
    prune: bool = True
    startup_trials: int = 4
    warmup_steps: int = 0
    keep: str = "best"

    @property
    def lower_is_better(self) -> bool:
        from llmpipe_cli.recipe.metrics import is_lower_better

        return is_lower_better(self.metric) if self.goal is None else self.goal == "minimize"

    def load(self, values: Sequence[str] = (), *more: str) -> LoadedRecipe:
        """The recipe with a trial's values; mistakes in them are placed at the flag that names the field.

        Raises:
            RecipeError: every mistake.
        """
        from llmpipe_cli.recipe.load import load_recipe

        flags = {f"--set {value}": one.flag for one, value in zip(self.parameters, values, strict=False)}
        try:
            return load_recipe(self.recipe, [*self.overrides, *values, *more], job="train")
        except RecipeError as error:
            for problem in error.problems:
                problem.where = flags.get(problem.where or "", problem.where)
            raise RecipeError(error.problems) from None


def run_sweep(request: Request, resume: str | None, options: jobs.LaunchOptions) -> int | None:
    """Run all trials that have not ended yet; returns the exit code, None after a dry run.

    Raises:
        LlmpipeError: a mistake in the flags, a node that is lost, or one trial after the other failing.
    """
    from llmpipe_cli.sweep.journal import SweepDirectory
    from llmpipe_cli.sweep.search import make_search

    base = jobs.load(request.recipe, request.overrides, "train")
    search = make_search(request.search, request.parameters, request.num_trials, request.seed, request.lower_is_better)
    _check(request, search)
    _check_metric(request, base)
    definition = _definition(request, search, base)
    if options.dry_run:
        _print_dry_run(definition, search, options.as_json)
        return None
    output_dir, name = Path(base.recipe.output_dir), base.recipe.name
    directory = SweepDirectory.find(resume, output_dir, name) if resume is not None else None
    if directory is None:
        directory = SweepDirectory.create(output_dir, name, definition)
    else:
        _check_same(directory, definition)
    console.say(f"sweep      {directory.path}")
    with directory.locked():
        exit_code = _Sweep(request, search, directory, options).run()
    _summarise(request, directory, exit_code, options)
    return exit_code


class _Sweep:
    """One trial after the other, from the first that has not ended."""

    def __init__(
        self, request: Request, search: Search, directory: SweepDirectory, options: jobs.LaunchOptions
    ) -> None:
        from llmpipe_cli.sweep.pruning import MedianRule

        self.request, self.search, self.directory, self.options = request, search, directory, options
        self.rule: MedianRule | None = None
        if request.prune:
            self.rule = MedianRule(request.lower_is_better, request.startup_trials, request.warmup_steps)
        self.failures_in_a_row = 0

    def run(self) -> int:
        """Exit code: 0, 75 or 130."""
        from llmpipe_cli.sweep.journal import Trial

        trials = {trial.number: trial for trial in self.directory.trials()}
        if trials:
            ended = sum(trial.state != "running" for trial in trials.values())
            console.say(f"goes on: {ended} of {self.search.num_trials} trials have ended")
        try:
            for number in range(self.search.num_trials):
                trial = trials.get(number)
                if trial is not None and trial.state != "running":
                    continue
                ended_trials = [trials[other] for other in sorted(trials) if trials[other].state != "running"]
                if trial is None:
                    trial = trials[number] = Trial(number, self.search.propose(number, ended_trials))
                    self.directory.begin(trial)
                console.say(f"trial {number} of {self.search.num_trials}: {' '.join(trial.overrides)}", "bold")
                exit_code = self._run_trial(trial, ended_trials)
                if exit_code:
                    return exit_code
                self._tidy(list(trials.values()))
        except StopRequested:
            return EXIT_STOPPED
        return 0

    def _run_trial(self, trial: Trial, ended: Sequence[Trial]) -> int:
        """Train to its end; returns 0 when the trial has ended in any way, else the exit code of the sweep."""
        started = time.monotonic()
        error: LlmpipeError | None = None
        finished = None
        try:
            finished = self._train(trial, ended)
        except NodeError:
            raise
        except LlmpipeError as caught:
            error = caught
        if finished is not None and finished.exit_code and finished.ended_early is None:
            return finished.exit_code
        loaded = self.request.load(trial.overrides)
        lines, max_steps = self._lines(trial.number)
        self._measure(trial, loaded, lines, max_steps)
        trial.seconds = time.monotonic() - started
        trial.run = next((str(run.path) for run in reversed(self.directory.runs(trial.number))), None)
        if error is not None:
            trial.state, trial.value, trial.message = "failed", None, error.message
            console.say(f"trial {trial.number} failed: {error}", "red")
        elif finished is not None and finished.exit_code:
            trial.state, trial.message = "pruned", finished.ended_early
            trial.value = trial.reports[-1][1]
        elif trial.value is None:
            known = ", ".join(sorted(_last_metrics(lines)) or ["loss"])
            raise UsageError(
                f"there is no metric {self.request.metric!r}",
                where=f"--metric {self.request.metric}",
                hint=f"metrics of this task: {known}",
            )
        else:
            trial.state = "complete"
        self.directory.end(trial)
        self._count_failures(error)
        return 0

    def _count_failures(self, error: LlmpipeError | None) -> None:
        """A diverged loss is a result; anything else that fails again and again ends the sweep."""
        if error is None:
            self.failures_in_a_row = 0
        elif not isinstance(error, NumericsError):
            self.failures_in_a_row += 1
            if self.failures_in_a_row == _FAILURES_IN_A_ROW:
                raise error

    def _train(self, trial: Trial, ended: Sequence[Trial]) -> jobs.Finished | None:
        """The way of `llmpipe train`, on from the trial's own newest checkpoint; None when it had come to its end."""
        from llmpipe_cli.cli.models import find_resume

        folder = self.directory.folder(trial.number)
        runs = self.directory.runs(trial.number)
        if runs and runs[-1].status()["state"] == "done":
            return None
        loaded = self.request.load(trial.overrides, f"output_dir={json.dumps(str(folder))}")
        checkpoint = find_resume("auto", loaded.recipe.name, folder)
        devices = jobs.devices_for(self.options)
        data = jobs.prepare(loaded, checkpoint)
        plan = jobs.plan_job(loaded.recipe, data, devices, job="train", loaded=loaded, checkpoint=checkpoint)
        return jobs.run_plan(plan, loaded, folder, self.options, self._stop_when(trial, loaded, ended))

    def _stop_when(
        self, trial: Trial, loaded: LoadedRecipe, ended: Sequence[Trial]
    ) -> Callable[[Progress], str | None] | None:
        """The median rule over this trial's numbers so far, asked once for each new one."""
        rule = self.rule
        if rule is None:
            return None
        earlier, _ = self._lines(trial.number)
        judged = 0

        def condition(progress: Progress) -> str | None:
            nonlocal judged
            new = len(progress.evaluations) + len(progress.steps)
            if new == judged or progress.step >= (progress.max_steps or 0):
                return None
            judged = new
            self._measure(trial, loaded, [*earlier, *progress.evaluations, *progress.steps], progress.max_steps)
            return rule.verdict(trial.reports, ended)

        return condition

    def _measure(self, trial: Trial, loaded: LoadedRecipe, lines: list[dict[str, Any]], max_steps: int | None) -> None:
        from llmpipe_cli.sweep.pruning import final_value, reports_of

        has_validation = loaded.recipe.data.validation is not None
        evaluated = has_validation and loaded.recipe.evaluation.every_steps is not None
        trial.reports = reports_of(lines, self.request.metric, max_steps, evaluated)
        trial.value = final_value(lines, self.request.metric, max_steps, has_validation)
        trial.step = max((line["step"] for line in lines if "event" not in line), default=0)

    def _lines(self, number: int) -> tuple[list[dict[str, Any]], int | None]:
        """Metrics of the trial's runs, oldest first, and the steps of the whole training."""
        from llmpipe_cli.run import read_metrics

        lines = [line for run in self.directory.runs(number) for line in read_metrics(run.metrics)]
        return lines, next((line["max_steps"] for line in reversed(lines) if line.get("event") == "start"), None)

    def _tidy(self, trials: Sequence[Trial]) -> None:
        """Remove checkpoints of trials that have ended and are not the best."""
        from llmpipe_cli.report.sweep import best_trial

        if self.request.keep == "all":
            return
        best = best_trial(trials, self.request.lower_is_better)
        for trial in trials:
            if trial.state != "running" and trial is not best:
                for run in self.directory.runs(trial.number):
                    for path in run.checkpoints.iterdir():
                        path.unlink() if path.is_symlink() else shutil.rmtree(path)


# ---------------------------------------------------------------------------------------------- before the start


def _check(request: Request, search: Search) -> None:
    """Hold every trial against the recipe's rules, those of results to come by each field's values alone.

    Raises:
        RecipeError: the first one that the recipe refuses.
    """
    foreseeable = search.foreseeable()
    for values in foreseeable:
        request.load([f"{name}={value}" for name, value in values.items()])
    if not foreseeable:
        first = [one.samples()[0] for one in request.parameters]
        for index, parameter in enumerate(request.parameters):
            for value in parameter.samples():
                point = [*first[:index], value, *first[index + 1 :]]
                pairs = zip(request.parameters, point, strict=True)
                request.load([f"{one.field}={text}" for one, text in pairs])


def _check_metric(request: Request, base: LoadedRecipe) -> None:
    if request.metric != "loss" and base.recipe.data.validation is None:
        hint = "add data.validation, or compare --metric loss, the training loss"
        raise UsageError(
            f"without validation data there is no {request.metric!r}", where=f"--metric {request.metric}", hint=hint
        )


def _definition(request: Request, search: Search, base: LoadedRecipe) -> dict[str, Any]:
    """What decides the trials; a sweep goes on with the same only."""
    return {
        "name": base.recipe.name,
        "search": type(search).__name__.removesuffix("Search").lower(),
        "trials": search.num_trials,
        "metric": request.metric,
        "goal": "minimize" if request.lower_is_better else "maximize",
        "seed": request.seed,
        "parameters": [one.to_json() for one in request.parameters],
        "recipe": base.recipe.model_dump(mode="json", by_alias=True),
    }


def _check_same(directory: SweepDirectory, definition: dict[str, Any]) -> None:
    """Refuse to go on with other trials than those before.

    Raises:
        UsageError: something that decides the trials has changed.
    """
    before = directory.definition() or {}
    for key, value in definition.items():
        if before.get(key) != value:
            raise UsageError(
                f"this sweep began with another {key}",
                where=str(directory.definition_file),
                hint="give the same flags and recipe, or leave out --resume to begin a new sweep",
            )


def _print_dry_run(definition: dict[str, Any], search: Search, as_json: bool) -> None:
    points = search.foreseeable()
    if as_json:
        console.print_json({"dry_run": True, **definition, "points": points})
        return
    lines = [f"{definition['search']} search, {search.num_trials} trials, {definition['goal']} {definition['metric']}"]
    lines += [f"trial {number}: {shlex.join(_sets(values))}" for number, values in enumerate(points)]
    if not points:
        lines.append("each trial's values follow from the results before it")
    console.stdout().print("\n".join(lines), markup=False, soft_wrap=True)


# ---------------------------------------------------------------------------------------------- at the end


def _summarise(request: Request, directory: SweepDirectory, exit_code: int, options: jobs.LaunchOptions) -> None:
    from llmpipe_cli.report.sweep import best_trial, plot_sweep, sweep_table
    from llmpipe_cli.run import RunDirectory
    from llmpipe_cli.sweep.space import Range

    trials = directory.trials()
    best = best_trial(trials, request.lower_is_better)
    log_fields = [one.field for one in request.parameters if isinstance(one, Range) and one.log]
    plot = plot_sweep(trials, request.metric, best, log_fields, directory.plot) if best is not None else None
    checkpoint = RunDirectory(Path(best.run)).latest_checkpoint() if best is not None and best.run else None
    command = None
    if best is not None:
        command = shlex.join(["llmpipe", "train", str(request.recipe), *_sets_of(request), *_sets(best.values)])
    if options.as_json:
        console.print_json(
            {
                "sweep": str(directory.path),
                "exit_code": exit_code,
                "metric": request.metric,
                "goal": "minimize" if request.lower_is_better else "maximize",
                "trials": [trial.to_json() for trial in trials],
                "best": None
                if best is None
                else {
                    "trial": best.number,
                    "value": best.value,
                    "values": best.values,
                    "checkpoint": None if checkpoint is None else str(checkpoint),
                    "command": command,
                },
                "plot": None if plot is None else str(plot),
            }
        )
        return
    console.stdout().print(sweep_table(trials, request.metric, best))
    if exit_code:
        console.say("stopped; go on with `--resume auto`", "yellow")
    if best is not None:
        console.say(f"checkpoint {checkpoint}")
        console.say(f"plot       {plot}")
        console.say(f"best       {command}")


def _sets(values: dict[str, str]) -> list[str]:
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def _sets_of(request: Request) -> list[str]:
    return [word for override in request.overrides for word in ("--set", override)]


def _last_metrics(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    evaluations: list[dict[str, Any]] = [line["metrics"] for line in lines if line.get("event") == "evaluation"]
    return evaluations[-1] if evaluations else {}
