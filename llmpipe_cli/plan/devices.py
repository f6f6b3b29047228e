"""The device table: memory, peak arithmetic and bandwidths of the accelerators that a plan may be made for.

Peaks are the vendors' figures for dense matrices (no sparsity), fp32 without TF32, as transformers and torch run by
default. Sources: NVIDIA's datasheets and architecture papers of V100 (2017), T4 (2018), A100 (2020, 80 GB: 2021), A10
(2021), H100 SXM5 (2022), L4, H200 (2023), DGX B200 (2024) and of the Ada architecture (RTX 4090); AMD's data sheets of
MI250X (2021) and MI300X (2023). A device is what torch counts as one: an MI250X module is two.

Real kernels stay below the peaks. What is achievable is stated beside each device: `matmul_fraction` is what large,
well-aligned matrix products reach, `memory_fraction` what streaming kernels reach of the memory bandwidth. They are the
same for all models. Where they come from:

- `matmul_fraction` of A100 (0.80) and V100 (0.75) follows from the published runs of `docs/planner.md`.
- Those of H100, H200 and B200 (0.68 to 0.70: power limits the clock under matrix products), RTX 4090, MI250X and MI300X
  are rounded from published matrix-product benchmarks; those of T4, A10 and L4 (0.5 to 0.6: low power limits) are
  assumptions. None of them was measured here.
- `memory_fraction` 0.8 and 5 microseconds a launch are assumptions that hold for all accelerators alike.
- Memory is what the driver leaves of the nominal size: assumed (0.3 to 0.8 GiB less on A100, H100 and V100).
- `link_gbps` is NVLink's (Infinity Fabric's) rate, one direction; for those without PCIe 4 x16 (200), T4 PCIe 3 (100).
- The row of a processor is one core with AVX2 at 3 GHz; its bandwidth and launches are assumptions. Its link is what
  two replicas reached over gloo and loopback (median of 11 runs: 5.3 Gbit/s). `--calibrate` replaces all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from llmpipe_cli.errors import UsageError
from llmpipe_cli.plan.rates import Rates

Dtype = Literal["fp32", "bf16", "fp16"]

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name: name in the table, or the driver's.
        memory_bytes: memory of one device.
        fp32: peak FLOP/s in fp32.
        bf16: peak FLOP/s in bf16; 0 when the hardware has none.
        fp16: peak FLOP/s in fp16 with fp32 accumulation.
        memory_bandwidth: peak bytes/s of the device's memory.
        link_gbps: bits/s (in 1e9) to the other devices of the node, one direction.
        matmul_fraction: share of the peak that large matrix products reach.
        memory_fraction: share of the memory bandwidth that streaming kernels reach.
        launch_seconds: least time between two kernels of an eagerly run model.
        units: multiprocessors (NVIDIA) or compute units (AMD); the tiles of a matrix product are dealt to them in
            turns.
        streaming: how much faster an optimizer's step, which goes through whole arrays, moves its bytes than the
            kernels of a pass do.
    """

    name: str
    memory_bytes: int
    fp32: float
    bf16: float
    fp16: float
    memory_bandwidth: float
    link_gbps: float
    matmul_fraction: float = 0.8
    memory_fraction: float = 0.8
    launch_seconds: float = 5e-6
    units: int = 108
    streaming: float = 1.0

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    def at(self, rates: Rates) -> Device:
        """The same device with measured rates."""
        return replace(
            self,
            fp32=self.fp32 / rates.arithmetic,
            bf16=self.bf16 / rates.arithmetic,
            fp16=self.fp16 / rates.arithmetic,
            memory_bandwidth=self.memory_bandwidth / rates.memory,
            launch_seconds=self.launch_seconds * rates.launches,
            streaming=self.streaming * rates.memory / rates.optimizer,
        )

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s of matrix products in `dtype` (fp32, bf16 or fp16).

        Raises:
            UsageError: the device does not compute in `dtype`.
        """
        value = {"fp32": self.fp32, "bf16": self.bf16, "fp16": self.fp16}[dtype]
        if not value:
            raise UsageError(f"{self.name} does not compute in {dtype}", where="model.dtype", hint="use fp16 or fp32")
        return value


def _device(
    name: str,
    gib: float,
    fp32: float,
    bf16: float,
    fp16: float,
    bandwidth: float,
    link: float,
    units: int,
    **more: float,
) -> Device:
    """A row of the table: GiB, TFLOP/s, GB/s and Gbit/s."""
    return Device(
        name, int(gib * GIB), fp32 * 1e12, bf16 * 1e12, fp16 * 1e12, bandwidth * 1e9, link, units=units, **more
    )


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        #       name         GiB  fp32   bf16    fp16    GB/s   Gbit/s to its neighbours, multiprocessors
        _device("a100-40gb", 39.5, 19.5, 312, 312, 1555, 2400, 108),
        _device("a100-80gb", 79.2, 19.5, 312, 312, 2039, 2400, 108),
        _device("h100-80gb", 79.2, 66.9, 989.4, 989.4, 3350, 3600, 132, matmul_fraction=0.68),
        _device("h200", 139.8, 66.9, 989.4, 989.4, 4800, 3600, 132, matmul_fraction=0.70),
        _device("b200", 178.0, 75.0, 2250, 2250, 8000, 7200, 148, matmul_fraction=0.68),
        _device("v100-16gb", 15.8, 15.7, 0, 125, 900, 1200, 80, matmul_fraction=0.75),
        _device("v100-32gb", 31.7, 15.7, 0, 125, 900, 1200, 80, matmul_fraction=0.75),
        _device("t4", 14.6, 8.1, 0, 65, 320, 100, 40, matmul_fraction=0.5),
        _device("a10", 22.0, 31.2, 125, 125, 600, 200, 72, matmul_fraction=0.6),
        _device("l4", 22.0, 30.3, 121, 121, 300, 200, 58, matmul_fraction=0.6),
        _device("rtx-4090", 23.5, 82.6, 165.2, 165.2, 1008, 200, 128, matmul_fraction=0.85),
        _device("mi250x", 64.0, 47.9, 191.5, 191.5, 1638, 800, 110, matmul_fraction=0.65),
        _device("mi300x", 191.0, 163.4, 1307.4, 1307.4, 5300, 3584, 304, matmul_fraction=0.5),
        # One core of a recent server: AVX2 at 3 GHz, a share of the memory's bandwidth; loopback between processes.
        _device("cpu", 8.0, 0.096, 0.048, 0.012, 10, 7, 1, matmul_fraction=0.7, launch_seconds=8e-6, streaming=2.5),
    )
}  # fmt: skip


def find_device(name: str, where: str = "device") -> Device:
    """The device of this name in the table; `where` it was asked for.

    Raises:
        UsageError: there is none.
    """
    if name not in DEVICES:
        raise UsageError(
            f"no device is called {name!r}",
            where=where,
            hint=f"one of {', '.join(DEVICES)}, or a mapping with memory_gb, bf16_tflops, fp16_tflops, fp32_tflops and "
            "memory_gbps",
        )
    return DEVICES[name]


def match_device(driver_name: str, memory_bytes: int) -> Device | None:
    """The row of the table for a device as its driver names it ("NVIDIA A100-SXM4-80GB"), with its own memory.

    None when the table has no such device.
    """
    flat = driver_name.lower().replace(" ", "-")
    words = {
        "a100": "a100-80gb" if memory_bytes > 60 * GIB else "a100-40gb",
        "v100": "v100-32gb" if memory_bytes > 24 * GIB else "v100-16gb",
        "h100": "h100-80gb",
        "4090": "rtx-4090",
    }
    parts = flat.replace("-", " ").split()
    for word in (*words, "h200", "b200", "t4", "a10", "l4", "mi250x", "mi300x"):
        if any(part == word or part.startswith(word + "_") for part in parts) or (word == "mi250x" and word in flat):
            return replace(DEVICES[words.get(word, word)], memory_bytes=memory_bytes)
    return DEVICES["cpu"] if flat == "cpu" else None
