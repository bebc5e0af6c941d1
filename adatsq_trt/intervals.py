"""Bootstrap intervals of what is measured on samples (Efron and Tibshirani 1993, chapters 6 and 13).

Two policies are compared on the same prompts and seeds, so samples are drawn again in pairs: errors of diffusion models
are heavy-tailed, and most of their spread is common to both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS, COVERAGE = 2000, 0.95
# Of fewer samples the bootstrap says too little: their interval is infinite.
LEAST = 8
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure and where it may lie.

    Attributes:
        value: measured on the batch.
        low: 2.5th percentile of the bootstrap.
        high: 97.5th percentile.
    """

    value: float
    low: float
    high: float

    @property
    def is_tie(self) -> bool:
        """For a difference: whether zero lies within."""
        return self.low <= 0 <= self.high


def limits(draws: Floats) -> tuple[float, float]:
    """The percentiles of some draws."""
    low, high = np.quantile(draws, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def paired_difference(one: Floats, other: Floats) -> Interval:
    """The mean of one less the mean of the other, float64 [samples] each, of the same samples."""
    value = float(one.mean() - other.mean())
    if len(one) < LEAST:
        return Interval(value, -np.inf, np.inf)
    drawn = _draws(len(one))
    return Interval(value, *limits((one - other)[drawn].mean(axis=1)))


def paired_ratio(one: Floats, other: Floats) -> Interval:
    """The mean of one in means of the other, float64 [samples] each, of the same samples; means above 0."""
    value = float(one.mean() / other.mean())
    if len(one) < LEAST:
        return Interval(value, 0.0, np.inf)
    drawn = _draws(len(one))
    return Interval(value, *limits(one[drawn].mean(axis=1) / other[drawn].mean(axis=1)))


def _draws(samples: int) -> NDArray[np.int64]:
    """The same for all pairs of a batch: [draws, samples]."""
    return np.random.default_rng(0).integers(0, samples, (DRAWS, samples))
