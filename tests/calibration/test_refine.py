"""Weights for rounded inputs: the least squares, and what is summed along a quantized trajectory."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from adatsq_trt.calibration.refine import QuantizedRun, corrected_weight, rounded_moments
from adatsq_trt.calibration.trajectory import Samples, trajectory
from adatsq_trt.formats import FORMATS, Format
from adatsq_trt.models.capture import captured
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.simulated import SimulatedModel
from adatsq_trt.quantizers import fake_quantize_activation, quantize_nearest
from tests.calibration.conftest import STEPS

NAMES = ("w4a4", "w3a4", "w8a8")


def moments_of(x: Tensor, rounded: Tensor) -> Tensor:
    return torch.stack([rounded.mT @ rounded, x.mT @ rounded])


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(400, 24, generator=generator), torch.randn(6, 24, generator=generator)
    return x, fake_quantize_activation(x, FORMATS["w4a3"].activation), weight


def test_the_whole_way_ends_at_the_least_squares() -> None:
    x, rounded, weight = problem()
    wanted = torch.linalg.lstsq(rounded.double(), (x @ weight.T).double()).solution.T
    found = corrected_weight(weight, moments_of(x, rounded), share=1.0)
    # The damping keeps a hundredth of the way back.
    assert (found - wanted).norm() < 0.02 * (weight - wanted).norm()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_a_share_lies_on_the_way_and_errs_less_than_its_begin(share: float) -> None:
    x, rounded, weight = problem()
    moments = moments_of(x, rounded)
    whole, found = (corrected_weight(weight, moments, own) for own in (1.0, share))
    torch.testing.assert_close(found, weight + share * (whole - weight))
    errors = [(rounded @ own.T - x @ weight.T).square().mean() for own in (weight, found, whole)]
    assert errors[0] >= errors[1] > errors[2]


def test_inputs_that_are_not_rounded_leave_the_weight_alone() -> None:
    x, _, weight = problem()
    torch.testing.assert_close(corrected_weight(weight, moments_of(x, x)), weight, rtol=1e-5, atol=1e-6)
    dead = torch.zeros(2, 24, 24)
    torch.testing.assert_close(corrected_weight(weight, dead), weight)


@torch.no_grad()
def test_sums_are_of_the_quantized_trajectory_by_format(samples: Samples) -> None:
    adapter = samples.adapter
    layers = adapter.quantizable_layers()
    weights = {n: {k: quantize_nearest(v.weight.detach(), FORMATS[n]) for k, v in layers.items()} for n in NAMES}
    ratios = {n: torch.full((STEPS, len(layers)), 0.75) for n in ("w4a4", "w3a4")}
    rows: list[Mapping[str, Format]] = [
        {layer: FORMATS[NAMES[(i + step) % 3]] for i, layer in enumerate(layers)} for step in range(STEPS)
    ]
    looked_at, expected = tuple(layers)[:5], dict[tuple[str, str], Tensor]()
    with SimulatedModel(adapter, CandidateWeights(weights, ratios)).installed() as model:
        found = rounded_moments(QuantizedRun(model, samples, tuple(rows), looked_at), slice(0, 2))
        latents = trajectory(samples, lambda step: model.assign(rows[step], step))
        for step in range(STEPS):
            model.assign(rows[step], step)
            with captured({layer: adapter.transformer.get_submodule(layer) for layer in looked_at}) as capture:
                samples.velocity(latents[step], step)
            for layer in looked_at:
                fmt, x = rows[step][layer], capture.inputs[layer]
                ratio = torch.tensor(0.75) if fmt.scaled_activation else None
                rounded = fake_quantize_activation(x, fmt.activation, ratio)
                own = moments_of(x.flatten(0, -2), rounded.flatten(0, -2))
                expected[layer, fmt.name] = expected.get((layer, fmt.name), torch.zeros_like(own)) + own
    assert found.keys() == expected.keys()
    for key, own in expected.items():
        torch.testing.assert_close(found[key], own, rtol=1e-4, atol=1e-4)
