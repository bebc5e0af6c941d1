"""Limits follow from the formats."""

import numpy as np
import pytest

from adatsq_trt.engines.accuracy.tolerances import (
    FLOAT32_MEDIAN,
    ROUNDED_MEDIAN,
    block_tolerance,
    coarsest_step,
    graph_tolerance,
    loop_tolerances,
)


def test_the_coarsest_step_is_that_of_the_activations() -> None:
    assert coarsest_step(["fp32"]) == 0
    assert coarsest_step(["w8a8", "w3a3"]) == pytest.approx(1 / 3)
    assert coarsest_step(["bf16", "fp8"]) == 2**-4
    assert coarsest_step(["int4wo"]) == 2**-8


def test_graphs() -> None:
    assert graph_tolerance(["fp32"]).median == FLOAT32_MEDIAN
    assert graph_tolerance(["fp32", "nvfp4"]).relative == 0.25
    assert graph_tolerance(["nvfp4", "fp8"]).median == graph_tolerance(["nvfp4", "bf16"]).median == ROUNDED_MEDIAN


def test_blocks() -> None:
    assert block_tolerance(["fp8"], "float16").relative < block_tolerance(["fp8"], "bfloat16").relative
    assert block_tolerance(["fp8"], "float32") == graph_tolerance(["fp8"])


def test_the_median_of_a_normal_error() -> None:
    error = np.abs(np.random.default_rng(0).standard_normal(1_000_000))
    limit = block_tolerance(["nvfp4"], "bfloat16")
    assert limit.median == pytest.approx(limit.relative * np.median(error) / np.sqrt(np.mean(error**2)), rel=0.01)


def test_the_loop_adds_the_squares_of_its_steps() -> None:
    """Steps of length 3 and 4 on the way from 0 to 3 to (3, 4), each with 0.25, and guidance 2: factor 3."""
    latents = np.array([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])
    limits = loop_tolerances(latents, [graph_tolerance(["nvfp4"])] * 2, guidance=2.0)
    assert [limit.relative for limit in limits] == pytest.approx([3 * 0.25 * 3 / 3, 3 * 0.25 * 5 / 5])
    assert all(limit.median is None for limit in limits)
    assert loop_tolerances(np.zeros((2, 3)), [graph_tolerance(["fp32"])], 1.0)[0].relative == FLOAT32_MEDIAN
