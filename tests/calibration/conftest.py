"""diffusers' own Flux with one block of either kind and random weights."""

import pytest
from torch import Tensor

from adatsq_trt.calibration.trajectory import Samples, trajectory
from adatsq_trt.models.flux import FluxAdapter
from tests.tiny_flux import make_tiny_flux

STEPS = 3


@pytest.fixture(scope="session")
def tiny_flux() -> FluxAdapter:
    adapter = make_tiny_flux(width=16, patches=2, head=16)
    adapter.transformer.requires_grad_(False)
    return adapter


@pytest.fixture(scope="session")
def samples(tiny_flux: FluxAdapter) -> Samples:
    return Samples(tiny_flux, tiny_flux.schedule(STEPS), 2.0, prompts=(3, 8), seeds=(11, 5))


@pytest.fixture(scope="session")
def latents(samples: Samples) -> Tensor:
    return trajectory(samples)
