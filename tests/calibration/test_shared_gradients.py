"""Gradients of weights that all steps share, against autograd of the whole loop, and the Hessians made of them."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from adatsq_trt.calibration import units
from adatsq_trt.calibration.fisher import projections
from adatsq_trt.calibration.shared_gradients import GradientSums, GradientUnit, gradient_sums, sweep
from adatsq_trt.calibration.trajectory import Samples, trajectory
from adatsq_trt.calibration.units import Measured
from adatsq_trt.execution import Executor, InProcess
from adatsq_trt.execution.device import OnDevice
from adatsq_trt.execution.threads import threads
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.solver import State
from tests.sweep import backward_steps
from tests.tiny_flux import make_tiny_flux
from tests.tiny_wan import make_tiny_wan
from tests.tiny_z_image import make_tiny_z_image

COUNT, STEPS, GUIDANCE = 2, 3, 2.5
HERE = InProcess()
MAKERS: dict[str, Callable[[], ModelAdapter]] = {
    "flux": lambda: make_tiny_flux(width=16, patches=2, head=16),
    "wan": make_tiny_wan,
    "z-image": make_tiny_z_image,
}


@cache
def batch(name: str) -> tuple[Samples, Tensor, Tensor]:
    """Two samples, their trajectory, and projections."""
    adapter = MAKERS[name]()
    adapter.transformer.requires_grad_(False)
    samples = Samples(adapter, adapter.schedule(STEPS), GUIDANCE, prompts=(0, 2), seeds=(11, 5))
    return samples, trajectory(samples), projections(2, adapter.latent_shape, COUNT, seed=0)


def autograd_gradients(samples: Samples, start: Tensor, sample: int, row: int) -> dict[str, Tensor]:
    """dL/dW through the whole loop, where every step uses the same weight."""
    alone, layers = samples.part(slice(sample, sample + 1)), samples.adapter.quantizable_layers()
    weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
    latent = alone.noise()
    for step in range(alone.schedule.steps):
        time = alone.schedule.model_time(step)
        velocity = alone.adapter.velocity(latent, time, alone.conditioning, alone.guidance)
        latent = alone.schedule.advance(latent, velocity, step)
    found = torch.autograd.grad((latent[0] * start[row, sample]).sum(), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return dict(zip(layers, found, strict=True))


def whole(latents: Tensor, start: Tensor, layers: tuple[str, ...]) -> GradientUnit:
    return GradientUnit(slice(0, 2), latents, start, layers, at_once=2)


@pytest.mark.parametrize("name", MAKERS)
def test_the_gradients_are_those_of_the_loop_with_shared_weights(name: str) -> None:
    samples, latents, start = batch(name)
    assert samples.conditioning.unconditional is not None, "both branches of guidance are there"
    layers = tuple(samples.adapter.quantizable_layers())
    kept = sweep(Measured(samples, True), whole(latents, start, layers), 0)
    assert set(kept) == set(layers)
    for sample in range(2):
        for row in range(COUNT):
            for layer, expected in autograd_gradients(samples, start, sample, row).items():
                gradients = kept[layer][sample].gradients
                assert gradients is not None
                assert float((gradients[row] - expected).norm() / expected.norm()) < 1e-5, layer


def test_the_row_form_is_the_sum_over_rows_one_by_one() -> None:
    samples, latents, start = batch("flux")
    layer, expected = "transformer_blocks.0.attn.to_q", torch.zeros(())
    for own in backward_steps(samples, latents, State(start), STEPS - 1):
        gradients, inputs = own.gradients[layer][:, 0], own.inputs[layer][0]
        for row in range(len(inputs)):
            alone = gradients[:, row, :, None] * inputs[row]  # the weight's gradient from this row
            expected = expected + (alone.mT @ alone).mean(dim=0)
    (kept, _) = sweep(Measured(samples, False), whole(latents, start, (layer,)), 0)[layer]
    assert kept.gradients is None
    torch.testing.assert_close(kept.row, expected, rtol=1e-4, atol=1e-7)


def collected(executor: Executor, by_block: bool = False, at_once: int = 2, first: int = 0) -> list[GradientSums]:
    samples, latents, start = batch("wan")
    layers = tuple(samples.adapter.quantizable_layers())
    common = executor.share(Measured(samples, True, by_block))
    found = list(gradient_sums(executor, common, latents, start, layers, at_once, first))
    assert [list(part) for part in found] == [list(layers)] * len(found)
    return [part[layer] for part in found for layer in layers]


def require_equal(found: list[GradientSums], expected: list[GradientSums]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        for name in ("coherent", "row", "squares", "count"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize(("by_block", "at_once"), [(True, 2), (False, 1), (True, 1)])
def test_memory_decides_no_bit(by_block: bool, at_once: int) -> None:
    require_equal(collected(HERE, by_block, at_once), collected(HERE))


def test_some_layers_have_the_sums_that_they_have_among_all() -> None:
    samples, latents, start = batch("flux")
    layers = tuple(samples.adapter.quantizable_layers())
    common = HERE.share(Measured(samples, True))
    (every,) = gradient_sums(HERE, common, latents, start, layers, 2)
    (some,) = gradient_sums(HERE, common, latents, start, layers[1::3], 2)
    require_equal(list(some.values()), [every[layer] for layer in layers[1::3]])


def test_workers_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "SAMPLES_PER_BACKWARD", 1)  # two parts
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as each worker has
    try:
        expected = collected(HERE)
        require_equal(collected(OnDevice(torch.device("cpu"))), expected)
        with threads(2) as executor:
            require_equal(collected(executor), expected)
        require_equal(collected(HERE, first=1), expected[len(expected) // 2 :])
    finally:
        torch.set_num_threads(before)


def sums_of(forms: Tensor, row: Tensor) -> GradientSums:
    """Of samples' coherent forms [samples, K, K] and a row form that is the mean's."""
    count = torch.tensor(len(forms))
    return GradientSums(forms.sum(dim=0), row * count, forms.double().square().sum(), count)


def test_the_shrinkage_is_the_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(6, 5, 3, generator=generator)
    forms, row = factors.mT @ factors, torch.diag(torch.tensor([3.0, 4.0, 5.0]))
    mean = forms.double().mean(dim=0)
    variance = (forms.double() - mean).square().sum() / (6 * 5)
    expected = float(variance / (mean - row).square().sum())
    sums = sums_of(forms, row)
    assert 0 < expected < 1
    assert sums.shrinkage == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(sums.hessian(), ((1 - expected) * mean + expected * row).float())


def test_one_sample_says_nothing_of_its_variance_and_equal_ones_say_that_there_is_none() -> None:
    form, row = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.diag(torch.tensor([1.0, 3.0]))
    assert sums_of(form[None], row).shrinkage == 1.0
    torch.testing.assert_close(sums_of(form[None], row).hessian(), row)
    assert sums_of(form.expand(8, 2, 2), row).shrinkage == 0.0
    torch.testing.assert_close(sums_of(form.expand(8, 2, 2), row).hessian(), form)


def test_more_samples_shrink_less() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(6, 5, 3, generator=generator)
    forms, row = factors.mT @ factors, torch.diag(torch.tensor([3.0, 4.0, 5.0]))
    few, many = sums_of(forms, row).shrinkage, sums_of(forms.repeat(4, 1, 1), row).shrinkage
    assert many == pytest.approx(few * 5 / 23, rel=1e-4)  # S - 1 of 6 and of 24


def test_a_sensitive_sample_counts_as_much_as_another() -> None:
    samples, latents, start = batch("flux")
    layers = ("transformer_blocks.0.attn.to_q",)
    common = HERE.share(Measured(samples, True))
    scaled = start * torch.tensor([1.0, 1000.0])[:, None, None]  # the second sample's gradients
    ((plain,), (loud,)) = (
        list(next(iter(gradient_sums(HERE, common, latents, u, layers, 2))).values()) for u in (start, scaled)
    )
    torch.testing.assert_close(loud.coherent, plain.coherent, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(loud.row, plain.row, rtol=1e-3, atol=1e-5)
    assert float(plain.hessian().trace()) == pytest.approx(1.0, rel=1e-5)
