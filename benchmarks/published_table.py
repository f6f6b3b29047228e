"""Reading tables of published training runs: each row becomes a `Run`, or a reason why it cannot be used."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

Row = dict[str, str]

NEEDED = (
    "id", "source", "framework", "model", "layers", "hidden", "heads", "seq", "vocab", "gpu", "gpus", "precision",
    "recompute", "zero", "tp", "pp", "dp", "mbs", "gbs", "step_s", "tflops_gpu", "tflops_kind", "mem_gb",
)  # fmt: skip
RATE_KINDS = ("hw", "model", "hw(8ND)", "model(6ND)")
"""How TFLOP/s were counted: with or without what is computed again, of all products or by 2 a parameter and token."""


class UnusableError(Exception):
    """A row that cannot be compared, or a table that cannot be read; the message says why."""


@dataclass(frozen=True)
class Run:
    """One published run.

    Attributes:
        id: its name in the table.
        source: where it was published.
        framework: the engine's name.
        model: the model's name.
        layers: transformer layers.
        hidden: width.
        heads: query heads.
        kv_heads: key-value heads; None: as many as heads.
        ffn: width of the MLP; None: 4 x hidden.
        seq: tokens a sample.
        vocab: entries of the vocabulary.
        gpu: kind of device.
        gpus: devices.
        precision: fp16 or bf16.
        recompute: full, selective or none.
        zero: ZeRO stage of the optimizer's state, 0 or 1; 1 for FSDP, which divides it as well.
        tp: tensor shards.
        pp: stages.
        vpp: parts a stage.
        dp: replicas.
        mbs: samples a micro-batch.
        gbs: samples a step.
        step_seconds: seconds a step, if published.
        tflops: TFLOP/s a device, if published.
        rate_kind: how those were counted, one of `RATE_KINDS`.
        memory_gib: memory as nvidia-smi shows it, if published.
        out_of_memory: it ran out of memory.
        notes: what else is known.
    """

    id: str
    source: str
    framework: str
    model: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int | None
    ffn: int | None
    seq: int
    vocab: int
    gpu: str
    gpus: int
    precision: str
    recompute: str
    zero: int
    tp: int
    pp: int
    vpp: int
    dp: int
    mbs: int
    gbs: int
    step_seconds: float | None
    tflops: float | None
    rate_kind: str
    memory_gib: float | None
    out_of_memory: bool
    notes: str


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file, all cells stripped strings.

    Raises:
        UnusableError: it cannot be read, or is no table of runs.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = names
            rows = [{name: (row.get(name) or "").strip() for name in names} for row in reader]
    except OSError as error:
        raise UnusableError(f"{path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UnusableError(f"{path} is no CSV file: {error}") from error
    missing = [name for name in NEEDED if name not in names]
    if missing:
        raise UnusableError(f"{path} is no table of runs: it has no column {', '.join(missing)}")
    return rows


def read_run(row: Row) -> Run:
    """The run of a row that is dense, in 16 bit, and whose layout and recomputation are known.

    Raises:
        UnusableError: it is not, a cell is not what it should be, or the numbers contradict each other.
    """
    if row["precision"] not in ("fp16", "bf16"):
        _unusable("not known to be in 16 bit")
    if row["recompute"] not in ("full", "selective", "none"):
        _unusable("recomputation unknown")
    for name in ("cp", "ep"):
        if row.get(name, "") not in ("", "0", "1"):
            _unusable("context or expert parallelism")
    if row["tflops_gpu"] and not row["step_s"] and row["tflops_kind"] not in RATE_KINDS:
        _unusable("how its TFLOP/s were counted is unknown")
    memory = row["mem_gb"]
    run = Run(
        id=row["id"],
        source=row["source"],
        framework=row["framework"],
        model=row["model"],
        layers=_whole(row, "layers"),
        hidden=_whole(row, "hidden"),
        heads=_whole(row, "heads"),
        kv_heads=_whole(row, "kv_heads") if row.get("kv_heads") else None,
        ffn=_whole(row, "ffn") if row.get("ffn") else None,
        seq=_whole(row, "seq"),
        vocab=_whole(row, "vocab"),
        gpu=row["gpu"],
        gpus=_whole(row, "gpus"),
        precision=row["precision"],
        recompute=row["recompute"],
        zero=_zero_stage(row["zero"]),
        tp=_whole(row, "tp"),
        pp=_whole(row, "pp"),
        vpp=_whole(row, "vpp") if row.get("vpp") else 1,
        dp=_whole(row, "dp"),
        mbs=_whole(row, "mbs"),
        gbs=_whole(row, "gbs"),
        step_seconds=_number(row, "step_s"),
        tflops=_number(row, "tflops_gpu"),
        rate_kind=row["tflops_kind"],
        memory_gib=None if memory == "OOM" else _number(row, "mem_gb"),
        out_of_memory=memory == "OOM",
        notes=row.get("notes", ""),
    )
    _check(run)
    return run


def _check(run: Run) -> None:
    """Numbers that contradict each other, and runs without any measurement.

    Raises:
        UnusableError: there are some.
    """
    if run.tp * run.pp * run.dp != run.gpus:
        _unusable("tp x pp x dp is not the number of devices")
    if run.hidden % run.heads or run.heads % run.tp or run.heads % (run.kv_heads or run.heads):
        _unusable("width, heads and tensor shards do not divide")
    if run.gbs % (run.mbs * run.dp):
        _unusable("the batch is no whole number of micro-batches")
    if run.step_seconds is None and run.tflops is None and run.memory_gib is None and not run.out_of_memory:
        _unusable("nothing was measured")


def _zero_stage(text: str) -> int:
    if text not in ("0", "1", "FSDP2"):
        _unusable("ZeRO stage unknown, or neither 0, 1 nor FSDP")
    return 0 if text == "0" else 1


def _whole(row: Row, name: str) -> int:
    try:
        value = int(row[name])
    except ValueError:
        _unusable(f"{name} is {'empty' if not row[name] else 'no whole number'}")
    if value < 1:
        _unusable(f"{name} is below 1")
    return value


def _number(row: Row, name: str) -> float | None:
    if not row[name]:
        return None
    try:
        value = float(row[name])
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        _unusable(f"{name} is no number above 0")
    return value


def _unusable(reason: str) -> NoReturn:
    raise UnusableError(reason)
