"""Limits follow from the formats."""

import numpy as np
import pytest
import torch

from adatsq_trt.engines.accuracy.tolerances import (
    FLOAT32,
    FLOAT32_ERROR,
    block_tolerance,
    coarsest_step,
    layer_tolerance,
    loop_tolerances,
    output_tolerance,
)
from adatsq_trt.formats import FORMATS
from adatsq_trt.quantizers import fake_quantize_activation, static_activation_scale


def test_the_coarsest_step_is_that_of_the_activations() -> None:
    assert coarsest_step(["fp32"]) == 0
    assert coarsest_step(["w8a8", "w3a3"]) == pytest.approx(1 / 3)
    assert coarsest_step(["bf16", "fp8"]) == 2**-4
    assert coarsest_step(["int4wo"]) == 2**-8


def test_a_layer_that_rounds_nothing_errs_as_float32_does() -> None:
    assert layer_tolerance(FORMATS["fp32"].activation, 48, 128) == FLOAT32


@pytest.mark.parametrize("name", ["nvfp4", "fp8", "w8a8", "bf16"])
def test_a_layer_with_more_inputs_has_a_smaller_share_of_flips(name: str) -> None:
    small, large = (layer_tolerance(FORMATS[name].activation, tokens, 128) for tokens in (16, 4096))
    assert large.relative < small.relative <= coarsest_step([name])
    assert small.median == large.median == FLOAT32_ERROR


def test_where_every_sum_holds_a_flip_the_median_sees_them() -> None:
    limits = [layer_tolerance(FORMATS["bf16"].activation, 16, width).median for width in (128, 3072)]
    assert limits == [FLOAT32_ERROR, pytest.approx(2**-8 * 2**-4.5)]


@pytest.mark.parametrize("name", ["nvfp4", "fp8", "w8a8", "w8a8s", "bf16", "fp16"])
@pytest.mark.parametrize("outliers", [1.0, 20.0])
def test_noise_of_float32_stays_within_the_limits(name: str, outliers: float) -> None:
    """Many small layers, whose inputs differ by what sums in another order do."""
    tokens, width, grid = 24, 128, FORMATS[name].activation
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        x = torch.randn(tokens, width, generator=generator)
        x[:, 0] *= outliers
        weight = torch.randn(width, width, generator=generator) / width**0.5
        scale = static_activation_scale(x.abs().amax(), grid) if FORMATS[name].static_activation else None
        noise = 2.0**-20 * x.square().mean(dim=1, keepdim=True).sqrt() * torch.randn(x.shape, generator=generator)
        got, expected = (fake_quantize_activation(v, grid, scale) @ weight.T for v in (x + noise, x))
        limit = layer_tolerance(grid, tokens, width)
        size = expected.square().mean().sqrt()
        assert float((got - expected).norm() / expected.norm()) <= limit.relative
        assert limit.median is not None
        assert float((got - expected).abs().median() / size) <= limit.median


def test_whole_graphs_and_loops_may_err_twice_as_much_as_noise_spreads() -> None:
    assert output_tolerance(["nvfp4", "bf16"], 0.01).relative == 0.02
    assert output_tolerance(["nvfp4", "bf16"], 1.0).relative == coarsest_step(["nvfp4"])
    assert output_tolerance(["nvfp4"], 0.0).relative == FLOAT32_ERROR
    assert output_tolerance(["fp32"], 0.01) == FLOAT32
    assert [t.relative for t in loop_tolerances(["fp8"], [0.0, 0.01])] == [FLOAT32_ERROR, 0.02]
    assert [t.relative for t in loop_tolerances(["fp32"], [0.01])] == [FLOAT32_ERROR]


def test_blocks() -> None:
    assert block_tolerance(["fp8"], "float16").relative < block_tolerance(["fp8"], "bfloat16").relative
    assert block_tolerance(["fp8"], "float32").relative == coarsest_step(["fp8"])
    assert block_tolerance(["fp32"], "float32") == FLOAT32


def test_a_target_block_may_err_more_behind_more_than_four_layers() -> None:
    limits = [block_tolerance(["nvfp4"], "bfloat16", layers).relative for layers in (0, 1, 4, 6, 7)]
    assert limits[0] == limits[1] == limits[2] < limits[3] < limits[4]
    walk = 2**3 * 2**-9
    assert (limits[4] - walk) / (limits[2] - walk) == pytest.approx((7 / 4) ** 0.5)


@pytest.mark.parametrize("gate", ["silu", "gelu"])
def test_a_gate_adds_the_squares_of_its_factors_errors(gate: str) -> None:
    """What limits behind a gate rest on."""
    generator = torch.Generator().manual_seed(0)
    a, b, first, second = torch.randn(4, 512, 512, generator=generator)
    function, size = getattr(torch.nn.functional, gate), 0.02
    exact = function(a) * b
    apart = [function(a + size * first * own) * (b + size * second * other) for own, other in ((1, 1), (0, 1))]
    both, one = (float((got - exact).norm() / exact.norm()) for got in apart)
    assert both / one == pytest.approx(2**0.5, rel=0.2)


def test_the_median_of_a_normal_error() -> None:
    error = np.abs(np.random.default_rng(0).standard_normal(1_000_000))
    limit = block_tolerance(["nvfp4"], "bfloat16")
    assert limit.median == pytest.approx(limit.relative * np.median(error) / np.sqrt(np.mean(error**2)), rel=0.01)
