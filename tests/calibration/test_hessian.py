"""Second moments."""

import torch
from torch import Tensor

from adatsq_trt.calibration.hessian import layer_moments, second_moment
from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.execution import InProcess
from adatsq_trt.models.capture import captured


def test_second_moment_is_the_mean_outer_product() -> None:
    inputs = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = sum(torch.outer(row, row) for row in inputs.reshape(-1, 3)) / 10
    torch.testing.assert_close(second_moment(inputs), expected)


def test_second_moment_does_not_depend_on_how_often_a_row_is_seen() -> None:
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(second_moment(torch.cat([inputs] * 3)), second_moment(inputs))


def test_moments_are_sums_over_the_steps(samples: Samples, latents: Tensor) -> None:
    executor, steps = InProcess(), samples.schedule.steps
    layers = dict(list(samples.adapter.quantizable_layers().items())[::3])
    weights = {name: torch.rand(steps, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(layers)}
    found = layer_moments(executor, executor.share(samples), latents, weights, lambda: None)
    assert list(found) == list(layers)
    inputs = []
    for step in range(steps):
        with captured(layers) as capture:
            samples.velocity(latents[step], step)
        inputs.append(dict(capture.inputs))
    for name in layers:
        moments = torch.stack([second_moment(given[name]) for given in inputs])
        torch.testing.assert_close(found[name].weighted, (weights[name][:, None, None] * moments).sum(dim=0))
        torch.testing.assert_close(found[name].plain, moments.mean(dim=0))
        assert torch.equal(found[name].largest, torch.stack([given[name].abs().max() for given in inputs]))
        assert found[name].tokens * len(samples.seeds) == inputs[0][name].shape[:-1].numel()
