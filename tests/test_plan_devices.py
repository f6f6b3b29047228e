"""The device table and how a driver's device name is found in it."""

from __future__ import annotations

import pytest

from llmpipe_cli.errors import UsageError
from llmpipe_cli.plan.devices import DEVICES, GIB, find_device, match_device


def test_every_device_of_the_contract_is_there() -> None:
    names = "a100-40gb a100-80gb h100-80gb h200 b200 v100-16gb v100-32gb t4 a10 l4 rtx-4090 mi250x mi300x cpu"
    assert set(DEVICES) == set(names.split())
    assert find_device("a100-80gb").peak("bf16") == 312e12
    with pytest.raises(UsageError) as error:
        find_device("v100-32gb").peak("bf16")
    assert "fp16" in (error.value.hint or "")
    with pytest.raises(UsageError):
        find_device("a100")


@pytest.mark.parametrize(
    ("driver_name", "gib", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", 79, "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", 39, "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", 79, "h100-80gb"),
        ("NVIDIA H200", 140, "h200"),
        ("Tesla V100-SXM2-16GB", 16, "v100-16gb"),
        ("Tesla T4", 15, "t4"),
        ("NVIDIA A10", 22, "a10"),
        ("NVIDIA L4", 22, "l4"),
        ("NVIDIA GeForce RTX 4090", 24, "rtx-4090"),
        ("AMD Instinct MI250X / MI250", 64, "mi250x"),
        ("AMD Instinct MI300X", 192, "mi300x"),
        ("NVIDIA A40", 48, None),
        ("NVIDIA GeForce GTX 1080", 8, None),
    ],
)
def test_driver_names(driver_name: str, gib: int, name: str | None) -> None:
    found = match_device(driver_name, gib * GIB)
    assert (found.name if found else None) == name
    assert found is None or found.memory_bytes == gib * GIB
