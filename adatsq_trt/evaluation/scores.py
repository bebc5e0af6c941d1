"""Scores with bootstrap intervals, and differences between methods on the same prompts and seeds.

Samples are drawn again within each column of prompts, so that every draw has as many of each as the batch; the same
draws serve both methods of a difference (Efron and Tibshirani 1993, chapters 6 and 13).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adatsq_trt.intervals import DRAWS, Floats, Interval, limits


def columns_of(names: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Column → indices of its samples, in the order in which columns first occur."""
    array = np.array(names)
    return {name: np.flatnonzero(array == name) for name in dict.fromkeys(names)}


def column_means(values: Floats, columns: dict[str, NDArray[np.int64]]) -> dict[str, float]:
    """Mean of every column; what is compared is the mean of these."""
    return {name: float(values[index].mean()) for name, index in columns.items()}


def bootstrap(values: Floats, names: Sequence[str], seed: int = 0) -> Interval:
    """The mean over columns of the columns' means.

    Args:
        values: one for each sample: a score, a PSNR, or the difference of two methods.
        names: each sample's column.
        seed: of the draws; the same for what shall be comparable.
    """
    columns, rng = columns_of(names), np.random.default_rng(seed)
    draws = np.zeros(DRAWS)
    for index in columns.values():
        draws += values[index][rng.integers(0, len(index), (DRAWS, len(index)))].mean(axis=1)
    value = sum(column_means(values, columns).values()) / len(columns)
    return Interval(value, *limits(draws / len(columns)))


def psnr_of_mean(decibels: Floats) -> float:
    """PSNR of the mean squared error, from that of every sample: a few lost samples weigh as much as they err."""
    return float(-10 * np.log10(np.mean(10 ** (-decibels / 10))))


def worst_psnr(decibels: Floats) -> float:
    """Return the 5 % quantile of the samples' PSNR: low where some became another picture."""
    return float(np.quantile(decibels, 0.05))


def psnr(images: Floats, reference: Floats) -> Floats:
    """Peak signal-to-noise ratio of every sample in dB, float64 [samples]; values in [0, 1], 100 dB where equal."""
    error = np.square(images.astype(np.float64) - reference).reshape(len(images), -1).mean(axis=1)
    decibels: Floats = -10 * np.log10(np.maximum(error, 1e-10))
    return decibels
