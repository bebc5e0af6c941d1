"""The Chroma adapter against diffusers' real class with random weights."""

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from torch import Tensor

from adatsq_trt.models.chroma import ChromaAdapter
from adatsq_trt.models.flux import position_ids
from tests.tiny_chroma import LENGTHS, TEXT_TOKENS, make_tiny_chroma, mask_of


@pytest.fixture(scope="module")
def adapter() -> ChromaAdapter:
    return make_tiny_chroma(blocks=2)


def latents(adapter: ChromaAdapter, batch: int) -> Tensor:
    return torch.randn(batch, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def original(adapter: ChromaAdapter, latent: Tensor, tokens: Tensor, mask: Tensor | None, time: float) -> Tensor:
    """What diffusers' module predicts, called as its pipeline calls it."""
    module = ChromaTransformer2DModel.from_config(adapter.transformer.config).eval()
    module.load_state_dict(adapter.transformer.state_dict())
    if mask is not None:
        mask = torch.cat([mask, torch.ones(latent.shape[:2], dtype=torch.bool)], dim=1)
    output: Tensor = module(
        hidden_states=latent,
        timestep=torch.full((len(latent),), time),
        encoder_hidden_states=tokens,
        txt_ids=torch.zeros(TEXT_TOKENS, 3),
        img_ids=position_ids(adapter.image.grid),
        attention_mask=mask,
        joint_attention_kwargs={},
        return_dict=False,
    )[0]
    return output


@torch.no_grad()
@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (7, 2)])
def test_texts_of_several_lengths_in_one_batch_are_diffusers_own(adapter: ChromaAdapter, grid: tuple[int, int]) -> None:
    """The pipeline's masks are numbers: tokens that fill a text up are seen, at another weight."""
    adapter = adapter.resized(adapter.image.resized(*grid))
    latent, condition = latents(adapter, 3), adapter._encode([0, 1, None])
    inputs = adapter.model_inputs(latent, 0.3, condition, 1.0)
    got = adapter.predict(inputs)
    tokens, mask = condition["encoder_hidden_states"], torch.stack([mask_of(LENGTHS[i]) for i in (0, 1, -1)])
    wanted = original(adapter, latent, tokens, mask, 0.3)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    for row in range(3):
        only = slice(row, row + 1)
        alone = original(adapter, latent[only], tokens[only], mask[only], 0.3)
        torch.testing.assert_close(got[only], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))
    for other in (mask.bool(), None):  # hidden, and as if all were the text's own
        assert (original(adapter, latent, tokens, other, 0.3)[0] - wanted[0]).norm() > 1e-3 * wanted[0].norm()
    opened = adapter.any_size()
    assert torch.equal(opened.module(*opened.positions.values(), *inputs.values()), got)


def test_the_linears_of_all_blocks_are_quantizable_and_no_others(adapter: ChromaAdapter) -> None:
    layers = adapter.quantizable_layers()
    assert len(layers) == 2 * 12 + 2 * 5
    linears = {n for n, m in adapter.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    others = ("distilled_guidance_layer", "embedder", "proj_out")
    assert all(name.startswith(others) or "embedder" in name for name in linears - set(layers)), linears - set(layers)


def test_inputs(adapter: ChromaAdapter) -> None:
    inputs = adapter.guided_inputs(latents(adapter, 2), 0.5, adapter.encode([0, 2]), 2.0)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "hidden_states": (4, 12, 16),
        "encoder_hidden_states": (4, TEXT_TOKENS, 32),
        "attention_mask": (4, TEXT_TOKENS),
        "timestep": (4,),
    }
    assert inputs["attention_mask"].sum(dim=1).tolist() == [10, 13, 2, 2]
