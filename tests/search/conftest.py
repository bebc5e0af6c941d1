"""diffusers' own Flux with one block of either kind, quantized to nearest, and the benchmark's small problems."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from adatsq_trt.calibration.fisher import projections
from adatsq_trt.calibration.trajectory import Samples, trajectory
from adatsq_trt.formats import FORMATS
from adatsq_trt.models.capture import captured
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.quantizers import quantize_nearest, static_activation_scale
from tests.tiny_flux import make_tiny_flux

STEPS = 3
# fp8 and w8a8 have equal bits.
SET = tuple(FORMATS[name] for name in ("w4a4", "fp8", "w8a8", "fp32"))


@pytest.fixture(scope="session")
def tiny_flux() -> FluxAdapter:
    adapter = make_tiny_flux(width=16, patches=2)
    adapter.transformer.requires_grad_(False)
    return adapter


@pytest.fixture(scope="session")
def samples(tiny_flux: FluxAdapter) -> Samples:
    return Samples(tiny_flux, tiny_flux.schedule(STEPS), 2.0, prompts=(3, 8), seeds=(11, 5))


@pytest.fixture(scope="session")
def latents(samples: Samples) -> Tensor:
    return trajectory(samples)


@pytest.fixture(scope="session")
def start(samples: Samples) -> Tensor:
    return projections(2, samples.adapter.latent_shape, 3, seed=0)


@pytest.fixture(scope="session")
def store(samples: Samples, latents: Tensor) -> CandidateWeights:
    layers = samples.adapter.quantizable_layers()
    largest = []
    for step in range(STEPS):
        with captured(layers) as capture:
            samples.velocity(latents[step], step)
        largest.append(torch.stack([capture.inputs[name].abs().amax() for name in layers]))
    weights = {f.name: {n: quantize_nearest(m.weight, f) for n, m in layers.items()} for f in SET}
    scales = {f.name: static_activation_scale(torch.stack(largest), f.activation) for f in SET if f.static_activation}
    return CandidateWeights(weights, scales)


@pytest.fixture(scope="session")
def regret() -> ModuleType:
    """`benchmarks/search/regret.py`, which is no part of the package."""
    file = Path(__file__).parents[2] / "benchmarks" / "search" / "regret.py"
    spec = importlib.util.spec_from_file_location("benchmarks_search_regret", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
