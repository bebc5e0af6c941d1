"""Numbers as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adatsq_trt.report.numbers import duration, ratio, scientific, share, size


def test_numbers_as_they_are_read() -> None:
    assert scientific(1.318e-3) == "1.32\xa0×\xa010⁻³"
    assert scientific(-2.5e12) == "-2.50\xa0×\xa010¹²"
    assert (scientific(0.0), scientific(float("nan"))) == ("0", "nan")
    assert (size(999), size(1000), size(299_900_000), size(2_800_000_000)) == (
        "999 bytes",
        "1.0 kB",
        "299.9 MB",
        "2.8 GB",
    )
    assert (duration(4.21), duration(192), duration(3 * 3600 + 61)) == ("4.2 s", "3 min 12 s", "3 h 1 min")
    assert (ratio(0.268), ratio(0.004), ratio(0.0)) == ("0.27 ×", "< 0.01 ×", "0.00 ×")
    assert (share(0.494), share(0.001), share(0.0)) == ("49 %", "< 1 %", "0 %")


@given(st.floats(1e-300, 1e300))
def test_scientific_keeps_three_digits(value: float) -> None:
    mantissa, exponent = scientific(value).split("\xa0×\xa010")
    exponent = exponent.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    assert float(f"{mantissa}e{exponent}") == pytest.approx(value, rel=0.005)
