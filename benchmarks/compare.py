"""llmpipe beside other ways to train the same model on two cores; `make bench` runs it.

    python benchmarks/compare.py --output docs/benchmarks.md
    python benchmarks/compare.py --only-main --systems llmpipe-zb-h1,llmpipe-zb-h1-unrecorded   # what recording costs

Each launch starts two processes of one thread; in each round every system does one optimizer step, those that only
complete the picture in every third round of the first launch. Speeds drift on a busy machine, so systems are compared
round by round: the reported ratio is the median over all rounds of all launches that both took part in, with the
quartiles beside it. After the main section come a deeper model and a shorter pipeline with the systems that matter
most.
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
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from systems import Work

from llmpipe_cli.data.prepare import prepare
from llmpipe_cli.plan.resolve import make_plan
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
}
MAIN = ("independent", "torch", "deepspeed", "llmpipe-zb-h1", "llmpipe-zb-h2", "llmpipe-zb-v")
TORCH = ("torch", "torch-interleaved", "torch-zbv")
KINDS = ("wall", "cpu", "simulated")
Seconds = dict[str, list[float | None]]


@dataclass(frozen=True)
class Section:
    """One comparison: what is trained, by which systems, how often."""

    title: str
    work: Work
    systems: tuple[str, ...]
    launches: int
    rounds: int

    @property
    def always(self) -> tuple[str, ...]:
        """Those that take part in all rounds: the main ones, or all that were asked for."""
        return tuple(name for name in self.systems if name in MAIN) if self.systems == tuple(LABELS) else self.systems


def main() -> None:
    """Run all launches, print the tables and write them."""
    arguments = _arguments()
    sections = _sections(arguments)
    texts, results = [], []
    for section in sections:
        everything: dict[str, Seconds] = {kind: {name: [] for name in section.systems} for kind in KINDS}
        for launch in range(section.launches):
            names = section.systems if launch == 0 else section.always
            with tempfile.TemporaryDirectory() as folder:
                measured = _launch(Path(folder), section, names, arguments.warmup)
            absent: list[float | None] = [None] * section.rounds
            for kind, by_system in everything.items():
                for name, seconds in by_system.items():
                    seconds += measured[kind].get(name, absent)
            done = f"{section.title}: launch {launch + 1} of {section.launches} done"
            print(done, file=sys.stderr, flush=True)
        texts.append(_section_text(section, everything))
        results.append({"title": section.title, "work": asdict(section.work), **everything})
        print(texts[-1], flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results) + "\n")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        picture = arguments.output.with_suffix(".png")
        _plot(sections[0], results[0]["wall"], picture)
        arguments.output.write_text(_document(texts, sections[0].work, picture.name))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=3, help="times the processes of the main section are started")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each of its launches")
    parser.add_argument("--warmup", type=int, default=1, help="steps of each system and launch before them")
    parser.add_argument("--systems", default=",".join(LABELS), help="names, separated by commas")
    parser.add_argument("--layers", type=int, default=8, help="layers of the main section's model")
    parser.add_argument("--micro-batches", type=int, default=8, help="its micro-batches a step")
    parser.add_argument("--only-main", action="store_true", help="leave the other sections out")
    parser.add_argument("--output", type=Path, help="Markdown file to write; the picture goes beside it")
    parser.add_argument("--json", type=Path, help="file for the seconds of every step")
    return parser.parse_args()


def _sections(arguments: argparse.Namespace) -> list[Section]:
    names = tuple(arguments.systems.split(","))
    work = Work(num_layers=arguments.layers, num_micro_batches=arguments.micro_batches)
    title = f"{work.num_layers} layers, {work.num_micro_batches} micro-batches"
    sections = [Section(title, work, names, arguments.launches, arguments.rounds)]
    if not arguments.only_main:
        chosen = tuple(name for name in names if name in MAIN)
        sections.append(Section("16 layers, 8 micro-batches", Work(num_layers=16), chosen, 1, 4))
        sections.append(Section("8 layers, 4 micro-batches", Work(num_micro_batches=4), chosen, 1, 7))
    return sections


def _launch(folder: Path, section: Section, names: tuple[str, ...], warmup: int) -> dict[str, Seconds]:
    for name in names:
        if name.startswith("llmpipe-"):
            _write_plan(folder, section.work, name)
    launch = {
        "work": asdict(section.work),
        "systems": names,
        "always": section.always,
        "every": 3,
        "rounds": section.rounds,
        "warmup": warmup,
        "threads": 1,
    }
    (folder / "launch.json").write_text(json.dumps(launch))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(Path(__file__).with_name("rank.py")), str(folder)],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    return json.loads((folder / "seconds.json").read_text())


def _write_plan(folder: Path, work: Work, name: str) -> None:
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
            "parallel": {"pipeline": 2, "schedule": name.removeprefix("llmpipe-").removesuffix("-unrecorded")},
        }
    )
    data = prepare(recipe, folder, folder / "cache")
    make_plan(recipe, data, device="cpu", num_devices=2).save(folder / f"{name}.json")


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
    """torch.distributed.pipelining's fastest schedule here."""
    present = [name for name in TORCH if name in speeds]
    return max(present, key=lambda name: statistics.median(_measured(speeds[name])), default=None)


def _section_text(section: Section, everything: dict[str, Seconds]) -> str:
    """The section as Markdown."""
    work = section.work
    speeds = _speeds(everything["wall"], work)
    best = _best_of_torch(speeds)
    references = [name for name in ("independent", best, "deepspeed") if name in speeds]
    header = ["system", "tokens/s", "CPU s a step", *(f"x {name}" for name in references), "rounds"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, values in speeds.items():
        measured, cpu = _measured(values), _measured(everything["cpu"][name])
        cells = [LABELS.get(name, name), f"{statistics.median(measured):.0f}", f"{statistics.median(cpu):.3f}"]
        for reference in references:
            low, middle, high = _quartiles(_ratios(values, speeds[reference]))
            cells.append("1" if name == reference else f"{middle:.3f} ({low:.3f} to {high:.3f})")
        lines.append("| " + " | ".join([*cells, str(len(measured))]) + " |")
    notes = [
        f"{LABELS.get(name, name)} {statistics.median(values):.3f}"
        for name in speeds
        if (values := _measured(everything["simulated"][name]))
    ]
    simulated = f"\nSimulated over measured step, median: {', '.join(notes)}.\n" if notes else ""
    launches = f"{section.launches} launch" + ("es" if section.launches > 1 else "")
    return f"## {section.title}\n\n{launches} of {section.rounds} rounds.\n\n" + "\n".join(lines) + "\n" + simulated


def _plot(section: Section, wall: Seconds, path: Path) -> None:
    """Each system's speed as a share of two independent processes: median and quartiles."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    speeds = _speeds(wall, section.work)
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
    axes.set_title(section.title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _document(sections: list[str], work: Work, picture: str) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    text = "\n".join(sections)
    return f"""# Benchmarks

Written by `{shlex.join(["python", "benchmarks/compare.py", *sys.argv[1:]])}` (`make bench`).

A Llama (hidden {work.hidden_size}, MLP {work.intermediate_size}, {work.num_heads} heads, vocabulary {work.vocab_size},
fp32) on {platform.machine()} with {versions}: micro-batches of
{work.micro_batch_size} x {work.sequence_len} tokens, AdamW, gradients clipped at {work.max_grad_norm}; two processes of
one thread each, gloo. All systems live in the same processes and do their steps in turn. Ratios are medians of the
ratio within a round, quartiles in brackets. CPU seconds are those of both processes together. llmpipe's figures hold
its whole training step: reading data, metrics, timeline. Its steps are also played through by the simulator, fed with
the same step's instruction times: what is missing from 1 is time that the timeline cannot name.

Two independent processes send nothing and never wait, so together they are what this machine can do; a 1F1B pipeline of
two equal stages and m micro-batches can reach m / (m + 1) of it, because each stage waits for one micro-batch a step.

![speeds over two independent processes]({picture})

{text}"""


if __name__ == "__main__":
    main()
