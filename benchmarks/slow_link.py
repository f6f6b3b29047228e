"""Two stages over a slow link: what schedules, bf16 on the wire and merged messages gain. Needs root, Linux, ip and tc.

    sudo python benchmarks/slow_link.py --rate 50mbit --output docs/slow-link.md

Each stage runs in a network namespace of its own; the two are joined by a pair of virtual links whose rate `tc` limits
in both directions. The variants run in turn, so that a busy machine hits all alike; the reported speed is the median of
the measured steps of all rounds. Groups of tensors are also sent alone, each tensor as a message or all as one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from systems import Work

from llmpipe_cli.data.prepare import prepare
from llmpipe_cli.plan.resolve import make_plan
from llmpipe_cli.recipe.schema import Recipe
from llmpipe_cli.run import RunDirectory, read_metrics

_ADDRESSES = ("10.213.0.1", "10.213.0.2")
_WARMUP = 2
# Tensors of a group and numbers in each: what Llama and a model with four carried tensors send, at two sizes.
_GROUPS = ((1, 131_072), (2, 65_536), (4, 32_768), (4, 1_024))
_REPEATS = 7


def main() -> None:
    """Measure all variants and print the table."""
    arguments = _arguments()
    if arguments.exchange is not None:
        _exchange_groups(arguments.exchange)
        return
    if os.geteuid():
        sys.exit("slow_link.py makes network namespaces and needs root")
    variants = [(schedule, wire) for schedule in arguments.schedules.split(",") for wire in ("fp32", "bf16")]
    seconds: dict[tuple[str, str], list[float]] = {variant: [] for variant in variants}
    with _two_hosts(arguments.rate) as hosts, tempfile.TemporaryDirectory() as folder:
        messages = _measure_messages(hosts)
        for number in range(arguments.rounds):
            for variant in variants:
                seconds[variant] += _measure(Path(folder), hosts, *variant, arguments.steps)
            print(f"round {number + 1} of {arguments.rounds} done", file=sys.stderr, flush=True)
    text = _document(seconds, messages, arguments)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="50mbit", help="as tc writes it")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each variant")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each run")
    parser.add_argument("--schedules", default="1f1b,zb-h1,zb-v", help="names, separated by commas")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--exchange", type=int, help=argparse.SUPPRESS)  # the rank of a process that sends groups
    return parser.parse_args()


@contextmanager
def _two_hosts(rate: str) -> Iterator[list[str]]:
    """Two network namespaces joined by a limited link; gives their names."""
    names = [f"llmpipe-{os.getpid()}-{number}" for number in range(2)]
    links = [f"llm{os.getpid() % 100_000}v{number}" for number in range(2)]
    try:
        for name in names:
            _run(f"ip netns add {name}")
        _run(f"ip link add {links[0]} type veth peer name {links[1]}")
        for name, link, address in zip(names, links, _ADDRESSES, strict=True):
            _run(f"ip link set {link} netns {name}")
            _run(f"ip -n {name} link set {link} name eth0")
            _run(f"ip -n {name} addr add {address}/24 dev eth0")
            _run(f"ip -n {name} link set eth0 up")
            _run(f"ip -n {name} link set lo up")
            _run(f"tc -n {name} qdisc add dev eth0 root tbf rate {rate} burst 128kb latency 1000ms")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def _run(command: str) -> None:
    subprocess.run(shlex.split(command), check=True)


def _measure(folder: Path, hosts: list[str], schedule: str, wire: str, steps: int) -> list[float]:
    """Seconds of each measured step of one run."""
    work = Work()
    recipe = Recipe.model_validate(
        {
            "name": f"{schedule}-{wire}",
            "model": {"config": work.config_fields()},
            "data": {"train": {"synthetic": True}, "sequence_len": work.sequence_len},
            "train": {
                "max_steps": _WARMUP + steps,
                "global_batch_size": work.num_micro_batches * work.micro_batch_size,
                "micro_batch_size": work.micro_batch_size,
                "learning_rate": work.learning_rate,
            },
            "parallel": {"pipeline": 2, "schedule": schedule, "wire_dtype": wire},
        }
    )
    data = prepare(recipe, folder, folder / "cache")
    run = RunDirectory.create(folder / "runs", recipe.name)
    make_plan(recipe, data, job="bench", device="cpu", num_devices=2).save(run.plan)
    _run_ranks(hosts, lambda _: ["-m", "llmpipe_cli.worker", str(run.path)])
    return [line["step_seconds"] for line in read_metrics(run.metrics) if "event" not in line][_WARMUP:]


def _run_ranks(hosts: list[str], arguments: Callable[[int], list[str]]) -> str:
    """Run Python with these arguments as a rank on each host; returns what rank 0 printed."""
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": _ADDRESSES[0], "MASTER_PORT": "29617"}
    threads = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, *arguments(rank)],
            env=os.environ | threads | place | {"RANK": str(rank)},
            stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank, host in enumerate(hosts)
    ]
    try:
        printed = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if codes := [rank.returncode for rank in ranks if rank.returncode]:
        sys.exit(f"ranks failed with exit codes {codes}")
    return printed[0]


def _measure_messages(hosts: list[str]) -> list[tuple[float, float]]:
    """Seconds of each group, its tensors as messages of their own and merged into one."""
    printed = _run_ranks(hosts, lambda rank: [__file__, "--exchange", str(rank)])
    return json.loads(printed.splitlines()[-1])


def _exchange_groups(rank: int) -> None:
    """Send each group there and back; print half the time, the median of several."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")

    def pass_on(tensors: list[torch.Tensor], away: bool) -> None:
        start = dist.isend if away else dist.irecv
        for work in [start(tensor, 1 - rank) for tensor in tensors]:
            assert work is not None
            work.wait()

    results = []
    for count, size in _GROUPS:
        tensors, seconds = [torch.ones(size) for _ in range(count)], []
        for merged in (False, True):
            times = []
            for _ in range(_REPEATS):
                dist.barrier()
                started = time.perf_counter()
                for away in (rank == 0, rank == 1):
                    if not merged:
                        pass_on(tensors, away)
                        continue
                    whole = torch.cat(tensors) if away else torch.empty(count * size)
                    pass_on([whole], away)
                    tensors = tensors if away else list(whole.split(size))
                times.append((time.perf_counter() - started) / 2)
            seconds.append(statistics.median(times))
        results.append(tuple(seconds))
    if rank == 0:
        print(json.dumps(results))
    dist.destroy_process_group()


def _document(
    seconds: dict[tuple[str, str], list[float]], messages: list[tuple[float, float]], arguments: argparse.Namespace
) -> str:
    work = Work()
    plain = statistics.median(seconds[next(iter(seconds))])
    lines = ["| schedule | on the wire | tokens/s | step s | x first row |", "|---|---|---|---|---|"]
    for (schedule, wire), values in seconds.items():
        middle = statistics.median(values)
        lines.append(f"| {schedule} | {wire} | {work.tokens / middle:.0f} | {middle:.3f} | {plain / middle:.2f} |")
    table = "\n".join(lines)
    rows = ["| tensors | KiB each | a message each, ms | one message, ms |", "|---|---|---|---|"]
    for (count, size), (apart, merged) in zip(_GROUPS, messages, strict=True):
        rows.append(f"| {count} | {size * 4 // 1024} | {1e3 * apart:.2f} | {1e3 * merged:.2f} |")
    groups = "\n".join(rows)
    mebibytes = work.micro_batch_size * work.sequence_len * work.hidden_size * 4 / 2**20
    return f"""# Stages over a slow link

Written by `{shlex.join(["python", "benchmarks/slow_link.py", *sys.argv[1:]])}`.

The Llama of [benchmarks.md](benchmarks.md) in two stages of one thread, each in a network namespace of its own, joined
by a link of {arguments.rate} in each direction. A micro-batch's activations are {mebibytes:.1f} MiB in
fp32, and so are their gradients. Medians of {arguments.rounds} runs of {arguments.steps} steps.

{table}

Models that carry several tensors from stage to stage (encoder-decoders, shared key and value states) send each as a
message of its own; all of them are under way together. The same link, one group sent, medians of {_REPEATS}:

{groups}
"""


if __name__ == "__main__":
    main()
