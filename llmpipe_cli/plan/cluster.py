"""The devices that a plan is for: node by node, with the links inside and between nodes.

A cluster comes from a description (`--cluster c.yaml`), from a hostfile, or from this machine. Ranks are laid on the
devices as DeepSpeed's grid numbers them: tensor shards are neighbours, then replicas, then stages.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llmpipe_cli.errors import UsageError
from llmpipe_cli.plan.devices import DEVICES, GIB, Device, find_device

INTRA_LATENCY_SECONDS = 8e-6
INTER_LATENCY_SECONDS = 2e-5
LINK_FRACTION = 0.75
"""Share of a link's nominal bandwidth that collective and point-to-point transfers reach (NCCL's bus bandwidth on
NVLink and InfiniBand: 70 to 80 % of nominal for large messages)."""
DEFAULT_INTER_NODE_GBPS = 25.0


@dataclass(frozen=True)
class Node:
    """Devices of one kind in one machine."""

    device: Device
    count: int
    host: str = "localhost"


@dataclass(frozen=True)
class Cluster:
    """All devices, in the order of the ranks.

    Attributes:
        nodes: the machines.
        intra_node_gbps: Gbit/s between devices of a node, one direction, a device.
        inter_node_gbps: Gbit/s out of a node, one direction, a device.
        intra_latency_seconds: time of an empty message inside a node.
        inter_latency_seconds: the same between nodes.
        link_fraction: share of the rates that transfers reach; 1 for measured rates.
        ring_gbps: Gbit/s that one adapter of a node gives to rings of collectives, each of which goes through one
            adapter; None: as much as to other transfers, and a ring goes through as many as are free.
        adapters: adapters of a node; only counts where `ring_gbps` is given.
        source: where the numbers come from, for people.
    """

    nodes: tuple[Node, ...]
    intra_node_gbps: float
    inter_node_gbps: float
    intra_latency_seconds: float = INTRA_LATENCY_SECONDS
    inter_latency_seconds: float = INTER_LATENCY_SECONDS
    link_fraction: float = LINK_FRACTION
    ring_gbps: float | None = None
    adapters: int = 1
    source: str = ""

    @cached_property
    def num_devices(self) -> int:
        return sum(node.count for node in self.nodes)

    @cached_property
    def devices_per_node(self) -> int:
        """Devices of the smallest node."""
        return min(node.count for node in self.nodes)

    @cached_property
    def is_uniform(self) -> bool:
        """All nodes have as many devices, of the same kind."""
        return len({(node.device, node.count) for node in self.nodes}) == 1

    @cached_property
    def counts(self) -> dict[str, int]:
        """Devices of each kind, by name."""
        counts: Counter[str] = Counter()
        for node in self.nodes:
            counts[node.device.name] += node.count
        return dict(counts)

    def device_list(self) -> list[tuple[int, Device]]:
        """(node, device) of every rank."""
        return [(number, node.device) for number, node in enumerate(self.nodes) for _ in range(node.count)]

    def first_nodes(self, count: int) -> Cluster:
        """The cluster with `count` nodes: fewer of them, or more like the last one."""
        nodes = self.nodes[:count] + self.nodes[-1:] * max(0, count - len(self.nodes))
        return replace(self, nodes=nodes)

    def with_devices(self, devices: list[Device]) -> Cluster:
        """The same cluster with other device kinds, one a node."""
        nodes = tuple(replace(node, device=device) for node, device in zip(self.nodes, devices, strict=True))
        return replace(self, nodes=nodes)

    def seconds(self, num_bytes: float, crosses_nodes: bool, messages: int = 1) -> float:
        """Time to move bytes from one device to another."""
        gbps = self.inter_node_gbps if crosses_nodes else self.intra_node_gbps
        latency = self.inter_latency_seconds if crosses_nodes else self.intra_latency_seconds
        return messages * latency + num_bytes * 8 / (gbps * 1e9 * self.link_fraction)

    def ring_seconds(self, num_bytes: float, size: int, stride: int, rounds: int = 2) -> float:
        """Time of a ring collective over `size` devices that lie `stride` apart; other such rings run beside it.

        Args:
            num_bytes: bytes of the whole tensor.
            size: devices.
            stride: distance between neighbours, in ranks; as many rings share a node's way out.
            rounds: 2 for an all-reduce, 1 for a reduce-scatter or an all-gather.
        """
        if size == 1:
            return 0.0
        volume = rounds * num_bytes * (size - 1) / size
        steps = rounds * (size - 1)
        if size * stride <= self.devices_per_node:
            return self.seconds(volume, False) + (steps - 1) * self.intra_latency_seconds
        # of the rings through a node each crosses its border once, and all of them share the node's way out
        rings = min(stride, self.devices_per_node)
        nodes = min(size, max(1, size * stride // self.devices_per_node))
        latency = rounds * (nodes - 1) * self.inter_latency_seconds + steps * self.intra_latency_seconds
        out = volume * rings / self.devices_per_node  # bytes that go out of a node, a device
        if self.ring_gbps:
            out = max(out, volume * max(1.0, rings / self.adapters) * self.inter_node_gbps / self.ring_gbps)
        return latency + max(
            self.seconds(out, True), self.seconds(volume, False) if rings < self.devices_per_node else 0.0
        )


def described(values: dict[str, Any], where: str) -> Cluster:
    """A cluster from its description.

    Keys: `nodes` (a number, or a list of such descriptions for unequal nodes), `devices_per_node`, `device` (a name of
    the table or a mapping), `intra_node_gbps`, `inter_node_gbps`, and optionally `latency_seconds`.

    Raises:
        UsageError: a key is missing, unknown or of the wrong kind.
    """
    known = {"nodes", "devices_per_node", "device", "intra_node_gbps", "inter_node_gbps", "latency_seconds"}
    for key in values:
        if key not in known:
            raise UsageError(f"a cluster has no field {key!r}", where=where, hint=f"one of {', '.join(sorted(known))}")
    given = values.get("nodes", 1)
    if isinstance(given, list):
        shared = {key: value for key, value in values.items() if key != "nodes"}
        parts = [described({**shared, "nodes": 1, **_mapping(part, where)}, f"{where}: nodes") for part in given]
        if not parts:
            raise UsageError("a cluster needs at least one node", where=where)
        nodes = tuple(node for part in parts for node in part.nodes)
        return replace(
            parts[0],
            nodes=nodes,
            intra_node_gbps=min(part.intra_node_gbps for part in parts),
            inter_node_gbps=min(part.inter_node_gbps for part in parts),
        )
    if "device" not in values:
        raise UsageError("a cluster needs a device", where=where, hint="device: a100-80gb, for example")
    device = _device(values["device"], where)
    num_nodes, per_node = (
        _count(given, "nodes", where),
        _count(values.get("devices_per_node", 1), "devices_per_node", where),
    )
    latency = values.get("latency_seconds")
    return Cluster(
        nodes=tuple(Node(device, per_node, f"node-{number}") for number in range(num_nodes)),
        intra_node_gbps=_positive(values.get("intra_node_gbps", device.link_gbps), "intra_node_gbps", where),
        inter_node_gbps=_positive(values.get("inter_node_gbps", DEFAULT_INTER_NODE_GBPS), "inter_node_gbps", where),
        inter_latency_seconds=INTER_LATENCY_SECONDS
        if latency is None
        else _positive(latency, "latency_seconds", where),
        source=where,
    )


def read_cluster(path: Path) -> Cluster:
    """The cluster that a YAML file describes.

    Raises:
        UsageError: no such file, not YAML, or not a cluster.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        values = YAML(typ="safe").load(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", where="--cluster") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}", where="--cluster") from error
    return described(_mapping(values, str(path)), str(path))


def one_node(device: Device, count: int, host: str = "localhost") -> Cluster:
    """One machine with `count` devices."""
    return Cluster((Node(device, count, host),), device.link_gbps, DEFAULT_INTER_NODE_GBPS, source="this machine")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        hint = "{nodes: 2, devices_per_node: 8, device: a100-80gb, intra_node_gbps: 2400, inter_node_gbps: 200}"
        raise UsageError("a cluster is described by a mapping", where=where, hint=hint)
    return value


def _device(value: Any, where: str) -> Device:
    if isinstance(value, str):
        return find_device(value, where)
    fields = _mapping(value, f"{where}: device")
    known = {"name", "memory_gb", "fp32_tflops", "bf16_tflops", "fp16_tflops", "memory_gbps"}
    for key in fields:
        if key not in known:
            raise UsageError(f"a device has no field {key!r}", where=where, hint=f"one of {', '.join(sorted(known))}")
    name = str(fields.get("name", "custom"))
    base = DEVICES.get(name, DEVICES["a100-80gb"])

    def number(key: str, default: float, unit: float) -> float:
        return _positive(fields[key], key, where) * unit if key in fields else default

    if name not in DEVICES and not {"memory_gb", "memory_gbps"} <= set(fields):
        raise UsageError("a device of one's own needs memory_gb and memory_gbps", where=where)
    own = name not in DEVICES
    return replace(
        base,
        name=name,
        memory_bytes=int(number("memory_gb", base.memory_bytes, GIB)),
        fp32=number("fp32_tflops", 0.0 if own else base.fp32, 1e12),
        bf16=number("bf16_tflops", 0.0 if own else base.bf16, 1e12),
        fp16=number("fp16_tflops", 0.0 if own else base.fp16, 1e12),
        memory_bandwidth=number("memory_gbps", base.memory_bandwidth, 1e9),
    )


def _count(value: Any, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} must be a whole number from 1 on, not {value!r}", where=where)
    return value


def _positive(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UsageError(f"{name} must be a number above 0, not {value!r}", where=where)
    return float(value)
