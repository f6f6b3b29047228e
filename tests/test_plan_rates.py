"""Rates of a processor fitted to observations: known factors are found, and one run moves all of them alike."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llmpipe_cli.errors import UsageError
from llmpipe_cli.plan.calibration import Calibration, calibrate_run, links_of
from llmpipe_cli.plan.cluster import described
from llmpipe_cli.plan.cost import CPU_PASS_SECONDS, around_passes, stage_costs
from llmpipe_cli.plan.devices import DEVICES
from llmpipe_cli.plan.rates import Observation, Rates, fit_rates
from llmpipe_cli.plan.search import Job, Pins, search
from llmpipe_cli.plan.simulate import StageCosts
from llmpipe_cli.plan.transformer import transformer_profile


def _observed(parts: tuple[float, float, float], others: float, noise: float) -> Observation:
    """What a machine would show whose factors are 0.7, 2 and 1.5, with contention of 0.6 for memory."""
    seconds = 0.7 * parts[0] + 2.0 * parts[1] * (1 + 0.6 * others) + 1.5 * parts[2]
    return Observation(parts, seconds * (1 + noise), others)


def test_factors_and_contention_are_found() -> None:
    draw = random.Random(3)
    passes = [
        _observed((draw.uniform(1, 4), draw.uniform(0.2, 2), draw.uniform(0.1, 1)), others, draw.uniform(-0.03, 0.03))
        for others in (0.0, 0.7, 1.0)
        for _ in range(12)
    ]
    rates = fit_rates(passes, [Observation((0.2,), 0.3), Observation((0.1,), 0.24, 1.0)])
    assert rates.arithmetic == pytest.approx(0.7, rel=0.15)
    assert rates.memory == pytest.approx(2.0, rel=0.15)
    assert rates.contention == pytest.approx(0.6, abs=0.05)
    for parts in ((5.0, 0.5, 0.2), (0.5, 2.0, 1.0)):  # what was not observed is predicted too
        predicted = rates.arithmetic * parts[0] + rates.memory * parts[1] + rates.launches * parts[2]
        assert predicted == pytest.approx(_observed(parts, 0.0, 0.0).seconds, rel=0.05)
    assert rates.optimizer == pytest.approx(1.5, rel=0.02)
    assert rates.optimizer_contention == pytest.approx(0.6, abs=0.02)


def test_one_run_moves_all_rates_alike() -> None:
    rates = fit_rates([Observation((2.0, 1.0, 0.5), 7.0, 1.0)])
    assert (rates.arithmetic, rates.memory, rates.launches) == pytest.approx((2.0, 2.0, 2.0))
    assert rates.contention == 0.0
    device, table = DEVICES["cpu"].at(rates), DEVICES["cpu"]
    assert device.fp32 == pytest.approx(table.fp32 / 2)
    assert device.launch_seconds == pytest.approx(table.launch_seconds * 2)
    assert device.memory_bandwidth * device.streaming == pytest.approx(table.memory_bandwidth * table.streaming)


@pytest.mark.parametrize(("cores", "presumed"), [(0, 0.0), (1, 0.0), (2, 1.0), (5, 0.25)])
def test_contention_is_presumed_where_no_run_tells_it(cores: int, presumed: float) -> None:
    alone = Calibration(passes=(Observation((2.0, 1.0, 0.5), 7.0),), optimizer=(Observation((0.1,), 0.2),), cores=cores)
    rates = alone.rates()
    assert (rates.contention, rates.optimizer_contention) == (presumed, presumed)
    assert rates.memory == pytest.approx(2.0)
    both = alone.joined(Calibration(passes=(Observation((2.0, 1.0, 0.5), 8.0, 1.0),)))
    assert both.rates().contention == pytest.approx(0.5, abs=0.05), "2 s of memory, 1 s more beside another rank"


def test_links_that_replicas_of_several_runs_showed() -> None:
    cluster = described({"nodes": 2, "devices_per_node": 2, "device": "cpu", "inter_node_gbps": 10.0}, "test")
    joined = Calibration(4.0).joined(Calibration(reductions=(2.0,))).joined(Calibration(reductions=(6.0, 7.0)))
    measured = joined.apply(cluster)
    assert measured.intra_node_gbps * measured.link_fraction == 6.0  # the median, before doctor's figure
    assert measured.inter_node_gbps * measured.link_fraction == pytest.approx(10.0 * cluster.link_fraction)


def test_every_pass_of_a_processor_costs_the_engine_time() -> None:
    cpu, gpu = DEVICES["cpu"], DEVICES["a100-80gb"]
    segments = [StageCosts(0.02, 0.03, 0.01)] * 4
    for split, passes in ((False, 2), (True, 3)):
        (whole,) = stage_costs(segments, [0, 4], around_passes(cpu, split=split))
        assert whole.total == pytest.approx(4 * 0.06 + passes * CPU_PASS_SECONDS)
        halves = stage_costs(segments, [0, 2, 4], around_passes(cpu, split=split))
        assert sum(half.total for half in halves) == pytest.approx(4 * 0.06 + 2 * passes * CPU_PASS_SECONDS)
    assert around_passes(gpu, split=True).total == 0.0


def test_ranks_beside_each_other_share_memory_alone() -> None:
    profile = transformer_profile(
        num_layers=4, hidden=512, heads=8, vocab_size=2048, sequence_len=128, fused_attention=True, dtype="fp32"
    )
    cluster = described({"nodes": 1, "devices_per_node": 2, "device": "cpu"}, "test")

    def seconds(rates: Rates, data: int) -> float:
        pins = Pins(pipeline=1, tensor=1, data=data, micro_batch_size=2, zero_stage=0, checkpointing="none")
        best = search(Job(profile, cluster, 8, 128, pins=pins, rates=rates), keep=1).best[0]
        assert best.seconds is not None
        return best.seconds

    crowded = Rates(contention=0.5)
    assert seconds(crowded, data=2) == pytest.approx(seconds(Rates(memory=1.5), data=2))  # the bytes of passes
    assert seconds(crowded, data=2) > 1.02 * seconds(Rates(), data=2)
    assert seconds(crowded, data=1) == seconds(Rates(), data=1)


def test_ranks_have_the_cores_that_no_other_takes() -> None:
    """Arithmetic is shared out to them; the memory is as fast as before."""
    profile = transformer_profile(
        num_layers=4, hidden=512, heads=8, vocab_size=2048, sequence_len=128, fused_attention=True, dtype="fp32"
    )
    cluster = described({"nodes": 1, "devices_per_node": 2, "device": "cpu"}, "test")

    def seconds(pipeline: int, *, spare: bool, arithmetic: float = 1.0) -> float:
        pins = Pins(pipeline=pipeline, tensor=1, data=1, micro_batch_size=2, zero_stage=0, schedule="1f1b")
        job = Job(profile, cluster, 8, 128, pins=pins, spare_cores=spare, rates=Rates(arithmetic=arithmetic))
        return search(job, keep=1).best[0].seconds or 0.0

    assert seconds(1, spare=True) == pytest.approx(seconds(1, spare=False, arithmetic=0.5))
    assert seconds(1, spare=True) < 0.8 * seconds(1, spare=False)
    assert seconds(2, spare=True) == seconds(2, spare=False)


def test_runs_and_links_that_say_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run directory"):
        calibrate_run(tmp_path)
    (tmp_path / "plan.json").write_text('{"another": "version"}')
    with pytest.raises(UsageError, match="no timeline"):
        calibrate_run(tmp_path)
    (tmp_path / "timeline").mkdir()
    (tmp_path / "timeline" / "step-00000001.json").write_text('{"ranks": []}')
    with pytest.raises(UsageError, match="no plan of this version"):
        calibrate_run(tmp_path)
    for values in ([1], {}, {"intra_node_gbps": -3}, {"inter_node_gbps": float("inf")}):
        with pytest.raises(UsageError):
            links_of(values, "links.json")
