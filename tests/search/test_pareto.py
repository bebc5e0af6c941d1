"""Fronts and crowding distances against their definitions."""

import math

from hypothesis import given
from hypothesis import strategies as st

from adatsq_trt.search.pareto import crowding_distance, front

# Few distinct values, so that ties happen.
points = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 8)), min_size=1, max_size=15)


@given(points)
def test_the_front_is_what_nothing_dominates(found: list[tuple[float, float]]) -> None:
    def dominated(i: int) -> bool:
        return any(
            q[0] <= found[i][0] and q[1] <= found[i][1] and (q != found[i] or j < i)
            for j, q in enumerate(found)
            if j != i
        )

    assert front(found) == [i for i in range(len(found)) if not dominated(i)]


@given(points, st.floats(0.01, 2))
def test_slack_keeps_near_misses(found: list[tuple[float, float]], slack: float) -> None:
    kept = front(found, slack)
    assert set(front(found)) <= set(kept)
    for i, (bits, error) in enumerate(found):
        cheaper = [e for b, e in found if b < bits]
        if not cheaper or error < min(cheaper) * (1 + slack):
            # Only a point of the same cost may then be in the way.
            better = [e for b, e in found if b == bits and e < error]
            assert i in kept or any(error >= e * (1 + slack) for e in better)
        else:
            assert i not in kept


def test_ten_per_cent_worse_is_the_edge() -> None:
    assert front([(1, 1.0), (2, 1.09), (3, 1.11)], 0.1) == [0, 1]


@given(points)
def test_the_ends_are_infinitely_far(found: list[tuple[float, float]]) -> None:
    distance = crowding_distance(found)
    assert all(d >= 0 for d in distance)
    for axis in (0, 1):
        values = [p[axis] for p in found]
        for end in (min(values), max(values)):
            assert any(math.isinf(distance[i]) for i, value in enumerate(values) if value == end)


def test_distance_is_the_gap_between_the_neighbours() -> None:
    found = [(0.0, 10.0), (1.0, 6.0), (4.0, 5.0), (10.0, 0.0)]
    # Along bits 4/10 and 9/10, along errors 5/10 and 6/10.
    expected = [math.inf, 0.4 + 0.5, 0.9 + 0.6, math.inf]
    assert all(math.isclose(a, b) for a, b in zip(crowding_distance(found), expected, strict=True))


def test_equal_points_are_no_division_by_zero() -> None:
    assert crowding_distance([(1.0, 1.0)] * 4).count(0.0) == 2
    assert crowding_distance([(1.0, 2.0)]) == [math.inf]
