"""The HunyuanVideo-1.5 adapter against diffusers' real class with random weights."""

from pathlib import Path

import pytest
import torch
from diffusers import ClassifierFreeGuidance, HunyuanVideo15Transformer3DModel
from torch import Tensor

from adatsq_trt.models.family import Canvas
from adatsq_trt.models.hunyuan_video_15 import HunyuanVideo15Adapter, HunyuanVideo15Family
from tests.tiny_hunyuan_video import GLYPHS, LENGTHS, make_tiny_hunyuan_video

TEXT, GLYPH = "encoder_hidden_states", "encoder_hidden_states_2"


@pytest.fixture(scope="module")
def adapter() -> HunyuanVideo15Adapter:
    return make_tiny_hunyuan_video()


@torch.no_grad()
def original(adapter: HunyuanVideo15Adapter, latent: Tensor, condition: dict[str, Tensor], rows: list[int]) -> Tensor:
    """What diffusers' module predicts at time 0.3 for prompts of these rows, called as the pipeline calls it.

    Rubbish stands where the masks say that there is no token.
    """
    module = HunyuanVideo15Transformer3DModel.from_config(adapter.transformer.config).eval()
    module.load_state_dict(adapter.transformer.state_dict())
    arguments = {}
    for name, lengths in ((TEXT, LENGTHS), (GLYPH, GLYPHS)):
        mask = torch.stack([(torch.arange(condition[name].shape[1]) < lengths[row]).float() for row in rows])
        arguments[name] = torch.where(mask[..., None] > 0, condition[name], 7.0)
        arguments[name.replace("hidden_states", "attention_mask")] = mask
    zeros = torch.zeros(len(rows), adapter.transformer.config.in_channels - latent.shape[1], *latent.shape[2:])
    images = torch.zeros(len(rows), 5, adapter.transformer.config.image_embed_dim)
    output: Tensor = module(
        hidden_states=torch.cat([latent, zeros], dim=1),
        image_embeds=images,
        timestep=torch.full((len(rows),), 300.0),
        return_dict=False,
        **arguments,
    )[0]
    return output


def latents(adapter: HunyuanVideo15Adapter, batch: int) -> Tensor:
    return torch.randn(batch, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))


def assert_near(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
def test_texts_of_several_lengths_in_one_batch_are_diffusers_own(adapter: HunyuanVideo15Adapter) -> None:
    """Diffusers sorts the tokens by its masks; with and without glyphs, together and each alone."""
    latent, rows = latents(adapter, 4), [0, 1, 2, 3]
    condition = adapter._encode([0, 1, 2, None])
    got = adapter.predict(adapter.model_inputs(latent, 0.3, condition, 1.0))
    assert_near(got, original(adapter, latent, condition, rows))
    for row in rows:
        own = slice(row, row + 1)
        assert_near(got[own], original(adapter, latent[own], {n: x[own] for n, x in condition.items()}, [row]))
    for name, row in ((TEXT, 1), (GLYPH, 2)):  # both texts are seen, to their ends
        changed = {**condition, name: condition[name].clone()}
        changed[name][row, {TEXT: LENGTHS, GLYPH: GLYPHS}[name][row] - 1] *= -1
        other = adapter.predict(adapter.model_inputs(latent, 0.3, changed, 1.0))
        assert torch.equal(other[0], got[0])
        assert (other[row] - got[row]).norm() > 1e-4 * got[row].norm()


@torch.no_grad()
def test_videos_of_another_shape_and_of_any_size(adapter: HunyuanVideo15Adapter) -> None:
    for frames, rows, columns in ((3, 4, 3), (2, 5, 5)):
        other = adapter.resized(adapter.image.resized(rows, columns, frames))
        latent, condition = latents(other, 2), adapter._encode([0, 1])
        inputs = other.model_inputs(latent, 0.3, condition, 1.0)
        assert_near(other.predict(inputs), original(other, latent, condition, [0, 1]))
        opened = other.any_size()
        assert torch.equal(opened.module(*opened.positions.values(), *inputs.values()), other.predict(inputs))


def test_layers_that_make_only_the_text_behind_the_last_block_are_not_quantized(adapter: HunyuanVideo15Adapter) -> None:
    """What they give reaches no output: their gradients are none. All others of the blocks are quantized."""
    inputs = adapter.model_inputs(latents(adapter, 1), 0.5, adapter.encode([0]).conditional, 1.0)
    adapter.transformer.requires_grad_(True)
    adapter.predict(inputs).sum().backward()
    linears = {
        f"transformer_blocks.{name}": layer
        for name, layer in adapter.transformer.transformer_blocks.named_modules()
        if isinstance(layer, torch.nn.Linear) and "norm" not in name
    }
    read = {name for name, layer in linears.items() if layer.weight.grad is not None and layer.weight.grad.any()}
    adapter.transformer.requires_grad_(False)
    assert set(adapter.quantizable_layers()) == read
    assert len(read) == 2 * 12 - 4


def test_scale_and_size_are_the_pipelines(tmp_path: Path) -> None:
    """Of its guider, which may guide nothing, and of the size that the transformer was trained at."""
    family = HunyuanVideo15Family()
    for enabled, scale in ((True, 6.5), (False, 1.0)):
        ClassifierFreeGuidance(guidance_scale=6.5, enabled=enabled).save_pretrained(tmp_path / "guider")
        assert family.pipeline_defaults({}, tmp_path) == (50, scale)
    assert family.pipeline_canvas({"target_size": 640}) == Canvas(480, 848, 121)
    assert family.pipeline_canvas({"target_size": 960}) == Canvas(720, 1280, 121)
