"""Bootstrap intervals where the answer is known."""

import numpy as np
import pytest

from adatsq_trt.evaluation.scores import bootstrap, column_means, columns_of, psnr

COLUMNS = ["one", "two"] * 300


def test_the_value_is_the_mean_of_the_columns() -> None:
    values = np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    names = ["one", "two", "two", "two", "two"]
    assert column_means(values, columns_of(names)) == {"one": 1.0, "two": 0.5}
    assert bootstrap(values, names).value == 0.75


def test_the_interval_is_that_of_a_binomial() -> None:
    right = (np.random.default_rng(0).random(600) < 0.8).astype(float)
    interval = bootstrap(right, COLUMNS)
    deviation = np.sqrt(interval.value * (1 - interval.value) / 600)
    assert interval.high - interval.value == pytest.approx(1.96 * deviation, rel=0.15)
    assert interval.value - interval.low == pytest.approx(1.96 * deviation, rel=0.15)


def test_the_truth_lies_within_as_often_as_it_should() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for seed in range(100):
        right = np.where(np.arange(120) % 2, rng.random(120) < 0.9, rng.random(120) < 0.5).astype(float)
        interval = bootstrap(right, ["one", "two"] * 60, seed)
        inside += interval.low <= 0.7 <= interval.high
    assert 88 <= inside <= 99


def test_pairs_tell_apart_what_means_do_not() -> None:
    rng = np.random.default_rng(2)
    easy = rng.normal(0, 10, 600)
    better = easy + rng.normal(0.5, 1, 600)
    assert bootstrap(better, COLUMNS).low < bootstrap(easy, COLUMNS).high, "their intervals overlap"
    difference = bootstrap(better - easy, COLUMNS)
    assert difference.low > 0
    assert not difference.is_tie


def test_no_difference_is_a_tie() -> None:
    assert bootstrap(np.zeros(600), COLUMNS).is_tie
    noise = np.random.default_rng(3).choice([-1.0, 0.0, 1.0], 600)
    assert bootstrap(noise - noise.mean(), COLUMNS).is_tie


def test_the_same_seed_gives_the_same_interval() -> None:
    right = (np.random.default_rng(0).random(600) < 0.8).astype(float)
    assert bootstrap(right, COLUMNS) == bootstrap(right, COLUMNS)
    assert bootstrap(right, COLUMNS, 1) != bootstrap(right, COLUMNS)


def test_psnr_of_known_errors() -> None:
    reference = np.zeros((3, 4, 4, 3))
    images = np.stack([np.full((4, 4, 3), 0.1), np.full((4, 4, 3), 0.01), np.zeros((4, 4, 3))])
    assert psnr(images, reference) == pytest.approx([20, 40, 100])
