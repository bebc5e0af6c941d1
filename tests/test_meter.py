"""Time and peak memory of a block."""

import time

import pytest

from adatsq_trt.errors import OutputError
from adatsq_trt.meter import Meter, resident_bytes

SIZE = 64 << 20


def test_measures_time_and_the_memory_that_came_and_went() -> None:
    before = resident_bytes()
    with Meter(lambda seconds, peak: None) as meter:
        block = bytearray(b"x") * SIZE
        time.sleep(0.2)
        del block
    assert 0.2 <= meter.seconds < 60
    # At least most of the block: pages that an earlier test gave back may be used again.
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
