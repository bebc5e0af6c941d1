"""Kernels for one processor beside PyTorch's operations, bit by bit."""

import pytest
import torch
from torch import Tensor

from adatsq_trt.formats import format_named
from adatsq_trt.models import cpu_kernels
from adatsq_trt.models.rounding import round_input
from adatsq_trt.quantizers import fake_quantize_activation


def hard_inputs() -> Tensor:
    """Tokens of very different sizes, with zeros, ties, subnormal and huge numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 320, generator=generator) * torch.exp(3 * torch.randn(512, 1, generator=generator))
    x[0], x[1, :16], x[2] = 0, 0, -0.0
    x[3:40] = (4 * x[3:40]).round() / 8  # halves of the grids' steps
    x[40, ::7], x[41, ::5], x[42] = 1e38, -1e-40, 1e-42
    x[43, 3], x[44, 5] = torch.inf, -torch.inf
    return x


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
@pytest.mark.parametrize("scale", [1.0, 0.0317, 2.0**-9, 2.0**-126])
def test_the_same_bits(name: str, scale: float) -> None:
    x, grid, own = hard_inputs(), format_named(name).activation, torch.tensor(scale)
    expected, found = fake_quantize_activation(x, grid, own), cpu_kernels.round_rows(x, grid, own)
    assert torch.equal(expected.isnan(), found.isnan())
    assert torch.equal(expected.nan_to_num().view(torch.int32), found.nan_to_num().view(torch.int32))


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_a_number_that_is_none_stays_one(name: str) -> None:
    x, grid = hard_inputs(), format_named(name).activation
    x[100, 17] = torch.nan
    found = cpu_kernels.round_rows(x, grid, torch.tensor(0.1))
    assert torch.equal(found.isnan(), fake_quantize_activation(x, grid, torch.tensor(0.1)).isnan())
    assert found[100, 17].isnan()


def test_large_inputs_of_one_processor_take_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = list[tuple[int, ...]]()

    def watched(x: Tensor, *arguments: object) -> Tensor:
        taken.append(tuple(x.shape))
        return x

    monkeypatch.setattr(cpu_kernels, "round_rows", watched)
    grid, scale, before = format_named("fp8").activation, torch.tensor(0.1), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        round_input(hard_inputs(), grid, scale)
        round_input(hard_inputs()[:8], grid, scale)
        round_input(hard_inputs().bfloat16(), grid, scale)
        round_input(hard_inputs().mT, grid, scale)
        torch.set_num_threads(2)
        round_input(hard_inputs(), grid, scale)
    finally:
        torch.set_num_threads(before)
    assert taken == [(512, 320)]
