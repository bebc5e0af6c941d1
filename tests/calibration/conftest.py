"""diffusers' own Flux with one block of either kind and random weights."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn

from adatsq_trt.calibration.trajectory import Samples, trajectory
from adatsq_trt.models.flux import FluxAdapter

STEPS = 3


@pytest.fixture(scope="session")
def tiny_flux() -> FluxAdapter:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(4, 6, 6),
        )
        adapter = FluxAdapter(transformer, nn.Embedding(11, 16), FlowMatchEulerDiscreteScheduler(), 4)
    adapter.transformer.requires_grad_(False)
    return adapter


@pytest.fixture(scope="session")
def samples(tiny_flux: FluxAdapter) -> Samples:
    return Samples(tiny_flux, tiny_flux.schedule(STEPS), 2.0, prompts=(3, 8), seeds=(11, 5))


@pytest.fixture(scope="session")
def latents(samples: Samples) -> Tensor:
    return trajectory(samples)
