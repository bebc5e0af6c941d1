"""Paired intervals: what is common to both does not widen them."""

import numpy as np
import pytest

from adatsq_trt.intervals import LEAST, paired_difference, paired_ratio


def test_what_samples_have_in_common_does_not_count() -> None:
    rng = np.random.default_rng(0)
    hard = rng.lognormal(sigma=1.5, size=256)
    one, other = 0.9 * hard, hard
    ratio, difference = paired_ratio(one, other), paired_difference(one, other)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.9, 0.9, 0.9))
    assert difference.high < 0
    assert difference.value == pytest.approx(one.mean() - other.mean())
    # Another order of the samples of one breaks the pairs.
    assert paired_difference(rng.permutation(one), other).is_tie


def test_an_interval_holds_the_true_difference_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(1), 0
    for _ in range(200):
        common = rng.lognormal(size=64)
        one, other = common + rng.normal(0.2, 1.0, 64), common + rng.normal(0.0, 1.0, 64)
        interval = paired_difference(one, other)
        held += interval.low <= 0.2 <= interval.high
    assert 0.88 < held / 200 <= 0.99


def test_few_samples_prove_nothing() -> None:
    few = np.arange(1.0, LEAST)
    assert paired_difference(few, few + 5).is_tie
    assert paired_ratio(few, 2 * few).high == np.inf
    assert not paired_difference(np.ones(LEAST), 2 * np.ones(LEAST)).is_tie
