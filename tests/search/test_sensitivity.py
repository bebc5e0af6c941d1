"""Predicted against actual changes of the final picture."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from adatsq_trt.calibration.trajectory import Samples, trajectory
from adatsq_trt.calibration.transforms.make import make_transforms
from adatsq_trt.calibration.transforms.statistics import measure_groups
from adatsq_trt.formats import FORMATS, Format
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.simulated import SimulatedModel
from adatsq_trt.quantizers import QuantizedWeight
from adatsq_trt.search.sensitivity import SMOOTHED_STEPS, Sensitivity, assemble, join_parts, layer_contributions
from adatsq_trt.solver import State
from adatsq_trt.transforms import IDENTITY
from tests.sweep import BackwardStep, backward_steps

SET = tuple(FORMATS[name] for name in ("w4a4", "fp8", "w8a8", "fp32"))
STEPS = 3


def all_contributions(
    backward: BackwardStep, samples: Samples, formats: Sequence[Format], store: CandidateWeights
) -> Tensor:
    """Of a step: [formats, layers, rows]."""
    found = layer_contributions(backward, samples.adapter, formats, store)
    return torch.stack([found[layer] for layer in samples.adapter.quantizable_layers()], dim=1)


@pytest.fixture(scope="module")
def sensitivity(samples: Samples, latents: Tensor, start: Tensor, store: CandidateWeights) -> Sensitivity:
    sweep = backward_steps(samples, latents, State(start), STEPS - 1)
    parts = {b.step: all_contributions(b, samples, SET, store) for b in sweep}
    return assemble(SET, parts, latents[0, 0].numel(), 2)


def actual_change(
    samples: Samples, latents: Tensor, start: Tensor, store: CandidateWeights, choose: dict[tuple[int, str], Format]
) -> Tensor:
    """uᵀ (x_T' - x_T) for every row, scaled as the contributions are."""
    model = SimulatedModel(samples.adapter, store)
    exact = FORMATS["fp32"]
    with model.installed():
        changed = trajectory(
            samples,
            lambda step: model.assign({layer: choose.get((step, layer), exact) for layer in model.layers}, step),
        )
    rows = (start * (changed[-1] - latents[-1])).sum(dim=(2, 3)).flatten()
    return rows / math.sqrt(len(rows) * latents[0, 0].numel())


def relative(predicted: Tensor, actual: Tensor) -> float:
    return float((predicted - actual).norm() / actual.norm())


@pytest.mark.parametrize("transform", [None, "smooth", "balance-low-rank"])
def test_contributions_of_all_steps_and_layers_add_up_to_the_change_of_the_picture(
    samples: Samples, latents: Tensor, start: Tensor, transform: str | None
) -> None:
    """For weights that are a little off and exact activations, whose rounding would depend on what comes before."""
    generator, exact = torch.Generator().manual_seed(0), FORMATS["fp32"]
    transforms = {} if transform is None else make_transforms(transform, measure_groups(samples, latents))
    off = {}
    for name, linear in samples.adapter.quantizable_layers().items():
        weight = transforms.get(name, IDENTITY).rounded_weight(linear.weight)
        off[name] = QuantizedWeight(weight + 1e-3 * torch.randn(weight.shape, generator=generator))
    store = CandidateWeights({exact.name: off}, {}, transforms)
    sweep = backward_steps(samples, latents, State(start), STEPS - 1)
    parts = {b.step: all_contributions(b, samples, [exact], store) for b in sweep}
    sensitivity = assemble([exact], parts, latents[0, 0].numel(), 2)
    actual = actual_change(samples, latents, start, store, {})
    assert relative(sensitivity.contributions.sum(dim=(0, 1, 2)), actual) < 0.03


@pytest.mark.parametrize("name", ["w8a8", "fp8"])
def test_predicted_errors_of_whole_policies_have_the_right_size(
    samples: Samples, latents: Tensor, start: Tensor, store: CandidateWeights, sensitivity: Sensitivity, name: str
) -> None:
    layers = tuple(samples.adapter.quantizable_layers())
    choose = {(step, layer): FORMATS[name] for step in range(STEPS) for layer in layers}
    actual = float(actual_change(samples, latents, start, store, choose).square().sum())
    predicted = float(sensitivity.contributions[SET.index(FORMATS[name])].sum(dim=(0, 1)).square().sum())
    assert actual / 3 < predicted < actual * 3


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("index", [0, 5, 11, 16])
def test_a_single_contribution_is_the_change_that_it_makes(
    samples: Samples,
    latents: Tensor,
    start: Tensor,
    store: CandidateWeights,
    sensitivity: Sensitivity,
    step: int,
    index: int,
) -> None:
    """In fp8: w8a8 changes some pictures by 1e-7, which float32 rounds to something else on every processor."""
    layer, fmt = tuple(samples.adapter.quantizable_layers())[index], FORMATS["fp8"]
    actual = actual_change(samples, latents, start, store, {(step, layer): fmt})
    assert relative(sensitivity.contributions[SET.index(fmt), step, index], actual) < 0.1


def test_exact_formats_contribute_nothing(sensitivity: Sensitivity) -> None:
    assert sensitivity.contributions[3].abs().max() == 0
    errors = sensitivity.errors
    assert errors.shape == (4, STEPS, 17)
    assert errors[0].sum() > 10 * errors[2].sum()


def test_squares_of_rows_add_up_to_the_mean_square_of_the_latent() -> None:
    """With enough projections: E_u[(uᵀ δ)²] is |δ|²."""
    generator = torch.Generator().manual_seed(0)
    change, u = torch.randn(5, 8, generator=generator), torch.randn(4000, 5, 8, generator=generator)
    rows = (u * change).sum(dim=-1).flatten()
    sensitivity = assemble((FORMATS["w4a4"],), {0: rows[None, None]}, 8, 1)
    assert float(sensitivity.errors) == pytest.approx(float(change.square().mean()), rel=0.05)


def random_sensitivity(seed: int, steps: int = 5, layers: int = 3) -> Sensitivity:
    generator = torch.Generator().manual_seed(seed)
    return Sensitivity(SET[:2], torch.randn(2, steps, layers, 40, generator=generator))


def test_smoothing_keeps_what_is_constant_over_steps() -> None:
    row = torch.rand(2, 1, 3, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    sensitivity = Sensitivity(SET[:2], row.expand(2, 7, 3, 6))
    torch.testing.assert_close(sensitivity.smoothed_errors(), sensitivity.errors, rtol=1e-9, atol=0)


def test_smoothing_is_a_weighted_geometric_mean_of_neighbours() -> None:
    steps = 16
    sensitivity = random_sensitivity(1, steps)
    errors, smoothed, width = sensitivity.errors, sensitivity.smoothed_errors(), steps / SMOOTHED_STEPS
    kernel = [math.exp(-((t - 1) ** 2) / (2 * width**2)) for t in range(steps)]
    expected = math.exp(sum(k * math.log(float(errors[1, t, 2])) for t, k in enumerate(kernel)) / sum(kernel))
    assert float(smoothed[1, 1, 2]) == pytest.approx(expected, rel=1e-9)
    assert (smoothed.log().std(dim=1) < errors.log().std(dim=1)).all()


def test_few_steps_are_not_smoothed() -> None:
    sensitivity = random_sensitivity(2, steps=3)
    torch.testing.assert_close(sensitivity.smoothed_errors(), sensitivity.errors, rtol=1e-6, atol=0)


def test_a_sample_that_would_decide_everything_is_held_back() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 5, 3, 4, 8, generator=generator)  # [formats, steps, layers, projections, samples]
    rows[..., 5] *= 30
    sensitivity = Sensitivity(SET[:2], rows.flatten(3), samples=8)
    weights = sensitivity.row_weights().unflatten(0, (4, 8))
    assert torch.equal(weights, weights[:1].expand(4, 8))  # a sample has one weight
    assert float(weights.square().mean()) == pytest.approx(1.0)
    assert float(weights[0, 5]) < 0.1 * float(weights[0].median())
    share = [s.errors.sum() for s in (sensitivity, sensitivity.saturated())]
    others = [
        s.contributions.unflatten(3, (4, 8))[..., [0, 1, 2, 3, 4, 6, 7]].double().square().sum()
        for s in (sensitivity, sensitivity.saturated())
    ]
    assert float(others[0] / share[0]) < 0.05
    assert float(others[1] / share[1]) > 0.5


def test_formats_without_error_leave_all_samples_equal() -> None:
    weights = Sensitivity(SET[:1], torch.zeros(1, 2, 3, 8), samples=4).row_weights()
    assert torch.equal(weights, torch.ones(8, dtype=torch.float64))


def test_parts_of_the_batch_are_joined_by_projection_then_sample() -> None:
    whole = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)  # formats, layers, projections, samples
    split = [whole[..., :2], whole[..., 2:4], whole[..., 4:]]
    parts = [part.flatten(2).transpose(0, 1) for part in split]  # layers first
    assert torch.equal(join_parts(parts, projections=4), whole.flatten(2))
