"""The Wan adapter against diffusers' real class with random weights."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor

from adatsq_trt.errors import UnsupportedFormatError, UserError
from adatsq_trt.image import ImageShape
from adatsq_trt.models.wan import WanAdapter, WanTrace
from tests.tiny_wan import make_tiny_wan


@pytest.fixture(scope="module")
def adapter() -> WanAdapter:
    return make_tiny_wan()


def latents(adapter: WanAdapter, batch: int) -> Tensor:
    return torch.randn(batch, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(4, 3, 4, 4), (4, 2, 6, 10)])
def test_the_trace_module_computes_what_diffusers_computes(adapter: WanAdapter, shape: tuple[int, ...]) -> None:
    """The same operations on the same numbers, stacked instead of assigned; other fused kernels may round otherwise by
    some units in the last place of a normalized activation."""
    module = WanTransformer3DModel.from_config(adapter.transformer.config).eval()
    module.load_state_dict(adapter.transformer.state_dict())
    generator = torch.Generator().manual_seed(1)
    latent, text = torch.randn(2, *shape, generator=generator), torch.randn(2, 9, 32, generator=generator)
    wanted = module(latent, torch.full((2,), 300.0), text, return_dict=False)[0]
    got = WanTrace(adapter.transformer, shape)(latent, text, torch.full((2,), 0.3))
    assert wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_the_linears_of_all_blocks_are_quantizable_and_no_others(adapter: WanAdapter) -> None:
    layers = adapter.quantizable_layers()
    assert adapter.blocks() == ("blocks.0", "blocks.1")
    assert len(layers) == 2 * 10
    linears = {n for n, m in adapter.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    left = linears - set(layers)
    assert all("condition_embedder" in name or name == "proj_out" for name in left), left


def test_inputs(adapter: WanAdapter) -> None:
    inputs = adapter.guided_inputs(latents(adapter, 2), 0.5, adapter.encode([0, 2]), 2.0)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "hidden_states": (4, 4, 3, 4, 4),
        "encoder_hidden_states": (4, 9, 32),
        "timestep": (4,),
    }


def test_the_schedule_is_that_of_a_pipeline_with_an_euler_scheduler(adapter: WanAdapter) -> None:
    """WanPipeline passes the number of steps and nothing else."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    schedule = adapter.schedule(5)
    assert schedule.timesteps == pytest.approx(scheduler.timesteps.tolist())
    assert schedule.sigmas == pytest.approx(scheduler.sigmas.tolist())


def test_a_shift_that_depends_on_the_size_is_refused(adapter: WanAdapter) -> None:
    scheduler, video = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), ImageShape(4, 1, frames=3)
    with pytest.raises(UserError, match="expected a fixed shift"):
        WanAdapter(adapter.transformer, adapter.encoder, scheduler, video).schedule(4)


def test_image_to_video_is_refused() -> None:
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        image_dim=16,
        added_kv_proj_dim=24,
    )
    with pytest.raises(UnsupportedFormatError, match="expected one that takes text only"):
        WanTrace(transformer, (4, 3, 4, 4))


def test_videos_decode_frame_by_frame(adapter: WanAdapter) -> None:
    clips = torch.rand(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    planes = torch.nn.functional.pixel_unshuffle(clips * 2 - 1, 2).transpose(1, 2)
    assert planes.shape[1:] == adapter.latent_shape
    torch.testing.assert_close(adapter.decode(planes), clips.permute(0, 1, 3, 4, 2))
