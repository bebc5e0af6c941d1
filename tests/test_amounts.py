"""Sizes and speeds as users write them."""

import pytest

from adatsq_trt.amounts import Amount, parse_bytes, parse_falling, parse_size, parse_speed
from adatsq_trt.errors import UserError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("300kB", Amount(300e3, False)),
        ("2.5 GB", Amount(2.5e9, False)),
        (5000, Amount(5000.0, False)),
        ("0.3x", Amount(0.3, True)),
        (" 1 X", Amount(1.0, True)),
    ],
)
def test_a_size_is_bytes_or_a_part_of_16_bits(text: str | int, size: Amount) -> None:
    assert parse_size(text, "--budget-size") == size


@pytest.mark.parametrize(
    ("text", "speed"),
    [("1.8x", Amount(1.8, True)), ("12ms", Amount(12.0, False)), ("1e-6 ms", Amount(1e-6, False))],
)
def test_a_speed_is_beside_16_bits_or_in_milliseconds(text: str, speed: Amount) -> None:
    assert parse_speed(text, "--budget-speed") == speed


@pytest.mark.parametrize("text", ["12", "0x", "-1x", "x", "nanx", "1e999x", "12s", ""])
def test_no_speed_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--budget-speed '{text}'"):
        parse_speed(text, "--budget-speed")


@pytest.mark.parametrize("text", ["0x", "1e999x", "much", -1, True])
def test_no_size_is_refused(text: str | float) -> None:
    with pytest.raises(UserError, match="--budget-size"):
        parse_size(text, "--budget-size")
    with pytest.raises(UserError, match="--memory-limit"):
        parse_bytes(text, "--memory-limit")


def test_a_list_falls_towards_zero() -> None:
    assert parse_falling("1, 0.75,5e-1", "--sigmas", 1) == (1.0, 0.75, 0.5) == parse_falling([1, 0.75, 0.5], "", 1)
    assert parse_falling("999", "--timesteps", 1000) == (999.0,)


@pytest.mark.parametrize(
    "numbers", ["", "1,", "0.5,0.75", "1,1", "1.5,1", "1,0", "1,nan", "inf,1", "one", [], [None], 1.0]
)
def test_no_falling_list_is_refused(numbers: object) -> None:
    with pytest.raises(UserError, match=r"--sigmas '.*': expected numbers that fall, at most 1 and all above 0"):
        parse_falling(numbers, "--sigmas", 1)
