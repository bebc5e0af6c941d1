"""Units of work in threads: in order, with a copy each of what they share, and the same as one after another."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adatsq_trt.execution import InProcess
from adatsq_trt.execution.threads import Threads, threads


@pytest.fixture
def two() -> Iterator[Threads]:
    with threads(2) as executor:
        yield executor


def test_results_come_in_the_order_of_the_items_and_are_those_of_one_thread(two: Threads) -> None:
    def unit(common: Tensor, item: tuple[int, Tensor]) -> Tensor:
        number, x = item
        time.sleep(0.01 * (3 - number % 3))  # later ones end earlier
        return (common @ x).softmax(dim=0).sum(dim=1)

    generator = torch.Generator().manual_seed(0)
    common = torch.randn(65, 33, generator=generator)
    items = [(number, torch.randn(33, 17, generator=generator)) for number in range(9)]
    here = InProcess()
    found = list(two.map(unit, two.share(common), items))
    expected = list(here.map(unit, here.share(common), items))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # sums of several processors have another order


def test_units_that_change_what_they_share_do_not_meet(two: Threads) -> None:
    both = threading.Barrier(2)

    def unit(common: list[int], item: int) -> tuple[int, int]:
        both.wait(timeout=60)  # two units at a time
        common[0] = item
        both.wait(timeout=60)
        return common[0], torch.get_num_threads()

    value = [-1]
    assert list(two.map(unit, two.share(value), range(6))) == [(item, 1) for item in range(6)]
    assert value == [-1]


def test_items_may_be_shared(two: Threads) -> None:
    items = [two.share([number]) for number in range(3)]
    assert list(two.map(lambda common, item: common + item[0], two.share(10), items)) == [10, 11, 12]


def test_an_error_ends_the_work(two: Threads) -> None:
    begun: list[int] = []

    def unit(_common: None, item: int) -> None:
        begun.append(item)
        time.sleep(0.02)
        raise ValueError(f"unit {item}")

    with pytest.raises(ValueError, match="unit 0"):
        list(two.map(unit, two.share(None), range(100)))
    assert len(begun) < 100


def test_torch_has_its_threads_back_afterwards() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with threads(2) as executor:
            list(executor.map(lambda common, item: None, executor.share(None), range(2)))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
