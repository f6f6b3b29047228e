"""llmpipe beside other ways to train the same model on two cores; `make bench` runs it.

    python benchmarks/compare.py --output docs/benchmarks.md
    python benchmarks/compare.py --sections main                                  # in pieces: measure one section,
    python benchmarks/compare.py --resume --output docs/benchmarks.md             # then what is missing, and write
    python benchmarks/compare.py --sections main --launches 1 --systems llmpipe-zb-h1,llmpipe-zb-v   # a short look

llmpipe's stages may begin inside a layer, as is its default; `llmpipe-zb-v-whole` and the like keep layers whole.

Each launch starts two processes of one thread; in each round every system does one optimizer step, those that only
complete the picture in every third round of the first launch. Speeds drift on a busy machine, so systems are compared
round by round: the reported ratio is the median over all rounds of all launches that both took part in, with the
quartiles beside it. After the main section come a deeper model and a shorter pipeline with the systems that matter
most, and what recording the timeline costs.

Every launch leaves its measurements in a file (`--results`), so an interrupted comparison goes on with `--resume`. The
launches share `--minutes`: one that runs out of its part of the time ends with fewer rounds, which the tables say.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from systems import Work

from llmpipe_cli.cluster.devices import local_devices
from llmpipe_cli.data.prepare import prepare
from llmpipe_cli.engine.recorder import Recorder
from llmpipe_cli.engine.schedules import SCHEDULES
from llmpipe_cli.plan.plan import Plan
from llmpipe_cli.plan.resolve import make_plan_on
from llmpipe_cli.recipe.schema import Recipe

LABELS = {
    "independent": "plain transformers, two independent processes (the ceiling)",
    "torch": "torch.distributed.pipelining 1F1B, hand-written layers",
    "torch-tuned": "the same, cut balanced, fused AdamW",
    "torch-interleaved": "torch.distributed.pipelining interleaved 1F1B, two parts a rank",
    "torch-zbv": "torch.distributed.pipelining ZBV",
    "deepspeed": "DeepSpeed PipelineEngine, hand-written layers",
    "deepspeed-tuned": "the same, cut balanced, fused AdamW",
    "deepspeed-data": "DeepSpeed data parallel, two replicas",
    "transformers": "plain transformers, one process of one thread",
    "two-threads": "plain transformers, one process of two threads",
    "llmpipe-1f1b": "**llmpipe**, 1F1B",
    "llmpipe-gpipe": "**llmpipe**, GPipe",
    "llmpipe-interleaved": "**llmpipe**, interleaved 1F1B, two parts a stage",
    "llmpipe-zb-h1": "**llmpipe**, ZB-H1",
    "llmpipe-zb-h2": "**llmpipe**, ZB-H2",
    "llmpipe-zb-v": "**llmpipe**, ZB-V",
    "llmpipe-zb-v-whole": "**llmpipe**, ZB-V, layers kept whole",
}
UNRECORDED = "-unrecorded"  # suffix: without a timeline
WHOLE = "-whole"  # suffix: `parallel.split_layers: false`
RECORDING = ("llmpipe-zb-h1", "llmpipe-zb-h1" + UNRECORDED)
MAIN = (
    "independent", "torch", "torch-interleaved", "torch-zbv", "deepspeed",
    "llmpipe-interleaved", "llmpipe-zb-h1", "llmpipe-zb-h2", "llmpipe-zb-v",
)  # fmt: skip
TORCH = ("torch", "torch-interleaved", "torch-zbv")
KINDS = ("wall", "cpu", "simulated")
EVERY = 3  # rounds from one step to the next of the systems that only complete the picture
START_STEPS = 12  # what starting a launch takes, in steps
Seconds = dict[str, list[float | None]]


@dataclass(frozen=True)
class Section:
    """One comparison: what is trained, by which systems, how often."""

    key: str
    work: Work
    systems: tuple[str, ...]
    launches: int
    rounds: int
    warmup: int

    @property
    def title(self) -> str:
        size = f"{self.work.num_layers} layers, {self.work.num_micro_batches} micro-batches"
        return f"What recording the timeline costs ({size})" if self.key == "recording" else size

    @property
    def always(self) -> tuple[str, ...]:
        """Those that take part in all rounds: the main ones, or all that were asked for."""
        return tuple(name for name in self.systems if name in MAIN) if self.systems == tuple(LABELS) else self.systems

    def systems_of(self, launch: int) -> tuple[str, ...]:
        """Those that a launch (from 0) starts."""
        return self.systems if launch == 0 else self.always

    def weight(self, launch: int) -> float:
        """About how long a launch takes, in layers of micro-batches: its steps, and what starting it takes."""
        steps = len(self.always) * (self.rounds + self.warmup)
        steps += (len(self.systems_of(launch)) - len(self.always)) * (self.rounds / EVERY + self.warmup)
        return (steps + START_STEPS) * self.work.num_layers * self.work.num_micro_batches


@dataclass(frozen=True)
class Result:
    """What a section measured: for each system the seconds of its rounds by `KINDS`, null where it took no part."""

    section: Section
    rounds: tuple[int, ...]
    seconds: dict[str, Seconds]


def main() -> None:
    """Run what is to be run, print the tables and write them."""
    arguments = _arguments()
    sections = _sections(arguments)
    results = []
    for section, launches in _measure(sections, arguments):
        results.append(_join(section, launches))
        print(_section_text(results[-1]), flush=True)
    if arguments.json is not None:
        rows = [{"title": each.section.title, "work": asdict(each.section.work), **each.seconds} for each in results]
        arguments.json.write_text(json.dumps(rows) + "\n")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        picture = arguments.output.with_suffix(".png")
        _plot(results[0], picture)
        arguments.output.write_text(_document(results, picture.name))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="main,deep,short,recording", help="of these, separated by commas")
    parser.add_argument("--launches", type=int, default=3, help="times the processes of the main section are started")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each of its launches")
    parser.add_argument("--warmup", type=int, default=1, help="steps of each system and launch before them")
    parser.add_argument("--systems", default=",".join(LABELS), help="names, separated by commas")
    parser.add_argument("--layers", type=int, default=8, help="layers of the main section's model")
    parser.add_argument("--micro-batches", type=int, default=8, help="its micro-batches a step")
    parser.add_argument("--minutes", type=float, default=13.0, help="time for all launches together")
    parser.add_argument("--results", type=Path, default=Path("build/benchmarks"), help="folder for their measurements")
    parser.add_argument("--resume", action="store_true", help="keep the launches that were measured there before")
    parser.add_argument("--output", type=Path, help="Markdown file to write; the picture goes beside it")
    parser.add_argument("--json", type=Path, help="file for the seconds of every step")
    return parser.parse_args()


def _sections(arguments: argparse.Namespace) -> list[Section]:
    names, warmup = tuple(arguments.systems.split(",")), arguments.warmup
    main_ones = tuple(name for name in names if name in MAIN)
    work = Work(num_layers=arguments.layers, num_micro_batches=arguments.micro_batches)
    known = [
        Section("main", work, names, arguments.launches, arguments.rounds, warmup),
        Section("deep", Work(num_layers=16), main_ones, 2, 5, warmup),
        Section("short", Work(num_micro_batches=4), main_ones, 1, 7, warmup),
        Section("recording", Work(num_micro_batches=4), RECORDING, 1, 24, warmup),
    ]
    return [section for section in known if section.key in arguments.sections.split(",")]


def _measure(sections: list[Section], arguments: argparse.Namespace) -> Iterator[tuple[Section, list[Seconds]]]:
    """All launches of each section, those of an earlier comparison included when it is resumed."""
    end = time.time() + 60.0 * arguments.minutes
    arguments.results.mkdir(parents=True, exist_ok=True)

    def kept(section: Section, launch: int) -> dict[str, Seconds] | None:
        path = _result_file(arguments.results, section, launch)
        if not arguments.resume or not path.exists():
            return None
        found = json.loads(path.read_text())
        return found["seconds"] if found["section"] == _identity(section) else None

    todo = [(section, launch) for section in sections for launch in range(section.launches)]
    weights = {(s.key, launch): s.weight(launch) for s, launch in todo if kept(s, launch) is None}
    for section in sections:
        launches = []
        for launch in range(section.launches):
            measured = kept(section, launch)
            if measured is None:
                now, share = time.time(), weights[section.key, launch] / sum(weights.values())
                del weights[section.key, launch]
                measured = _launch(section, launch, now + share * (end - now))
                found = {"section": _identity(section), "seconds": measured}
                _result_file(arguments.results, section, launch).write_text(json.dumps(found))
                done = f"{section.title}: launch {launch + 1} of {section.launches} took {time.time() - now:.0f} s"
                print(done, file=sys.stderr, flush=True)
            launches.append(measured)
        yield section, launches


def _result_file(folder: Path, section: Section, launch: int) -> Path:
    return folder / f"{section.key}-{launch + 1}.json"


def _identity(section: Section) -> dict[str, object]:
    """What has to be the same for a launch's measurements to be those of this section, as JSON has it."""
    return json.loads(json.dumps(asdict(section)))


def _join(section: Section, launches: list[dict[str, Seconds]]) -> Result:
    """The launches' rounds one after another."""
    rounds = tuple(max(len(values) for values in launch["wall"].values()) for launch in launches)
    seconds: dict[str, Seconds] = {kind: {name: [] for name in section.systems} for kind in KINDS}
    for count, launch in zip(rounds, launches, strict=True):
        absent: list[float | None] = [None] * count
        for kind, by_system in seconds.items():
            for name, values in by_system.items():
                values += launch[kind].get(name, absent)
    return Result(section, rounds, seconds)


def _launch(section: Section, number: int, deadline: float) -> dict[str, Seconds]:
    """One launch; one that fails is tried once more."""
    names = section.systems_of(number)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for system in names:
            if system.startswith("llmpipe-"):
                _plan(folder, section.work, system).save(folder / f"{system}.json")
        launch = {
            "work": asdict(section.work),
            "systems": names,
            "always": section.always,
            "every": EVERY,
            "rounds": section.rounds,
            "warmup": section.warmup,
            "deadline": deadline,
            "simulate": section.key != "recording",
            "threads": 1,
        }
        (folder / "launch.json").write_text(json.dumps(launch))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        for attempt in (1, 2):
            ended = subprocess.run(
                [*command, str(Path(__file__).with_name("rank.py")), str(folder)],
                check=attempt == 2,
                env=environment,
                stdout=subprocess.DEVNULL,
            )
            if ended.returncode == 0:
                break
        return json.loads((folder / "seconds.json").read_text())


def _plan(folder: Path, work: Work, name: str) -> Plan:
    """The plan that `llmpipe train` would make for this work, two stages and the schedule in the name."""
    recipe = Recipe.model_validate(
        {
            "name": name,
            "model": {"config": work.config_fields()},
            "data": {"train": {"synthetic": True}, "sequence_len": work.sequence_len},
            "train": {
                "max_steps": 10_000,
                "global_batch_size": work.num_micro_batches * work.micro_batch_size,
                "micro_batch_size": work.micro_batch_size,
                "learning_rate": work.learning_rate,
                "lr_scheduler_type": "constant",
                "max_grad_norm": work.max_grad_norm,
            },
            "parallel": {
                "pipeline": 2,
                "schedule": name.removeprefix("llmpipe-").removesuffix(UNRECORDED).removesuffix(WHOLE),
                "split_layers": False if name.endswith(WHOLE) else "auto",
            },
        }
    )
    data = prepare(recipe, folder, folder / "cache")
    return make_plan_on(recipe, data, local_devices(2))


def _tokens_per_second(name: str, seconds: list[float | None], work: Work) -> list[float | None]:
    """Two independent processes do a step each at the same time."""
    tokens = work.tokens * (2 if name == "independent" else 1)
    return [None if value is None else tokens / value for value in seconds]


def _measured(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _ratios(own: list[float | None], other: list[float | None]) -> list[float]:
    """Round by round, where both took part."""
    pairs = zip(own, other, strict=True)
    return [mine / theirs for mine, theirs in pairs if mine is not None and theirs is not None]


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _speeds(wall: Seconds, work: Work) -> Seconds:
    return {name: _tokens_per_second(name, seconds, work) for name, seconds in wall.items()}


def _best_of_torch(speeds: Seconds) -> str | None:
    """torch.distributed.pipelining's fastest schedule of those that took part most often."""
    counts = {name: len(_measured(speeds[name])) for name in TORCH if name in speeds}
    often = [name for name, count in counts.items() if count == max(counts.values())]
    return max(often, key=lambda name: statistics.median(_measured(speeds[name])), default=None)


def _section_text(result: Result) -> str:
    """The section as Markdown."""
    section, seconds = result.section, result.seconds
    counts = " + ".join(map(str, result.rounds))
    launches = f"{len(result.rounds)} launch" + ("es" if len(result.rounds) > 1 else "")
    body = _recording_text(result) if section.key == "recording" else _table(section, seconds)
    return f"## {section.title}\n\n{launches} of {counts} rounds.\n\n{body}"


def _table(section: Section, seconds: dict[str, Seconds]) -> str:
    """All systems, their speeds and the ratios to the references."""
    speeds = _speeds(seconds["wall"], section.work)
    best = _best_of_torch(speeds)
    references = [name for name in ("independent", best, "deepspeed") if name in speeds]
    header = ["system", "tokens/s", "CPU s a step", *(f"x {name}" for name in references), "rounds"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, values in speeds.items():
        measured, cpu = _measured(values), _measured(seconds["cpu"][name])
        cells = [LABELS.get(name, name), f"{statistics.median(measured):.0f}", f"{statistics.median(cpu):.3f}"]
        for reference in references:
            cells += ["1" if name == reference else _spread(_ratios(values, speeds[reference]))]
        lines.append("| " + " | ".join([*cells, str(len(measured))]) + " |")
    notes = [
        f"{LABELS.get(name, name)} {statistics.median(values):.3f}"
        for name in speeds
        if (values := _measured(seconds["simulated"][name]))
    ]
    simulated = f"\nSimulated over measured step, median: {', '.join(notes)}.\n" if notes else ""
    return "\n".join(lines) + "\n" + simulated


def _recording_text(result: Result) -> str:
    """Steps with and without the recorder beside each other, and its clock readings on their own."""
    wall, work = result.seconds["wall"], result.section.work
    recorded, silent = (wall[name] for name in RECORDING)
    step = statistics.median(_measured(recorded))
    # The instructions of the stage with more of them; data, send, reduce, the optimizer's two parts, norm, exchange.
    count = max(len(SCHEDULES["zb-h1"](stage, 2, work.num_micro_batches)) for stage in range(2)) + 7
    each = _seconds_of_a_record()
    return (
        f"A step that is recorded over one that is not, in turn: {_spread(_ratios(recorded, silent))}. Timed alone, a "
        f"record takes {each * 1e6:.1f} us;\na step has {count} of them, {count * each / step:.4%} of its time.\n"
    )


def _seconds_of_a_record(repeats: int = 20_000) -> float:
    recorder = Recorder()
    started = time.perf_counter()
    for index in range(repeats):
        recorder.begin("F", index)
        recorder.arrived()
        recorder.end()
    return (time.perf_counter() - started) / repeats


def _spread(ratios: list[float]) -> str:
    low, middle, high = _quartiles(ratios)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def _plot(result: Result, path: Path) -> None:
    """Each system's speed as a share of two independent processes: median and quartiles."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    speeds = _speeds(result.seconds["wall"], result.section.work)
    names = [name for name in speeds if name != "independent"] if "independent" in speeds else []
    if not names:
        return
    quartiles = {name: _quartiles(_ratios(speeds[name], speeds["independent"])) for name in names}
    names.sort(key=lambda name: quartiles[name][1])
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.34 * len(names)), layout="constrained")
    for row, name in enumerate(names):
        low, middle, high = quartiles[name]
        axes.barh(row, middle, color="#3b6fd4" if name.startswith("llmpipe") else "#b9c0c7")
        axes.plot([low, high], [row, row], color="#20262c", linewidth=1)
        axes.text(0.01, row, f"{middle:.2f}", va="center", color="white", fontsize=8)
    axes.set_yticks(range(len(names)), [name.replace("llmpipe-", "llmpipe ") for name in names], fontsize=8)
    axes.axvline(1.0, color="#20262c", linewidth=0.8, linestyle=":")
    axes.set_xlabel("speed over two independent processes; lines: quartiles over the rounds")
    axes.set_title(result.section.title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _summary(results: list[Result]) -> str:
    """What `schedule: auto` takes in each section, and how it does."""
    header = ["section", "schedule: auto takes", "x independent", "x best of torch", "x deepspeed", "rounds"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for result in results:
        speeds = _speeds(result.seconds["wall"], result.section.work)
        with tempfile.TemporaryDirectory() as folder:
            taken = _plan(Path(folder), result.section.work, "llmpipe-auto").schedule
        references = ["independent", _best_of_torch(speeds), "deepspeed"]
        own = speeds.get(f"llmpipe-{taken}")
        if result.section.key == "recording" or own is None or any(name not in speeds for name in references):
            continue
        cells = [_spread(_ratios(own, speeds[str(name)])) for name in references]
        lines.append("| " + " | ".join([result.section.title, taken, *cells, str(len(_measured(own)))]) + " |")
    return "\n".join(lines) + "\n"


def _machine() -> str:
    """Processor, cores and memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"


def _document(results: list[Result], picture: str) -> str:
    work = results[0].section.work
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    sections = "\n".join(_section_text(result) for result in results)
    return f"""# Benchmarks

Written by `{shlex.join(["python", "benchmarks/compare.py", *sys.argv[1:]])}` (`make bench`) on
{_machine()}, with Python {platform.python_version()}, {packages}.

A Llama (hidden {work.hidden_size}, MLP {work.intermediate_size}, {work.num_heads} heads, vocabulary {work.vocab_size},
fp32): micro-batches of {work.micro_batch_size} x {work.sequence_len} tokens, AdamW, gradients clipped at
{work.max_grad_norm}; two processes of one thread each, gloo. All systems live in the same processes and do their steps
in turn. Ratios are medians of the ratio within a round, quartiles in brackets. CPU seconds are those of both processes
together. llmpipe's figures hold its whole training step: reading data, metrics, timeline. Its steps are also played
through by the simulator, fed with the same step's instruction times: what is missing from 1 is time that the timeline
cannot name.

Two independent processes send nothing and never wait, so together they are what this machine can do; a 1F1B pipeline of
two equal stages and m micro-batches can reach m / (m + 1) of it, because each stage waits for one micro-batch a step.
Stages of whole layers are not equal: with 8 layers and a head that weighs a little more than one, the larger stage has
5 of about 9.2. llmpipe cuts inside a layer where that makes a step 2 % shorter.

{_summary(results)}
![speeds over two independent processes]({picture})

{sections}"""


if __name__ == "__main__":
    main()
