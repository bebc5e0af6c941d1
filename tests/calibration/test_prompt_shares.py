"""Calibration, selection and scoring have no prompt in common where a model has enough of them."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from adatsq_trt.calibration.prompt_shares import LEAST, Use, shared_prompts


@given(st.integers(LEAST, 2000))
def test_many_prompts_are_shared_out(count: int) -> None:
    shares = [set(shared_prompts(count, use)) for use in Use]
    assert set().union(*shares) == set(range(count))
    assert all(not one & other for one, other in itertools.combinations(shares, 2))
    assert min(map(len, shares)) >= count // 5


@given(st.integers(1, LEAST - 1))
def test_few_prompts_are_drawn_in_every_batch(count: int) -> None:
    assert all(shared_prompts(count, use) == tuple(range(count)) for use in Use)


def test_kinds_of_prompts_that_come_in_turn_are_all_in_every_share() -> None:
    for use in Use:
        assert {i % 6 for i in shared_prompts(390, use)} == set(range(6))
