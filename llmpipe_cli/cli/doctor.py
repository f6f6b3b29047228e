"""``llmpipe doctor``: are the nodes ready, alike, and well connected?"""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmpipe_cli.cli import console, jobs
from llmpipe_cli.cli.launchers import ClusterFlags, make_launcher, read_hosts
from llmpipe_cli.cli.options import (
    ExcludeOption,
    HostfileOption,
    IncludeOption,
    JsonOption,
    LauncherOptionOption,
    OutputDirOption,
)
from llmpipe_cli.cli.signals import StopSignals
from llmpipe_cli.errors import LlmpipeError, RankError
from llmpipe_cli.run import RunDirectory, read_json, write_json, write_text

if TYPE_CHECKING:
    from rich.table import Table

    from llmpipe_cli.cluster.launchers.base import Launcher
    from llmpipe_cli.cluster.preflight import Report

_RANKS_A_NODE = 2


def doctor(
    hostfile: HostfileOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    launcher_option: LauncherOptionOption = None,
    network: Annotated[
        bool, typer.Option(metavar="", help="Also measure the links between ranks; takes some seconds.")
    ] = True,
    output_dir: OutputDirOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Check this machine, or all nodes of a hostfile: versions, devices, disk, clocks, and how fast the links are.

    The speed of the links is kept, and `llmpipe plan` with the same hostfile uses it.
    """
    flags = ClusterFlags(hostfile, include, exclude, launcher_option or ())
    launcher = make_launcher(None, flags)
    with closing(launcher):
        report, names, num_ranks = _check(launcher, flags)
        if not as_json:
            console.stdout().print(_nodes_table(report))
        if report.problems and as_json:
            console.print_json({"nodes": report.rows, "problems": [_as_json(one) for one in report.problems]})
            raise typer.Exit(report.problems[0].exit_code)
        report.raise_problems()
        figures = _measure(launcher, output_dir, num_ranks, names) if network and num_ranks > 1 else None
    warnings = [*report.warnings, *_remarks(figures)]
    if as_json:
        console.print_json({"nodes": report.rows, "problems": [], "warnings": warnings, "network": figures})
        return
    if figures is not None:
        console.stdout().print(_links_table(figures))
    for warning in _remarks(figures):
        console.say(f"warning: {warning}", "yellow")
    console.say("no problem was found" if not warnings else "ready, with the warnings above")


def _check(launcher: Launcher, flags: ClusterFlags) -> tuple[Report, list[str], int]:
    """The report, the nodes' names and the number of ranks to measure with."""
    from llmpipe_cli.cluster.facts import node_facts
    from llmpipe_cli.cluster.hostfile import Host
    from llmpipe_cli.cluster.launchers.ssh import SshLauncher
    from llmpipe_cli.cluster.preflight import judge_facts
    from llmpipe_cli.data.cache import default_cache_dir

    if isinstance(launcher, SshLauncher):
        hosts = read_hosts("ssh", flags)
        with console.working("reaching the nodes"):
            report = launcher.check()
        count = min(_RANKS_A_NODE, *(host.slots for host in hosts))
        launcher.use([dataclasses.replace(host, devices=host.devices[:count]) for host in hosts])
        return report, [host.name for host in hosts], count * len(hosts)
    facts = node_facts(str(Path.cwd()), str(default_cache_dir()))
    count = min(_RANKS_A_NODE, facts["devices"].get("count", 1))
    report = judge_facts([Host(facts["host"], tuple(range(count)))], [facts], [0.0])
    return report, [facts["host"]], count


def _measure(launcher: Launcher, output_dir: Path, num_ranks: int, names: list[str]) -> dict[str, Any]:
    from llmpipe_cli.cluster.launchers.base import LaunchSpec
    from llmpipe_cli.cluster.network import FILE_NAME, save_figures
    from llmpipe_cli.data.cache import default_cache_dir
    from llmpipe_cli.report.progress import Progress

    run = RunDirectory.create(output_dir, "doctor")
    write_text(run.plan, json.dumps({"job": "doctor", "name": "doctor"}))
    run.write_controller()
    device = "cpu" if launcher.devices(num_ranks).kind == "cpu" else "cuda"
    spec = LaunchSpec(run, tuple(range(num_ranks)), device, worker="llmpipe_cli.worker.network")
    progress = Progress(run.name, "measuring the links", job="doctor")
    with StopSignals() as signals:
        outcome = jobs.watch(launcher.start(spec), run, progress, signals)
    finished = jobs.conclude(run, outcome, progress)
    figures = read_json(run.path / FILE_NAME)
    if finished.exit_code or not isinstance(figures, dict):
        raise RankError("the links were not measured", where=str(run.path), hint=f"see {run.logs}")
    figures["time"] = time.time()
    write_json(run.path / FILE_NAME, figures)
    save_figures(figures, names, default_cache_dir())
    return figures


def _remarks(figures: dict[str, Any] | None) -> list[str]:
    from llmpipe_cli.cluster.network import remarks

    return remarks(figures) if figures is not None else []


def _as_json(error: LlmpipeError) -> dict[str, Any]:
    return {"message": error.message, "where": error.where, "hint": error.hint, "exit_code": error.exit_code}


def _nodes_table(report: Report) -> Table:
    """One row a node."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in (
        "node",
        "slots",
        "devices",
        "python",
        "torch",
        "deepspeed",
        "transformers",
        "llmpipe",
        "disk",
        "clock",
    ):
        table.add_column(name, no_wrap=True)
    for row in report.rows:
        if not row["reachable"]:
            table.add_row(row["node"], str(row["slots"]), "not reached")
            continue
        devices = row["devices"]
        what = f"{devices['count']} x {devices['name']}" if "kind" in devices else "none"
        if devices.get("kind") == "cpu":
            what = f"{devices['cores']} cores"
        free = f"{row['free_bytes'] / 1e9:.0f} GB" if row["free_bytes"] is not None else "–"
        table.add_row(
            row["node"],
            str(row["slots"]),
            what,
            row["python"],
            *(row[package] for package in ("torch", "deepspeed", "transformers", "llmpipe")),
            free,
            f"{row['clock_skew_seconds']:+.1f} s" if row["clock_skew_seconds"] else "ok",
        )
    return table


def _links_table(figures: dict[str, Any]) -> Table:
    """One row a link."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("link", "ranks", "Gbit/s", "latency"):
        table.add_column(name, no_wrap=True, justify="left" if name == "link" else "right")
    for pair in figures["pairs"]:
        link = f"within {pair['from']}" if pair["same_node"] else f"{pair['from']} - {pair['to']}"
        ranks, latency = f"{pair['from_rank']} - {pair['to_rank']}", pair["latency_seconds"]
        table.add_row(link, ranks, f"{pair['gbps']:.2f}", f"{latency * 1e6:,.0f} µs")
    reduced = figures["all_reduce"]
    table.add_row(
        "all-reduce of all", "", "", f"{reduced['seconds'] * 1000:.0f} ms for {reduced['bytes'] / 1e6:.0f} MB"
    )
    return table
