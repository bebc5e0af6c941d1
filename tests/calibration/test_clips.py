"""Ratios that clip: the criterion against brute force, and the choice."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adatsq_trt.calibration.clips import RATIOS, ClipSearch, best_ratios, clip_errors, clipped_grids, scale_with
from adatsq_trt.calibration.fisher import LayerGradients, backward_step, projections
from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.calibration.units import Measured
from adatsq_trt.formats import FORMATS, format_named, resolve_formats
from adatsq_trt.quantizers import fake_quantize_activation, static_activation_scale
from adatsq_trt.solver import State

STEP = 1
GRIDS = clipped_grids(resolve_formats("w4a4,w3a4,w4a3g16,w8a8s,w8a8,w4a8,nvfp4,fp8,int4wo"))


@pytest.fixture(scope="module")
def seen(samples: Samples, latents: Tensor) -> Iterator[LayerGradients]:
    found: list[LayerGradients] = []
    adjoint = projections(len(samples.seeds), samples.adapter.latent_shape, 2, seed=0)
    backward_step(samples, latents[STEP], State(adjoint), STEP, found.append)
    return found[0]


@pytest.fixture(scope="module")
def largest(samples: Samples, seen: LayerGradients) -> Tensor:
    """The same at every step."""
    return torch.stack([seen.inputs[n].abs().amax() for n in samples.adapter.quantizable_layers()]).expand(3, -1)


def test_integers_are_clipped_once_for_each_distinct_grid() -> None:
    assert set(GRIDS) == {format_named(name).activation for name in ("w4a4", "w4a3g16")}
    assert len(GRIDS) == 2


def test_what_a_grid_is_given_is_a_ratio_or_a_static_scale() -> None:
    largest = torch.tensor([2.0, 0.5])
    assert scale_with(0.75, largest, FORMATS["w4a4"].activation).tolist() == [0.75, 0.75]
    for name in ("w8a8s", "fp8", "nvfp4"):
        grid = FORMATS[name].activation
        assert torch.equal(scale_with(0.75, largest, grid), static_activation_scale(0.75 * largest, grid))
        assert torch.equal(scale_with(torch.ones(2), largest, grid), static_activation_scale(largest, grid))


def test_the_criterion_is_the_squared_error_of_the_picture_token_by_token(
    samples: Samples, seen: LayerGradients, largest: Tensor
) -> None:
    errors = clip_errors(Measured(samples, ClipSearch(GRIDS, largest, {})), seen)
    for layer, linear in samples.adapter.quantizable_layers().items():
        x, gradients = seen.inputs[layer], seen.gradients[layer]
        assert errors[layer].shape == (len(GRIDS), len(RATIOS))
        for i, grid in enumerate(GRIDS):
            for j in (0, 3, len(RATIOS) - 1):
                change = (fake_quantize_activation(x, grid, torch.tensor(RATIOS[j])) - x) @ linear.weight.T
                expected = (gradients * change).sum(dim=-1).double().square().sum()
                torch.testing.assert_close(errors[layer][i, j], expected, rtol=1e-3, atol=1e-12)


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=len(RATIOS), max_size=len(RATIOS)), min_size=3, max_size=3),
)
def test_a_chosen_ratio_is_never_worse_than_none_by_its_own_criterion(values: list[list[float]]) -> None:
    errors = torch.tensor(values, dtype=torch.float64)[None, :, None]  # one step, three layers, one grid
    chosen = best_ratios(errors, [[0], [1, 2]])
    assert chosen.shape == (1, 1, 3)
    assert chosen[0, 0, 1] == chosen[0, 0, 2]  # they are given the same tensor
    for group in ([0], [1, 2]):
        sums = errors[0, group, 0].sum(dim=0)
        assert sums[RATIOS.index(float(chosen[0, 0, group[0]]))] == sums.min() <= sums[0]


def test_equal_criteria_keep_the_whole_magnitude() -> None:
    assert best_ratios(torch.zeros(2, 1, 1, len(RATIOS), dtype=torch.float64), [[0]]).unique().tolist() == [1.0]
