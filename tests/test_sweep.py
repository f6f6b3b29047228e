"""`llmpipe sweep`: what is searched, trials that are killed, pruned and gone on with, over real ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
import pytest
from commands import PoolJob, PoolLauncher
from rank_pool import RankPool

from llmpipe_cli.cli.jobs import LaunchOptions
from llmpipe_cli.cli.sweep import Request, run_sweep
from llmpipe_cli.cluster.launchers.base import Job, Launcher, LaunchSpec
from llmpipe_cli.cluster.outcome import Outcome
from llmpipe_cli.errors import RecipeError, UsageError
from llmpipe_cli.run import read_metrics
from llmpipe_cli.sweep.journal import SweepDirectory, Trial
from llmpipe_cli.sweep.pruning import MedianRule
from llmpipe_cli.sweep.search import BayesSearch, RandomSearch, make_search
from llmpipe_cli.sweep.space import Choice, Range, parse_parameters

RECIPE = """\
name: tiny
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
           num_key_value_heads: 2, vocab_size: 300, max_position_embeddings: 32}
tokenizer: {train: {vocab_size: 300}}
data:
  train: {files: "corpus/*.txt"}
  validation: {fraction: 0.2}
  sequence_len: 32
train: {max_steps: 6, global_batch_size: 4, micro_batch_size: 1, learning_rate: 1.0e-2, lr_scheduler_type: constant}
parallel: {pipeline: 1}
evaluation: {every_steps: 2}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "corpus").mkdir()
    for number in range(20):
        text = " ".join(f"the {(number * word) % 17}th fox of the corpus jumps over dog {word}." for word in range(40))
        (tmp_path / "corpus" / f"{number}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path


# ---------------------------------------------------------------------------------------------- without ranks


def test_parameters_of_flags() -> None:
    grid, uniform, log = (
        ["lora.r=4,8", "lora.target_modules=[a,b],all-linear"],
        ["a.b=1:3", "a.c=1.0:3"],
        ["a.d=1e-4:1"],
    )
    r, modules, whole, real, rate = parse_parameters(grid, uniform, log)
    assert isinstance(r, Choice)
    assert isinstance(modules, Choice)
    assert modules.values == ("[a,b]", "all-linear")
    assert [whole.at(share / 30) for share in range(30)] == ["1"] * 10 + ["2"] * 10 + ["3"] * 10
    assert isinstance(real, Range)
    assert (real.at(0.5), rate.at(0.5)) == ("2", "0.01")
    for wrong, words in [
        (([], [], []), "nothing to search"),
        ((["a"], [], []), "FIELD=A,B"),
        ((["a=1,,2"], [], []), "FIELD=A,B"),
        ((["a=1,1"], [], []), "twice"),
        ((["a=1"], ["a=1:2"], []), "twice"),
        (([], ["a=2:1"], []), "LOW below HIGH"),
        (([], ["a=x:1"], []), "two numbers"),
        (([], [], ["a=0:1"]), "above 0"),
        ((["name=a,b"], [], []), "cannot be searched"),
    ]:
        with pytest.raises(UsageError, match=words):
            parse_parameters(*wrong)
    with pytest.raises(UsageError, match="single values"):
        make_search("grid", [r, rate], None, 0, True)
    assert make_search(None, [r, modules], None, 0, True).foreseeable()[1] == {
        "lora.r": "4",
        "lora.target_modules": "all-linear",
    }


def test_mistakes_are_told_before_anything_starts(folder: Path) -> None:
    options = LaunchOptions(None, None, False, False, {}, 1.0)
    for search, flags, where in [
        ("grid", (["train.learning_rat=1e-4"], [], []), "--grid train.learning_rat=1e-4"),
        ("random", (["train.optimizer=adamw,adma"], [], []), "--grid train.optimizer=adamw,adma"),
        ("random", ([], ["model.dropout=1.0:2.0"], []), "--uniform model.dropout=1.0:2.0"),
        ("bayes", ([], ["model.dropout=0.0:1.0"], []), "--uniform model.dropout=0.0:1.0"),
    ]:
        with pytest.raises(RecipeError) as caught:
            run_sweep(Request(folder / "tiny.yaml", [], parse_parameters(*flags), search, 40), None, options)
        assert caught.value.where == where
    assert not (folder / "runs").exists()


def test_median_rule_is_that_of_optuna() -> None:
    draw, verdicts = random.Random(0), []
    for _ in range(200):
        lower_is_better = draw.random() < 0.5
        study = optuna.create_study(direction="minimize" if lower_is_better else "maximize")
        ended = []
        for number in range(draw.randrange(12)):
            reports = [(step, draw.random()) for step in (2, 4, 6)]
            state = draw.choice(["complete", "pruned"])
            ended.append(Trial(number, {}, state, reports[-1][1], reports))
            study.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState[state.upper()],
                    value=reports[-1][1],
                    intermediate_values=dict(reports),
                )
            )
        mine = study.ask()
        reports = [(step, draw.random()) for step in (2, 4, 6)[: draw.randrange(1, 4)]]
        for step, value in reports:
            mine.report(value, step)
        warmup = draw.choice([0, 4])
        pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=warmup)
        expected = pruner.prune(study, study._storage.get_trial(mine._trial_id))
        assert (MedianRule(lower_is_better, 2, warmup).verdict(reports, ended) is not None) == expected
        verdicts.append(expected)
    assert 20 < sum(verdicts) < 180, "both answers occur"


def test_bayes_learns_and_forgets_nothing_when_it_is_rebuilt() -> None:
    parameters = parse_parameters(["o=adamw,lion"], [], ["lr=1e-6:1"])

    def distance(values: dict[str, str]) -> float:
        import math

        return abs(math.log10(float(values["lr"])) + 3) + (values["o"] == "lion")

    def run(search: Any, rebuilt: bool) -> list[Trial]:
        trials: list[Trial] = []
        for number in range(24):
            if rebuilt:
                search = BayesSearch(parameters, 24, 5, True)
            values = search.propose(number, trials)
            trials.append(Trial(number, values, "complete", distance(values), [(1, distance(values))]))
        return trials

    one, other = run(BayesSearch(parameters, 24, 5, True), False), run(None, True)
    assert [trial.values for trial in one] == [trial.values for trial in other]
    chance = run(RandomSearch(parameters, 24, 5), False)
    assert sum(distance(trial.values) for trial in one[12:]) < sum(distance(trial.values) for trial in chance[12:])


# ---------------------------------------------------------------------------------------------- over ranks


class Killed(BaseException):
    """Stands for the end of the process: nothing on the way may handle it."""


class MortalJob(PoolJob):
    """Takes the controller with it after the first step."""

    def poll(self) -> Outcome | None:
        if any("event" not in line for line in read_metrics(self.run.metrics)):
            raise Killed
        return super().poll()


class CountingLauncher(PoolLauncher):
    """Starts jobs on a rank pool; the job of number `kill_at` takes the controller with it."""

    def __init__(self, pool: RankPool, kill_at: int | None) -> None:
        super().__init__(pool)
        self._kill_at, self.started = kill_at, 0

    def start(self, spec: LaunchSpec) -> Job:
        self.started += 1
        return MortalJob(self.pool, spec) if self.started - 1 == self._kill_at else super().start(spec)


class PoolOptions(LaunchOptions):
    def on(self, pool: RankPool, kill_at: int | None = None) -> PoolOptions:
        self.__dict__["starter"] = CountingLauncher(pool, kill_at)
        return self

    @cached_property
    def starter(self) -> Launcher:
        raise NotImplementedError


def test_twelve_trials_killed_and_gone_on_with(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = parse_parameters(["train.optimizer=adamw,lion"], [], ["train.learning_rate=1e-6:1e-1"])
    request = Request(folder / "tiny.yaml", ["checkpoint.every_steps=1"], parameters, "random", 12, seed=3)
    options = PoolOptions(None, None, False, True, {}, 10.0)
    with RankPool(1) as pool:
        with pytest.raises(Killed):
            run_sweep(request, None, options.on(pool, kill_at=5))
        directory = SweepDirectory.find("auto", folder / "runs", "tiny")
        assert directory is not None
        assert [trial.state == "running" for trial in directory.trials()] == [False] * 5 + [True]
        with (directory.path / "trials.jsonl").open("a") as file:
            file.write('{"trial": 5, "event": "e')  # a write that was cut off
        with pytest.raises(UsageError, match="another seed"):
            run_sweep(Request(request.recipe, request.overrides, parameters, "random", 12, seed=4), "auto", options)
        capsys.readouterr()
        options = PoolOptions(None, None, False, True, {}, 10.0)
        assert run_sweep(request, "auto", options.on(pool)) == 0
        assert options.starter.started == 7, "five had ended, and are not run again"  # type: ignore[attr-defined]
    document = json.loads(capsys.readouterr().out)
    trials = directory.trials()
    assert [trial.values for trial in trials] == RandomSearch(parameters, 12, 3).foreseeable()
    ends = [line["trial"] for line in read_metrics(directory.path / "trials.jsonl") if line["event"] == "end"]
    assert ends == list(range(12))
    # The one that was killed went on from its checkpoint, all others are one run.
    runs = [directory.runs(number) for number in range(12)]
    assert [len(mine) for mine in runs] == [1] * 5 + [2] + [1] * 6
    assert any(line.get("event") == "resume" for line in read_metrics(runs[5][-1].metrics))
    states = {trial.state for trial in trials}
    assert {"complete", "pruned"} <= states
    for trial in trials:
        evaluations = [
            line for line in read_metrics(runs[trial.number][-1].metrics) if line.get("event") == "evaluation"
        ]
        assert trial.value == evaluations[-1]["metrics"]["loss"]
        assert (trial.step == 6) == (trial.state == "complete")
    best = min((trial for trial in trials if trial.state == "complete"), key=lambda trial: trial.value or 0.0)
    assert document["best"]["trial"] == best.number
    assert all(f"--set {override}" in document["best"]["command"] for override in best.overrides)
    kept = [number for number in range(12) if runs[number][-1].steps_saved()]
    assert kept == [best.number], "only the best trial's checkpoints stay"
    assert Path(document["plot"]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_sigkill_of_the_command(folder: Path) -> None:
    command = [sys.executable, "-m", "llmpipe_cli", "sweep", "tiny.yaml", "--grid", "train.learning_rate=1e-2,1e-3"]
    command += ["--no-prune", "--set", "checkpoint.every_steps=50", "--set", "train.max_steps=200"]
    command += ["--set", "evaluation.every_steps=null"]
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 240
    while not any((folder / "runs").glob("*/trials/0001/*/checkpoints/latest")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(
        [*command, "--resume", "auto", "--json"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [trial["state"] for trial in document["trials"]] == ["complete", "complete"]
    directory = SweepDirectory(Path(document["sweep"]))
    assert [len(directory.runs(number)) for number in range(2)] == [1, 2]
    assert document["trials"][1]["step"] == 200
