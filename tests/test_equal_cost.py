"""Uniform formats at the cost of a policy."""

from __future__ import annotations

import pytest

from benchmarks.equal_cost import uniform_error

FORMATS = ((4.5, 4e-3), (8.0, 1e-3), (16.0, 0.0))


def test_errors_between_formats_lie_on_a_line_through_their_logarithms() -> None:
    assert uniform_error(6.25, FORMATS) == pytest.approx(2e-3)
    assert uniform_error(8.0, reversed(FORMATS)) == pytest.approx(1e-3)


def test_outside_of_the_formats_the_nearest_counts() -> None:
    assert uniform_error(4.0, FORMATS) == pytest.approx(4e-3)
    assert uniform_error(12.0, FORMATS) == pytest.approx(1e-3)


def test_a_format_that_a_cheaper_one_beats_does_not_count() -> None:
    assert uniform_error(6.25, (*FORMATS, (6.0, 5e-3))) == pytest.approx(2e-3)


def test_without_an_error_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(ValueError, match="no uniform format"):
        uniform_error(6.0, [(16.0, 0.0)])
