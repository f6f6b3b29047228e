"""What a processor core takes for its work relative to its row of the device table, fitted to what stages took.

A pass on a processor is the sum of three kinds of work, which the table predicts apart (`cost.Work`): arithmetic of
products and attention, bytes that kernels move, and calls of kernels. Runs of different widths and micro-batches
tell them apart; one run tells only their sum, so each factor is held to the common one unless the observations say
otherwise (ridge regression on relative errors). Ranks at work beside each other share the machine's memory, not its
cores: bytes take longer by `contention` for each other rank that works at the same time, arithmetic and calls do not.
Shared evenly, memory is no slower than by the number of those that share it: `contention` is at most 1. Runs of one
number of ranks say nothing about it; then all cores together are presumed to get twice what one core gets alone, which
makes it 1 on two cores, as measured there, and less where more cores share more channels. No torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

HOLD = 0.1
"""Weight of the common factor in the fit, in observations."""
_LEAST = 0.2  # no factor is smaller than this share of the common one
_CONTENTIONS = [step / 50 for step in range(51)]
_APART = 0.3  # runs whose numbers of ranks at work differ by less say nothing about contention


@dataclass(frozen=True)
class Rates:
    """Seconds a device takes for a second that its row of the table predicts, by the kind of work.

    Attributes:
        arithmetic: products and attention.
        memory: bytes that the kernels of passes move.
        launches: calls of kernels.
        optimizer: the optimizer's step.
        contention: further share of the time of `memory` for each other rank of the node that works at the same time.
        optimizer_contention: the same of the optimizer's step, which all ranks do together.
    """

    arithmetic: float = 1.0
    memory: float = 1.0
    launches: float = 1.0
    optimizer: float = 1.0
    contention: float = 0.0
    optimizer_contention: float = 0.0


TABLE_RATES = Rates()
"""Nothing was measured."""


@dataclass(frozen=True)
class Observation:
    """What a run took for one kind of work.

    Attributes:
        parts: seconds that the table predicts, by kind.
        seconds: measured.
        others: how many other ranks of the node worked at the same time, in the mean.
    """

    parts: tuple[float, ...]
    seconds: float
    others: float = 0.0


def presumed_contention(cores: int) -> float:
    """Contention on a processor where no runs tell: with all cores at work bytes take twice as long."""
    return 1.0 / (cores - 1) if cores > 1 else 0.0


def fit_rates(passes: Sequence[Observation], optimizer: Sequence[Observation] = (), presumed: float = 0.0) -> Rates:
    """The rates that come nearest to the observations.

    Args:
        passes: of passes; parts are arithmetic, memory, launches.
        optimizer: of the optimizer's step; one part.
        presumed: contention where the observations do not tell it.
    """
    (arithmetic, memory, launches), contention = fit_factors(passes, 1, presumed)
    (once,), together = fit_factors(optimizer, 0, presumed) if optimizer else ((1.0,), 0.0)
    return Rates(arithmetic, memory, launches, once, contention, together)


def fit_factors(
    observations: Sequence[Observation], shared: int, presumed: float = 0.0
) -> tuple[tuple[float, ...], float]:
    """A factor for each part, and the contention of part `shared`, with the least squared relative error."""
    others = [one.others for one in observations]
    apart = max(others) - min(others) >= _APART
    tried = (_factors(observations, shared, contention) for contention in (_CONTENTIONS if apart else [presumed]))
    _, factors, contention = min(tried)
    return factors, contention


def _factors(
    observations: Sequence[Observation], shared: int, contention: float
) -> tuple[float, tuple[float, ...], float]:
    """(sum of squared errors, factors, contention) for a given contention of part `shared`."""
    import numpy

    # of the measured time: the factors are to bring the sum of each row to 1
    shares = numpy.array([[part / one.seconds for part in one.parts] for one in observations])
    shares[:, shared] *= [1 + contention * one.others for one in observations]
    common = 1 / statistics.geometric_mean(shares.sum(1).tolist())
    weights = math.sqrt(HOLD) * numpy.maximum(shares.mean(0), 1e-3)
    rows = numpy.vstack([shares, numpy.diag(weights)])
    wanted = numpy.concatenate([numpy.ones(len(observations)), weights * common])
    solved, *_ = numpy.linalg.lstsq(rows, wanted, rcond=None)
    factors = numpy.maximum(solved, _LEAST * common)
    error = float((((shares * factors).sum(1) - 1) ** 2).sum())
    return error, tuple(float(value) for value in factors), contention
