"""The LTX-Video adapter against diffusers' real class with random weights."""

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from torch import Tensor

from adatsq_trt.models.ltx import LTXAdapter
from tests.tiny_ltx import CHANNELS, LENGTHS, TEXT_TOKENS, make_tiny_ltx


@pytest.fixture(scope="module")
def adapter() -> LTXAdapter:
    return make_tiny_ltx()


def latents(adapter: LTXAdapter, batch: int) -> Tensor:
    return torch.randn(batch, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def original(adapter: LTXAdapter, latent: Tensor, tokens: Tensor, mask: Tensor, time: float, rate: float) -> Tensor:
    """What diffusers' module predicts, called as its pipeline calls it."""
    module = LTXVideoTransformer3DModel.from_config(adapter.transformer.config).eval()
    module.load_state_dict(adapter.transformer.state_dict())
    rows, columns = adapter.image.grid
    output: Tensor = module(
        hidden_states=latent,
        encoder_hidden_states=tokens,
        timestep=torch.full((len(latent),), 1000 * time),
        encoder_attention_mask=mask,
        num_frames=adapter.image.frames,
        height=rows,
        width=columns,
        rope_interpolation_scale=(8 / rate, 32, 32),
        return_dict=False,
    )[0]
    return output


@torch.no_grad()
@pytest.mark.parametrize("size", [(3, 2, 2), (2, 3, 3), (5, 4, 1)])
def test_texts_of_several_lengths_in_one_batch_are_diffusers_own(
    adapter: LTXAdapter, size: tuple[int, int, int]
) -> None:
    """Positions are those of 25 frames in a second, of every size."""
    adapter = adapter.resized(adapter.image.resized(*size))
    latent, condition = latents(adapter, 3), adapter._encode([0, 1, None])
    inputs = adapter.model_inputs(latent, 0.3, condition, 1.0)
    got = adapter.predict(inputs)
    tokens, mask = condition["encoder_hidden_states"], condition["encoder_attention_mask"].bool()
    wanted = original(adapter, latent, tokens, mask, 0.3, 25)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    for row, length in enumerate((*LENGTHS[:2], LENGTHS[-1])):  # alone, without what fills it up
        only = slice(row, row + 1)
        alone = original(adapter, latent[only], tokens[only, :length], mask[only, :length], 0.3, 25)
        torch.testing.assert_close(got[only], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))
    seen = original(adapter, latent, tokens, torch.ones_like(mask), 0.3, 25)
    slower = original(adapter, latent, tokens, mask, 0.3, 24)
    assert (seen[0] - wanted[0]).norm() > 1e-3 * wanted[0].norm()
    assert size[2] == 1 or (slower - wanted).norm() > 1e-4 * wanted.norm()
    opened = adapter.any_size()
    assert torch.equal(opened.module(*opened.positions.values(), *inputs.values()), got)


@torch.no_grad()
def test_diffusers_own_call_still_works(adapter: LTXAdapter) -> None:
    """The attention processor that the adapter sets takes diffusers' masks as before."""
    latent, condition = latents(adapter, 1), adapter._encode([0])
    tokens, mask = condition["encoder_hidden_states"], condition["encoder_attention_mask"]
    size = (adapter.image.frames, *adapter.image.grid, (8 / 25, 32, 32))
    got = adapter.transformer(latent, tokens, torch.tensor([300.0]), mask, *size, return_dict=False)[0]
    torch.testing.assert_close(got, original(adapter, latent, tokens, mask, 0.3, 25), rtol=0, atol=1e-6)


def test_the_linears_of_all_blocks_are_quantizable_and_no_others(adapter: LTXAdapter) -> None:
    layers = adapter.quantizable_layers()
    assert adapter.blocks() == ("transformer_blocks.0", "transformer_blocks.1")
    assert len(layers) == 2 * 10
    linears = {n for n, m in adapter.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    others = ("time_embed", "caption_projection", "proj_in", "proj_out")
    assert all(name.startswith(others) for name in linears - set(layers)), linears - set(layers)


def test_inputs(adapter: LTXAdapter) -> None:
    inputs = adapter.guided_inputs(latents(adapter, 2), 0.5, adapter.encode([0, 2]), 2.0)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "hidden_states": (4, 12, CHANNELS),
        "encoder_hidden_states": (4, TEXT_TOKENS, 32),
        "encoder_attention_mask": (4, TEXT_TOKENS),
        "timestep": (4,),
    }
    assert inputs["encoder_attention_mask"].sum(dim=1).tolist() == [9, 12, 1, 1]
