"""The Qwen-Image adapter against diffusers' real class with random weights."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from adatsq_trt.errors import MismatchError
from adatsq_trt.models.qwen_image import QwenImageAdapter, QwenImageTrace
from tests.tiny_qwen_image import LENGTHS, make_tiny_qwen_image


@pytest.fixture(scope="module")
def adapter() -> QwenImageAdapter:
    return make_tiny_qwen_image()


@torch.no_grad()
def original(adapter: QwenImageAdapter, latent: Tensor, texts: list[Tensor], time: float) -> Tensor:
    """What diffusers' module predicts in its own arithmetic, with a mask where texts differ in length."""
    module = QwenImageTransformer2DModel.from_config(adapter.transformer.config).eval()
    module.load_state_dict(adapter.transformer.state_dict())
    longest = max(map(len, texts))
    tokens = torch.stack([torch.cat([text, torch.zeros(longest - len(text), text.shape[1])]) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    rows = len(texts)
    output: Tensor = module(
        latent,
        tokens,
        None if mask.all() else mask,
        torch.full((rows,), time),
        [[(1, *adapter.image.grid)]] * rows,
        return_dict=False,
    )[0]
    return output


def latents(adapter: QwenImageAdapter, batch: int) -> Tensor:
    return torch.randn(batch, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))


def texts(adapter: QwenImageAdapter) -> tuple[Tensor, list[Tensor]]:
    """Of two prompts and the empty one: as the graph takes them, and as they are."""
    tokens = adapter._encode([0, 1, None])["encoder_hidden_states"]
    return tokens, [row[:length] for row, length in zip(tokens, (*LENGTHS[:2], LENGTHS[-1]), strict=True)]


@torch.no_grad()
def test_texts_of_several_lengths_in_one_batch_are_diffusers_own(adapter: QwenImageAdapter) -> None:
    """Together with diffusers' mask, and each alone; complex products are written out."""
    latent, (tokens, own) = latents(adapter, 3), texts(adapter)
    got = adapter.predict(adapter.model_inputs(latent, 0.3, {"encoder_hidden_states": tokens}, 1.0))
    wanted = original(adapter, latent, own, 0.3)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    for row, text in enumerate(own):
        alone = original(adapter, latent[row : row + 1], [text], 0.3)
        torch.testing.assert_close(got[row : row + 1], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))
    seen = original(adapter, latent, list(tokens), 0.3)  # zeros that are attended to make another picture
    assert (seen[0] - wanted[0]).norm() > 1e-3 * wanted[0].norm()


@torch.no_grad()
def test_images_of_another_shape_and_of_any_size(adapter: QwenImageAdapter) -> None:
    """Rows and columns change places; odd sides are halved downwards, and the text's positions begin behind."""
    for rows, columns in ((4, 3), (7, 2), (5, 5)):
        other = adapter.resized(adapter.image.resized(rows, columns))
        latent, (tokens, own) = latents(other, 3), texts(other)
        inputs = other.model_inputs(latent, 0.7, {"encoder_hidden_states": tokens}, 1.0)
        wanted = original(other, latent, own, 0.7)
        torch.testing.assert_close(other.predict(inputs), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        opened = other.any_size()
        assert torch.equal(opened.module(*opened.positions.values(), *inputs.values()), other.predict(inputs))


@torch.no_grad()
def test_diffusers_own_call_still_works(adapter: QwenImageAdapter) -> None:
    """The attention processor that the adapter sets takes complex rotations as before."""
    latent, (tokens, own) = latents(adapter, 1), texts(adapter)
    adapter.trace_module()
    grids = [[(1, *adapter.image.grid)]]
    got = adapter.transformer(latent, tokens[1:2], None, torch.tensor([0.3]), grids, return_dict=False)[0]
    assert torch.equal(got, original(adapter, latent, own[1:2], 0.3))


def test_layers_that_make_only_the_text_behind_the_last_block_are_not_quantized(adapter: QwenImageAdapter) -> None:
    """What they give reaches no output: its gradients are none."""
    layers = adapter.quantizable_layers()
    assert len(layers) == 2 * 12 - 4
    inputs = adapter.model_inputs(latents(adapter, 1), 0.5, adapter.encode([0]).conditional, 1.0)
    adapter.transformer.requires_grad_(True)
    adapter.predict(inputs).sum().backward()
    linears = {n: m for n, m in adapter.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    without = {name for name, layer in linears.items() if layer.weight.grad is None or not layer.weight.grad.any()}
    assert without == {
        n for n in linears if n not in layers and n.startswith("transformer_blocks.1.") and "mod" not in n
    }
    left = set(linears) - set(layers) - without
    assert all(
        any(part in name for part in ("_mod", "img_in", "txt_in", "time_text", "norm_out", "proj_out")) for name in left
    )
    adapter.transformer.requires_grad_(False)


@torch.no_grad()
def test_guidance_keeps_the_norm_of_every_tokens_conditional_prediction(adapter: QwenImageAdapter) -> None:
    """As QwenImagePipeline writes it."""
    conditioning, latent = adapter.encode([0, 1]), latents(adapter, 2)
    rows = adapter.predict(adapter.guided_inputs(latent, 0.5, conditioning, 4.0))
    noise_pred, neg_noise_pred = rows.chunk(2)
    comb_pred = neg_noise_pred + 4.0 * (noise_pred - neg_noise_pred)
    cond_norm = torch.norm(noise_pred, dim=-1, keepdim=True)
    noise_norm = torch.norm(comb_pred, dim=-1, keepdim=True)
    wanted = comb_pred * (cond_norm / noise_norm)
    torch.testing.assert_close(adapter.velocity(latent, 0.5, conditioning, 4.0), wanted, rtol=1e-5, atol=1e-6)
    assert (comb_pred - wanted).norm() > 1e-2 * wanted.norm()


def test_texts_beyond_the_table_of_positions_are_refused(adapter: QwenImageAdapter) -> None:
    with pytest.raises(
        MismatchError, match=r"prompts of 4095 tokens beside an image of 3 x 4: .* room for 4094; shorten"
    ):
        QwenImageTrace(adapter.transformer, (3, 4), 4095)
    with pytest.raises(MismatchError, match="4097 x 1 positions"):
        QwenImageTrace(adapter.transformer, (4097, 1), 9)
