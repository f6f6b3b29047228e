"""What ``--dry-run`` shows: the layout, each node's command and environment, the DeepSpeed config."""

from __future__ import annotations

import itertools
import json
import shlex
from typing import TYPE_CHECKING, Any

from llmpipe_cli.cli import console

if TYPE_CHECKING:
    from llmpipe_cli.cluster.launchers.base import Launcher, LaunchSpec
    from llmpipe_cli.plan.plan import Plan


def describe(plan: Plan, launcher: Launcher, spec: LaunchSpec) -> dict[str, Any]:
    """What would be started, as ``--dry-run --json`` prints it; secrets are left out."""
    from llmpipe_cli.engine.config import deepspeed_config
    from llmpipe_cli.model.slicing.plan import SlicePlan

    layout = plan.layout.model_dump() | {
        "partition": plan.partition,
        "split_layers": SlicePlan.from_json(plan.slice_plan).cut_inside(plan.partition),
        "micro_batch_size": plan.micro_batch_size,
        "num_micro_batches": plan.num_micro_batches,
        "schedule": plan.schedule,
        "virtual_stages": plan.virtual_stages,
    }
    commands = [
        {
            "host": command.host,
            "argv": list(command.argv),
            "environment": command.shown_environment(),
            "via": list(command.via),
        }
        for command in launcher.commands(spec)
    ]
    document = {"dry_run": True, "layout": layout, "commands": commands, "deepspeed_config": deepspeed_config(plan)}
    manifest = launcher.manifest(spec)
    return document if manifest is None else document | {"manifest": manifest}


def show(document: dict[str, Any], as_json: bool) -> None:
    """Print what `describe` found."""
    if as_json:
        console.print_json(document)
    else:
        console.stdout().print("\n".join(_lines(document)), markup=False, soft_wrap=True)


def _lines(document: dict[str, Any]) -> list[str]:
    from llmpipe_cli.report import formats

    layout, partition = document["layout"], document["layout"]["partition"]
    bounds = " | ".join(f"{start}-{stop - 1}" for start, stop in itertools.pairwise(partition))
    cut_inside = f", cut inside {', '.join(layout['split_layers'])}" if layout["split_layers"] else ""
    parts = f" in {layout['virtual_stages']} parts a stage" if layout["virtual_stages"] > 1 else ""
    lines = [
        f"layout: {formats.layout(layout)}, segments {bounds}{parts}{cut_inside}",
        f"step: {layout['num_micro_batches']} micro-batches of {layout['micro_batch_size']} a replica, "
        f"schedule {layout['schedule']}",
    ]
    for command in document["commands"]:
        lines += ["", f"on {command['host']}:"]
        lines += [f"  {key}={value}" for key, value in command["environment"].items()]
        lines += ["  " + shlex.join(argv) for argv in (command["via"], command["argv"]) if argv]
    if "manifest" in document:
        lines += ["", "manifest:", json.dumps(document["manifest"], indent=2)]
    return [*lines, "", "DeepSpeed config:", json.dumps(document["deepspeed_config"], indent=2)]
