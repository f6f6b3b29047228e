"""How fast the links of a cluster are, as ``llmpipe doctor`` has measured it, and where the plan finds it.

One JSON file a set of nodes, ``<cache>/network/<hash of the nodes' names>.json``:

    intra_node_gbps, inter_node_gbps   bits a second / 1e9, one direction, of the slowest link; null if there was none
    latency_seconds                    one way, of the slowest link between nodes (within the node if there is but one)
    pairs                              [{"from", "to": hosts, "from_rank", "to_rank", "same_node", "gbps",
                                         "latency_seconds"}]
    all_reduce                         {"bytes", "seconds"} over all measured ranks
    sent_again_fraction                {host: share of TCP segments that had to be sent more than once}
    hosts, time                        names as in the hostfile; seconds since the epoch
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmpipe_cli.run import read_json, write_json

FILE_NAME = "network.json"
# What is worth telling on a link between nodes.
_SLOW_SECONDS = 1e-3
_LOSSY_FRACTION = 1e-3
_SLOW_GBPS = 0.9


def summarise(
    pairs: Sequence[dict[str, Any]], ranks: Sequence[dict[str, Any]], all_reduce: dict[str, Any]
) -> dict[str, Any]:
    """The figures of one measurement.

    Args:
        pairs: {"from", "to": ranks, "gbps", "latency_seconds"} of each measured pair.
        ranks: {"host", "sent", "sent_again"} of each rank.
        all_reduce: {"bytes", "seconds"}.
    """
    named = []
    for pair in pairs:
        left, right = ranks[pair["from"]]["host"], ranks[pair["to"]]["host"]
        named.append(
            {
                "from": left,
                "to": right,
                "from_rank": pair["from"],
                "to_rank": pair["to"],
                "same_node": left == right,
                "gbps": pair["gbps"],
                "latency_seconds": pair["latency_seconds"],
            }
        )
    inter, intra = [p for p in named if not p["same_node"]], [p for p in named if p["same_node"]]
    return {
        "intra_node_gbps": min((pair["gbps"] for pair in intra), default=None),
        "inter_node_gbps": min((pair["gbps"] for pair in inter), default=None),
        "latency_seconds": max((pair["latency_seconds"] for pair in inter or intra), default=None),
        "pairs": named,
        "all_reduce": all_reduce,
        "sent_again_fraction": {rank["host"]: rank["sent_again"] / max(rank["sent"], 1) for rank in ranks},
    }


def remarks(figures: dict[str, Any]) -> list[str]:
    """What is wrong with the links, a sentence each."""
    found = []
    for pair in figures["pairs"]:
        if pair["same_node"]:
            continue
        link = f"the link {pair['from']} - {pair['to']}"
        if pair["latency_seconds"] > _SLOW_SECONDS:
            milliseconds = pair["latency_seconds"] * 1000
            found.append(f"{link} takes {milliseconds:.1f} ms one way: every micro-batch waits for it at each stage")
        if pair["gbps"] < _SLOW_GBPS:
            found.append(f"{link} carries {pair['gbps']:.2f} Gbit/s only")
    for host, fraction in figures["sent_again_fraction"].items():
        if fraction > _LOSSY_FRACTION:
            found.append(f"{host} had to send {fraction:.1%} of its packets again: the network loses packets")
    return found


def figures_file(hosts: Sequence[str], cache_dir: Path) -> Path:
    """Where the figures of these nodes are kept."""
    key = hashlib.sha256(json.dumps(sorted(hosts)).encode()).hexdigest()[:16]
    return cache_dir / "network" / f"{key}.json"


def save_figures(figures: dict[str, Any], hosts: Sequence[str], cache_dir: Path) -> Path:
    """Keep the figures of these nodes for the plan; returns the file."""
    path = figures_file(hosts, cache_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**figures, "hosts": list(hosts)})
    return path


def read_figures(hosts: Sequence[str], cache_dir: Path) -> dict[str, Any] | None:
    """The figures last measured on these nodes; None when they never were."""
    found = read_json(figures_file(hosts, cache_dir))
    return found if isinstance(found, dict) else None
