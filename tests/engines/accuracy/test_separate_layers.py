"""Equal tokens flip together, so each counts once or twice, wherever most of a layer's rows are padding."""

import numpy as np
import pytest

from adatsq_trt.engines.accuracy.comparison import compare
from adatsq_trt.engines.accuracy.separate_layers import chosen_rows
from adatsq_trt.engines.accuracy.tolerances import layer_tolerance
from adatsq_trt.formats import FORMATS

TOKENS, PADDING, WIDTH = 12, 52, 192


def test_the_first_and_the_last_of_equal_rows_are_chosen() -> None:
    generator = np.random.default_rng(1)
    output = generator.standard_normal((2, 5, 16), dtype=np.float32)
    output[0, 2:] = output[1, 3] = output[0, 2]
    output[0, 3] *= 1 + 2e-7  # sums in another order
    output[1, 0] = output[0, 0]
    output[1, 4] = 0
    assert chosen_rows(output).tolist() == [0, 1, 2, 5, 6, 7, 8, 9]
    assert chosen_rows(np.zeros((2, 3, 4), np.float32)).tolist() == [0, 5]
    assert chosen_rows(output[:, :1, :]).tolist() == [0, 1]
    assert chosen_rows(np.full((3, 4), np.nan, np.float32)).tolist() == [0, 1, 2]


@pytest.fixture
def layer() -> tuple[np.ndarray, np.ndarray]:
    """Outputs of a layer in bfloat16 whose padding's token flips once: expected and got, both correct."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((TOKENS + PADDING, WIDTH), dtype=np.float32)
    x[TOKENS:] = x[TOKENS]
    other = x.copy()
    other[TOKENS:, 7] = x[TOKENS, 7] * (1 + 2.0**-8)
    weight = generator.standard_normal((WIDTH, WIDTH), dtype=np.float32) / np.float32(WIDTH) ** 0.5
    return x @ weight, other @ weight


def passes(expected: np.ndarray, got: np.ndarray) -> bool:
    limit = layer_tolerance(FORMATS["bf16"].activation, len(expected), WIDTH)
    return compare({"y": got}, {"y": expected}, {"y": limit})["y"].passed


def test_a_flip_in_the_padding_is_one_flip(layer: tuple[np.ndarray, np.ndarray]) -> None:
    expected, got = layer
    rows = chosen_rows(expected)
    assert len(rows) == TOKENS + 2
    assert passes(expected[rows], got[rows])
    assert not passes(expected, got)  # as it was


def test_an_error_in_every_row_is_seen(layer: tuple[np.ndarray, np.ndarray]) -> None:
    expected, _ = layer
    rows = chosen_rows(expected)
    assert not passes(expected[rows], expected[rows] + np.float32(1e-4))
