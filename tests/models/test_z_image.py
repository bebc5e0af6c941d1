"""The Z-Image adapter against diffusers' real class with random weights."""

import copy

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from adatsq_trt.errors import MismatchError
from adatsq_trt.models.z_image import ZImageAdapter, ZImageTrace
from tests.tiny_z_image import LENGTHS, make_tiny_z_image, make_z_image_of_several_lengths


@pytest.fixture(scope="module")
def adapter() -> ZImageAdapter:
    return make_tiny_z_image()


def original(adapter: ZImageAdapter, latent: Tensor, captions: list[Tensor], time: float) -> Tensor:
    """What diffusers' module, in its own arithmetic and with its own padding, predicts, turned to a velocity."""
    weights = adapter.transformer.state_dict()
    module = ZImageTransformer2DModel.from_config(adapter.transformer.config).eval()
    module.load_state_dict(weights)
    images = [image[:, None] for image in latent]
    output = module(images, torch.full((len(images),), 1 - time), captions, return_dict=False)[0]
    return -torch.stack(output)[:, :, 0]


def latents(adapter: ZImageAdapter, batch: int) -> Tensor:
    return torch.randn(batch, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_images_whose_tokens_need_no_padding(adapter: ZImageAdapter) -> None:
    """8 x 4 tokens are a multiple of 32, as those of most real sizes are."""
    generator = torch.Generator().manual_seed(1)
    latent, caption = torch.randn(1, 4, 16, 8, generator=generator), torch.randn(32, 32, generator=generator)
    got = ZImageTrace(adapter.transformer, (4, 16, 8), 32)(latent, caption[None], torch.tensor([0.3]))
    wanted = original(adapter, latent, [caption], 0.3)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(9, 9, 9), (1, 20, 32)])
def test_the_trace_module_computes_what_diffusers_computes(adapter: ZImageAdapter, lengths: tuple[int, ...]) -> None:
    """The same operations on the same numbers, but for a complex product that is written out: some units in the last
    place of a normalized activation, so a relative 1e-5 of the output is generous."""
    generator = torch.Generator().manual_seed(1)
    captions = [torch.randn(length, 32, generator=generator) for length in lengths]
    features = torch.stack([torch.cat([c, torch.zeros(32 - len(c), 32)]) for c in captions])
    inputs = adapter.model_inputs(latents(adapter, 3), 0.3, {"encoder_hidden_states": features}, 1.0)
    wanted = original(adapter, latents(adapter, 3), captions, 0.3)
    torch.testing.assert_close(adapter.predict(inputs), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def assert_alone(adapter: ZImageAdapter, rows: tuple[int | None, ...]) -> None:
    """A batch of prompts gives what diffusers gives for each of them alone."""
    latent, features = latents(adapter, len(rows)), adapter._encode(rows)
    got = adapter.predict(adapter.model_inputs(latent, 0.3, features, 1.0))
    for row, prompt in enumerate(rows):
        own = features["encoder_hidden_states"][row, : LENGTHS[-1 if prompt is None else prompt]]
        wanted = original(adapter, latent[row : row + 1], [own], 0.3)
        torch.testing.assert_close(got[row : row + 1], wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
def test_a_caption_does_not_see_how_long_the_others_are() -> None:
    """Of 9, 33, 64, 12, 32 and, for the empty prompt, 5 tokens: padding and the image's positions are its own."""
    assert_alone(make_z_image_of_several_lengths(), (0, 1, 2, 3, 4, None))


@torch.no_grad()
def test_images_with_pad_tokens_and_captions_of_several_lengths() -> None:
    adapter = make_z_image_of_several_lengths()
    assert_alone(adapter.resized(adapter.image.resized(6, 10)), (2, 0))


@torch.no_grad()
def test_a_caption_without_tokens() -> None:
    """As a text encoder may give for the empty prompt; diffusers takes one beside others."""
    adapter = make_z_image_of_several_lengths()
    features = adapter._encode([2, None])["encoder_hidden_states"]
    features[1] = 0
    inputs = adapter.model_inputs(latents(adapter, 2), 0.3, {"encoder_hidden_states": features}, 1.0)
    wanted = original(adapter, latents(adapter, 2), [features[0], features[1, :0]], 0.3)
    torch.testing.assert_close(adapter.predict(inputs), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
def test_both_pad_tokens_matter(adapter: ZImageAdapter) -> None:
    """So the comparison above would see them swapped or left out."""
    inputs = adapter.model_inputs(latents(adapter, 1), 0.3, adapter.encode([0]).conditional, 1.0)
    before = adapter.predict(inputs)
    changed = copy.deepcopy(adapter.trace_module())
    for name in ("x_pad_token", "cap_pad_token"):
        kept = getattr(changed.transformer, name).clone()
        getattr(changed.transformer, name).zero_()
        assert (changed(**inputs) - before).abs().max() > 1e-3
        getattr(changed.transformer, name).copy_(kept)


@torch.no_grad()
def test_diffusers_own_call_still_works(adapter: ZImageAdapter) -> None:
    """The attention processor that the adapter sets takes complex rotations as before."""
    caption = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    latent = latents(adapter, 1)
    got = adapter.transformer([latent[0][:, None]], torch.tensor([0.7]), [caption], return_dict=False)[0][0]
    assert torch.equal(-got[None, :, 0], original(adapter, latent, [caption], 0.3))


def test_the_linears_of_all_blocks_are_quantizable_and_no_others(adapter: ZImageAdapter) -> None:
    layers = adapter.quantizable_layers()
    assert adapter.blocks() == ("noise_refiner.0", "context_refiner.0", "layers.0")
    assert len(layers) == 3 * 7
    linears = {n for n, m in adapter.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    left = linears - set(layers)
    assert all(any(part in name for part in ("embedder", "adaLN", "all_final_layer")) for name in left), left


def test_guidance_has_two_branches_unless_it_is_distilled(adapter: ZImageAdapter) -> None:
    inputs = adapter.guided_inputs(latents(adapter, 2), 0.5, adapter.encode([0, 2]), 2.0)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "hidden_states": (4, 4, 8, 8),
        "encoder_hidden_states": (4, 32, 32),
        "timestep": (4,),
    }
    assert adapter.takes_guidance
    distilled = make_tiny_z_image(guidance_distilled=True)
    assert distilled.encode([1]).unconditional is None
    assert not distilled.takes_guidance


def test_the_schedule_is_that_of_the_pipeline(adapter: ZImageAdapter) -> None:
    scheduler = copy.deepcopy(adapter.scheduler)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 0.25, 4).tolist(), mu=0.5)
    schedule = adapter.schedule(4)
    assert schedule.timesteps == pytest.approx(scheduler.timesteps.tolist())
    assert schedule.sigmas == pytest.approx(scheduler.sigmas.tolist())


def test_planes_decode_to_the_pixels_that_they_were_made_of(adapter: ZImageAdapter) -> None:
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    planes = torch.nn.functional.pixel_unshuffle(images * 2 - 1, 2)
    assert planes.shape[1:] == adapter.latent_shape
    torch.testing.assert_close(adapter.decode(planes), images.permute(0, 2, 3, 1))


def test_captions_beyond_the_table_of_positions_are_refused(adapter: ZImageAdapter) -> None:
    with pytest.raises(MismatchError, match=r"captions of 64 tokens.*room for 62; shorten the longest of the prompts"):
        ZImageTrace(adapter.transformer, (4, 16, 8), 64)
