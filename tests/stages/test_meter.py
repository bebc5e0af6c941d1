"""Time and peak memory of a block."""

import time
from mmap import PAGESIZE, mmap

import pytest

from adatsq_trt.errors import OutputError
from adatsq_trt.stages.meter import Meter, resident_bytes

SIZE = 64 << 20


def test_measures_time_and_the_memory_that_came_and_went() -> None:
    before = resident_bytes()
    # Mapped, so the pages are new ones, not some that an earlier test gave back to the allocator.
    with Meter(lambda seconds, peak: None) as meter, mmap(-1, SIZE) as block:
        for page in range(0, SIZE, PAGESIZE):
            block[page] = 1
        time.sleep(0.2)
    assert 0.2 <= meter.seconds < 60
    # At least most of the block: the system may take other pages of this process meanwhile.
    assert meter.peak_bytes > before + SIZE // 2


def test_saves_while_it_runs_and_when_the_block_fails() -> None:
    saved: list[float] = []

    def fail() -> None:
        with Meter(lambda seconds, peak: saved.append(seconds), save_seconds=0.1):
            time.sleep(0.4)
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert len(saved) >= 2
    assert saved == sorted(saved)
    assert saved[-1] >= 0.4


def test_a_full_disk_does_not_hide_the_error_of_the_block() -> None:
    def refuse(seconds: float, peak: int) -> None:
        raise OutputError("full")

    with pytest.raises(ValueError, match="x"), Meter(refuse):
        raise ValueError("x")
