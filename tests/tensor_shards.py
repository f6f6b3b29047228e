"""Loss and gradients of tensor shards against the undivided model, for many types in one group of processes.

Run as a script, one process a shard: `tensor_shards.py RANK WORLD PORT CASES.json`. Every shard builds the whole tiny
model too, and compares its own parts with it. A line of JSON a case tells what it found.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

_FLOOR = 1e-4  # gradients that are zero up to rounding (biases of keys) count against the largest of all


def run_shards(cases: list[dict[str, Any]], world: int, folder: Path) -> list[dict[str, Any]]:
    """What the shards found: for each case its `error`, or the largest differences `loss` and `gradient`.

    Args:
        cases: model `type`, `task`, and optionally `changes` of its config, `attention`, `dropout`.
        world: number of shards.
        folder: for the list of cases.
    """
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    members = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), str(port), str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    outputs = [member.communicate()[0] for member in members]
    assert not any(member.returncode for member in members)
    rows = [[json.loads(line) for line in output.splitlines() if line.startswith("{")] for output in outputs]
    return [_worst(found) for found in zip(*rows, strict=True)]


def _worst(found: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    for row in found:
        if "error" in row:
            return row
    return max(found, key=lambda row: max(row["loss"], row["gradient"]))


def _serve(rank: int, world: int, port: int, path: Path) -> None:
    import torch
    import torch.distributed as dist
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    from llmpipe_cli.model.tensor.collectives import TensorGroup

    for case in json.loads(path.read_text()):
        group = TensorGroup(dist.group.WORLD)
        result: dict[str, Any] = {"type": case["type"]}
        try:
            result.update(_compare(case, group))
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"[:500]
            if os.environ.get("TENSOR_TRACE"):
                raise
        # A shard that failed alone would leave the others waiting: all must agree before the next case.
        failed = torch.tensor(float("error" in result))
        dist.all_reduce(failed)
        print(json.dumps(result), flush=True)


def _compare(case: dict[str, Any], group: Any) -> dict[str, float]:
    import torch
    from tiny_models import tiny_config, tiny_inputs
    from torch import nn

    from llmpipe_cli.model.auto import model_class
    from llmpipe_cli.model.initialise import initialise
    from llmpipe_cli.model.skeleton import all_names, build_skeleton
    from llmpipe_cli.model.slicing.forward import forward_options
    from llmpipe_cli.model.stage import make_real
    from llmpipe_cli.model.tensor.apply import PARTIAL_GRADIENT, divide_model, fill_parts, install, mark

    task, attention = case["task"], case.get("attention", "auto")
    config = tiny_config(case["type"], task, dropout=case.get("dropout", 0.0), **case.get("changes", {}))
    cls = model_class(config, task)

    def skeleton() -> Any:
        return build_skeleton(cls, config, attn_implementation=attention)

    division = divide_model(skeleton(), group.rank, group.size)
    whole = skeleton()
    groups = all_names(whole)
    for names in groups.values():
        make_real(whole, names, "cpu")
    initialise(whole, groups, 0)
    # Biases and norms start as zeros and ones, which would hide their mistakes.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)

    model = skeleton()

    def copy(names: list[str]) -> None:
        for name in names:
            make_real(model, groups[name], "cpu")
            model.get_parameter(name).data.copy_(whole.get_parameter(name))

    fill_parts(model, [[name] for name in groups], division, copy)
    mark(model, division, groups)
    install(model, division, group)

    inputs = tiny_inputs(task)
    losses = []
    for each in (whole, model):
        torch.manual_seed(3)
        loss = each(**inputs, **forward_options(each, inputs)).loss
        loss.backward()
        losses.append(loss.item())
    own: dict[str, nn.Parameter] = dict(model.named_parameters())
    gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    largest = max(float(gradient.abs().amax()) for gradient in gradients.values())
    worst, where = 0.0, ""
    for name, expected in gradients.items():
        found = own[name].grad
        if hasattr(own[name], PARTIAL_GRADIENT):
            found = group.sum(torch.zeros_like(expected) if found is None else found)
        part = division.parts.get(name)
        scale = max(float(expected.abs().amax()), _FLOOR * largest)
        expected = part.take(expected) if part is not None else expected
        found = torch.zeros_like(expected) if found is None else found
        difference = float((found - expected).abs().amax()) / scale if expected.numel() else 0.0
        if difference > worst:
            worst, where = difference, name
    with torch.no_grad():
        logits = [each.eval()(**inputs, **forward_options(each, inputs)).logits for each in (whole, model)]
    return {
        "loss": abs(losses[1] / losses[0] - 1),
        "gradient": worst,
        "where": where,
        "logits": float((logits[0] - logits[1]).abs().amax()),
        "divided": len(division.parts),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    _serve(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
