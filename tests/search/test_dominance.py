"""The rule on random clouds of policies: bytes, time, errors of the same samples."""

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from adatsq_trt.costs import Costs
from adatsq_trt.intervals import Floats, Interval, paired_difference
from adatsq_trt.search.dominance import dominates, no_costlier, undominated


@dataclass(frozen=True)
class Cloud:
    costs: dict[int, Costs]
    errors: dict[int, Floats]


@st.composite
def clouds(draw: st.DrawFn) -> Cloud:
    """The first is the chosen policy; few values, so that there are ties."""
    count, seed = draw(st.integers(1, 8)), draw(st.integers(0, 10_000))
    with_ms, samples = draw(st.booleans()), draw(st.sampled_from([2, 16, 64]))
    rng = np.random.default_rng(seed)
    common = rng.lognormal(size=samples)
    costs, errors = {}, {}
    for i in range(count):
        time = float(rng.integers(1, 4))
        costs[i] = Costs(
            resident_bytes=int(rng.integers(1, 4)),
            activation_bits=4.0 if with_ms else time,
            ms=time if with_ms else None,
        )
        spread = rng.normal(0, rng.choice([0.0, 0.2]), samples)
        errors[i] = common * (rng.choice([0.5, 0.9, 1.0, 1.1]) + spread)
    return Cloud(costs, errors)


def beats(cloud: Cloud, one: int, other: int) -> bool:
    difference = paired_difference(cloud.errors[one], cloud.errors[other])
    return dominates(cloud.costs[one], cloud.costs[other], difference)


@settings(max_examples=200, deadline=None)
@given(clouds())
def test_what_is_returned_is_beaten_by_nothing_and_is_no_worse_than_what_was_chosen(cloud: Cloud) -> None:
    simple = list(cloud.costs)[1:]
    returned = undominated(0, simple, cloud.costs, cloud.errors)
    assert not any(beats(cloud, other, returned) for other in simple if other != returned)
    assert (returned == 0) == (not any(beats(cloud, other, 0) for other in simple))
    assert no_costlier(cloud.costs[returned], cloud.costs[0])
    assert cloud.errors[returned].mean() <= cloud.errors[0].mean()


@settings(max_examples=100, deadline=None)
@given(clouds())
def test_it_is_a_strict_order(cloud: Cloud) -> None:
    numbers = list(cloud.costs)
    for one in numbers:
        assert not beats(cloud, one, one)
        for other in numbers:
            assert not (beats(cloud, one, other) and beats(cloud, other, one))


COSTS = Costs(resident_bytes=100, activation_bits=4.0, ms=1.0)


def test_each_of_the_three_decides() -> None:
    tie, better, worse = Interval(0.0, -1.0, 1.0), Interval(-2.0, -3.0, -1.0), Interval(0.1, -0.1, 0.3)
    smaller = COSTS.model_copy(update={"resident_bytes": 99})
    faster = COSTS.model_copy(update={"ms": 0.9})
    assert dominates(smaller, COSTS, tie)
    assert dominates(faster, COSTS, tie)
    assert dominates(COSTS, COSTS, better)
    assert not dominates(COSTS, COSTS, Interval(-0.5, -1.5, 0.5))  # perhaps by chance
    assert not dominates(smaller, COSTS, worse)
    assert not dominates(smaller, faster, better)  # it takes longer
    # Milliseconds count where they are known, activation bits where they are not.
    assert not dominates(COSTS.model_copy(update={"activation_bits": 3.0}), COSTS, tie)
    unknown = COSTS.model_copy(update={"ms": None})
    assert dominates(unknown.model_copy(update={"activation_bits": 3.0}), unknown, tie)
