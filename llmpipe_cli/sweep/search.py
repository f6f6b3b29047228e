"""Which trial comes next: every combination, random ones, or those that a model of the results expects most of.

A proposal depends on the sweep's definition, its own number and the trials that have ended, on nothing else: a sweep
that was killed proposes what it would have proposed. Nothing of a search is saved.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from llmpipe_cli.errors import UsageError
from llmpipe_cli.sweep.journal import Trial
from llmpipe_cli.sweep.space import Choice, Parameter, Range

SEARCHES = ("grid", "random", "bayes")
_DEFAULT_TRIALS = 12


class Search(Protocol):
    """A way through the space."""

    num_trials: int

    def propose(self, number: int, ended: Sequence[Trial]) -> dict[str, str]:
        """Values of trial `number` by field; `ended` are trials with smaller numbers."""

    def foreseeable(self) -> list[dict[str, str]]:
        """Every proposal that does not depend on results."""


def make_search(
    kind: str | None, parameters: Sequence[Parameter], num_trials: int | None, seed: int, lower_is_better: bool
) -> Search:
    """The search that the flags ask for; without `kind` a grid of choices alone, else random.

    Raises:
        UsageError: an unknown kind, a range in a grid, optuna is not installed.
    """
    kind = kind or ("grid" if num_trials is None and all(isinstance(one, Choice) for one in parameters) else "random")
    if kind == "grid":
        return GridSearch(parameters, num_trials)
    if kind == "random":
        return RandomSearch(parameters, num_trials or _DEFAULT_TRIALS, seed)
    if kind == "bayes":
        return BayesSearch(parameters, num_trials or _DEFAULT_TRIALS, seed, lower_is_better)
    raise UsageError(f"there is no search {kind!r}", where=f"--search {kind}", hint=f"one of {', '.join(SEARCHES)}")


class GridSearch:
    """Every combination, the last parameter changing fastest."""

    def __init__(self, parameters: Sequence[Parameter], num_trials: int | None) -> None:
        for parameter in parameters:
            if isinstance(parameter, Range):
                hint = f"name values with --grid {parameter.field}=A,B, or search with --search random"
                raise UsageError("a grid needs single values", where=parameter.flag, hint=hint)
        choices = [one for one in parameters if isinstance(one, Choice)]
        fields = [one.field for one in choices]
        self._points = [
            dict(zip(fields, values, strict=True)) for values in itertools.product(*(one.values for one in choices))
        ]
        self.num_trials = min(num_trials or len(self._points), len(self._points))

    def propose(self, number: int, ended: Sequence[Trial]) -> dict[str, str]:
        return self._points[number]

    def foreseeable(self) -> list[dict[str, str]]:
        return self._points[: self.num_trials]


class RandomSearch:
    """Independent draws; each from the seed, the trial's number and the field's name."""

    def __init__(self, parameters: Sequence[Parameter], num_trials: int, seed: int) -> None:
        self._parameters, self.num_trials, self._seed = parameters, num_trials, seed

    def propose(self, number: int, ended: Sequence[Trial]) -> dict[str, str]:
        return {
            one.field: one.at(random.Random(f"{self._seed}/{number}/{one.field}").random()) for one in self._parameters
        }

    def foreseeable(self) -> list[dict[str, str]]:
        return [self.propose(number, ()) for number in range(self.num_trials)]


class BayesSearch:
    """optuna's tree-structured Parzen estimator (Bergstra et al. 2011), told all trials anew for each proposal."""

    def __init__(self, parameters: Sequence[Parameter], num_trials: int, seed: int, lower_is_better: bool) -> None:
        try:
            import optuna
        except ImportError:
            hint = "pip install 'llmpipe_cli[sweep]', or use --search random"
            raise UsageError("--search bayes needs optuna", where="--search bayes", hint=hint) from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._parameters, self.num_trials, self._seed = parameters, num_trials, seed
        self._direction: Literal["minimize", "maximize"] = "minimize" if lower_is_better else "maximize"
        # A third of the trials look around first, ten at most (optuna's own number).
        self._num_startup = min(10, max(3, num_trials // 3))

    def propose(self, number: int, ended: Sequence[Trial]) -> dict[str, str]:
        import optuna

        sampler = optuna.samplers.TPESampler(
            n_startup_trials=self._num_startup, seed=random.Random(f"{self._seed}/{number}").getrandbits(32)
        )
        study = optuna.create_study(direction=self._direction, sampler=sampler)
        distributions = {one.field: _distribution(one) for one in self._parameters}
        for trial in ended:
            state = _state(trial)
            study.add_trial(
                optuna.trial.create_trial(
                    state=state,
                    params={one.field: _native(one, trial.values[one.field]) for one in self._parameters},
                    distributions=distributions,
                    value=trial.value if state == optuna.trial.TrialState.COMPLETE else None,
                    intermediate_values=dict(trial.reports),
                )
            )
        params = study.ask(distributions).params
        return {
            one.field: one.text(params[one.field]) if isinstance(one, Range) else params[one.field]
            for one in self._parameters
        }

    def foreseeable(self) -> list[dict[str, str]]:
        return []


def _distribution(parameter: Parameter) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(parameter, Choice):
        return CategoricalDistribution(parameter.values)
    if parameter.whole:
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def _native(parameter: Parameter, text: str) -> Any:
    """A value as optuna knows it."""
    if isinstance(parameter, Choice):
        return text
    return int(text) if parameter.whole else min(max(float(text), parameter.low), parameter.high)


def _state(trial: Trial) -> Any:
    from optuna.trial import TrialState

    return {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}.get(trial.state, TrialState.FAIL)
