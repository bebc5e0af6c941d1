"""The adapter of Stable Diffusion 3.5 against diffusers' real class with random weights."""

import pytest
import torch
from torch import Tensor

from adatsq_trt.errors import MismatchError
from adatsq_trt.models.stable_diffusion_3 import StableDiffusion3Adapter
from tests.tiny_stable_diffusion_3 import make_tiny_stable_diffusion_3


@pytest.fixture(scope="module")
def adapter() -> StableDiffusion3Adapter:
    return make_tiny_stable_diffusion_3()


@torch.no_grad()
def inputs_and_original(adapter: StableDiffusion3Adapter) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of three rows, and what diffusers' module predicts for them."""
    latent = torch.randn(3, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = adapter.model_inputs(latent, 0.3, adapter.encode([0, 2, 4]).conditional, 1.0)
    wanted: Tensor = adapter.transformer(**{**inputs, "timestep": inputs["timestep"] * 1000}, return_dict=False)[0]
    return inputs, wanted


@torch.no_grad()
@pytest.mark.parametrize("grid", [(6, 8), (8, 6), (24, 2)])
def test_the_trace_computes_what_diffusers_computes_at_every_size(
    adapter: StableDiffusion3Adapter, grid: tuple[int, int]
) -> None:
    """The patch embedding is a product of matrices instead of a convolution: another order of sums."""
    other = adapter.resized(adapter.image.resized(*grid))
    inputs, wanted = inputs_and_original(other)
    got = other.predict(inputs)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    if min(grid) > 2:
        opened = other.any_size()
        assert torch.equal(opened.module(*opened.positions.values(), *inputs.values()), got)


def test_layers_of_both_attentions_are_quantized(adapter: StableDiffusion3Adapter) -> None:
    layers = set(adapter.quantizable_layers())
    first, last = (f"transformer_blocks.{number}" for number in (0, 1))
    assert {f"{first}.attn2.to_out.0", f"{first}.ff_context.net.2", f"{last}.ff.net.2"} <= layers
    linears = {n for n, m in adapter.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    others = ("norm1", "embed", "norm_out", "proj_out")
    assert all(any(part in name for part in others) for name in linears - layers), linears - layers


def test_images_beyond_the_table_of_positions_are_refused(adapter: StableDiffusion3Adapter) -> None:
    with pytest.raises(MismatchError, match="13 x 3 positions: the model's tables have 12 x 12; choose a smaller size"):
        adapter.resized(adapter.image.resized(26, 6))
