"""Calibration in parts of the batch is calibration of the batch."""

import pytest
import torch
from torch import Tensor

from adatsq_trt.calibration import units
from adatsq_trt.calibration.fisher import projections, squared_weight_gradient
from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.calibration.units import Measured, backward_sweep, measured_trajectory, squared_gradients
from adatsq_trt.execution import InProcess
from adatsq_trt.solver import State
from tests.sweep import backward_steps

HERE = InProcess()


@pytest.fixture(autouse=True)
def _single_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "SAMPLES_PER_BACKWARD", 1)


def test_the_trajectory(samples: Samples, latents: Tensor) -> None:
    found = list(measured_trajectory(HERE, HERE.share(samples), samples.noise(), samples.schedule.steps))
    torch.testing.assert_close(torch.stack([state.latent for state in found]), latents[1:], rtol=1e-4, atol=1e-5)


def test_the_backward_sweep(samples: Samples, latents: Tensor) -> None:
    start, last = projections(len(samples.seeds), samples.adapter.latent_shape, 2, seed=0), samples.schedule.steps - 1
    common = HERE.share(Measured(samples, None))
    found = list(backward_sweep(HERE, common, squared_gradients, latents, State(start), last))
    expected = list(backward_steps(samples, latents, State(start), last))
    assert [swept.step for swept in found] == [backward.step for backward in expected] == [2, 1, 0]
    for swept, backward in zip(found, expected, strict=True):
        torch.testing.assert_close(swept.adjoint.latent, backward.adjoint.latent, rtol=1e-4, atol=1e-4)
        assert len(swept.measured) == len(samples.seeds)
        for index, name in enumerate(samples.adapter.quantizable_layers()):
            whole = squared_weight_gradient(backward.inputs[name], backward.gradients[name])
            torch.testing.assert_close(torch.cat(swept.measured, dim=2)[index], whole, rtol=1e-3, atol=1e-4)
