"""Adjoints and Fisher information against finite differences and autograd's own weight gradients."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor

from adatsq_trt.calibration import fisher
from adatsq_trt.calibration.fisher import (
    LayerGradients,
    backward_step,
    projections,
    squared_weight_gradient,
    temporal_weights,
)
from adatsq_trt.calibration.trajectory import Samples, trajectory
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.solver import State
from tests.sweep import BackwardStep, backward_steps
from tests.tiny_flux import make_tiny_flux
from tests.tiny_qwen_image import make_tiny_qwen_image
from tests.tiny_wan import make_tiny_wan
from tests.tiny_z_image import make_tiny_z_image

COUNT = 2
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
# Calls of the model are four, five by Heun's method.
MULTISTEP: dict[str, tuple[Any, int]] = {
    "UniPC": (UniPCMultistepScheduler(**FLOW), 4),
    "UniPC, order 3": (UniPCMultistepScheduler(**FLOW, solver_order=3), 4),
    "DPM++": (DPMSolverMultistepScheduler(**FLOW), 4),
    "DPM++, order 3": (DPMSolverMultistepScheduler(**FLOW, solver_order=3, lower_order_final=False), 4),
    "Heun": (FlowMatchHeunDiscreteScheduler(shift=3.0), 5),
}


@pytest.fixture(scope="module")
def start(samples: Samples) -> Tensor:
    return projections(2, samples.adapter.latent_shape, COUNT, seed=0)


@pytest.fixture(scope="module")
def sweep(samples: Samples, latents: Tensor, start: Tensor) -> dict[int, BackwardStep]:
    return {b.step: b for b in backward_steps(samples, latents, State(start), samples.schedule.steps - 1)}


def looking_back(name: str) -> Samples:
    """Two samples of a Wan with a scheduler that combines predictions of several steps."""
    adapter = make_tiny_wan()
    adapter.transformer.requires_grad_(False)
    adapter.scheduler, steps = MULTISTEP[name]
    return Samples(adapter, adapter.schedule(steps), 2.0, prompts=(0, 2), seeds=(11, 5))


def rest_of_the_loop(samples: Samples, state: State[Tensor], step: int) -> State[Tensor]:
    """The state that one at a step leads to, with its graph."""
    schedule = samples.schedule
    for later in range(step, schedule.steps):
        time = schedule.model_time(later)
        velocity = samples.adapter.velocity(state.latent, time, samples.conditioning, samples.guidance)
        state = schedule.solver.following(state, velocity, later)
    return state


def finish(samples: Samples, latent: Tensor, step: int) -> Tensor:
    """The picture that a latent at a step leads to."""
    for later in range(step, samples.schedule.steps):
        latent = samples.step(State(latent), later).latent
    return latent


@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_adjoint_predicts_what_a_nudge_does_to_the_picture(
    samples: Samples, latents: Tensor, start: Tensor, sweep: dict[int, BackwardStep], step: int
) -> None:
    nudge = torch.randn(latents[0].shape, generator=torch.Generator().manual_seed(step))
    size = 1e-2
    difference = finish(samples, latents[step] + size * nudge, step) - finish(
        samples, latents[step] - size * nudge, step
    )
    measured = (start * difference.double()).sum(dim=(2, 3)) / (2 * size)
    predicted = (sweep[step].adjoint.latent.double() * nudge).sum(dim=(2, 3))
    torch.testing.assert_close(predicted, measured, rtol=2e-3, atol=2e-3)
    # The adjoint is not merely u: the model has a say.
    assert (predicted - (start.double() * nudge).sum(dim=(2, 3))).abs().max() > 0.1


def test_the_sweep_goes_back_from_the_last_step(samples: Samples, sweep: dict[int, BackwardStep]) -> None:
    assert list(sweep) == [2, 1, 0]
    assert sweep[0].adjoint.latent.shape == (COUNT, 2, *samples.adapter.latent_shape)
    rows = sweep[0].inputs["transformer_blocks.0.attn.to_q"]
    assert rows.shape == (2, 2 * 4, 32)  # both guidance branches of four tokens
    assert sweep[0].gradients["transformer_blocks.0.attn.to_q"].shape == (COUNT, 2, 2 * 4, 32)
    assert set(sweep[0].gradients) == set(samples.adapter.quantizable_layers())


def test_a_resumed_sweep_equals_an_undisturbed_one(
    samples: Samples, latents: Tensor, sweep: dict[int, BackwardStep]
) -> None:
    for backward in backward_steps(samples, latents, sweep[2].adjoint, last=1):
        whole = sweep[backward.step]
        assert torch.equal(backward.adjoint.latent, whole.adjoint.latent)
        for layer in whole.gradients:
            assert torch.equal(backward.inputs[layer], whole.inputs[layer])
            assert torch.equal(backward.gradients[layer], whole.gradients[layer])


@pytest.mark.parametrize("step", [0, 2])
def test_squared_weight_gradients_are_those_of_autograd(
    samples: Samples, latents: Tensor, start: Tensor, sweep: dict[int, BackwardStep], step: int
) -> None:
    adjoint = start if step == 2 else sweep[step + 1].adjoint.latent
    layers = samples.adapter.quantizable_layers()
    weights = [layer.weight for layer in layers.values()]
    for sample in range(2):
        alone = samples.part(slice(sample, sample + 1))
        for weight in weights:
            weight.requires_grad_(True)
        # `Samples.step` switches gradients off, so the guided step is written out.
        velocity = alone.adapter.velocity(
            latents[step, sample : sample + 1], alone.schedule.model_time(step), alone.conditioning, alone.guidance
        )
        following = alone.schedule.advance(latents[step, sample : sample + 1], velocity, step)
        gradients = torch.autograd.grad((following * adjoint[1, sample]).sum(), weights)
        for weight in weights:
            weight.requires_grad_(False)
        for layer, gradient in zip(layers, gradients, strict=True):
            got = squared_weight_gradient(sweep[step].inputs[layer], sweep[step].gradients[layer])[1, sample]
            torch.testing.assert_close(got, gradient.square().sum(), rtol=1e-3, atol=1e-9, msg=layer)


@pytest.mark.parametrize(
    "make", [lambda: make_tiny_flux(32, 4, blocks=3), make_tiny_wan, make_tiny_z_image, make_tiny_qwen_image]
)
def test_one_block_at_a_time_gives_the_same_numbers(make: Callable[[], ModelAdapter]) -> None:
    adapter = make()
    adapter.transformer.requires_grad_(False)
    samples = Samples(adapter, adapter.schedule(2), 2.0, prompts=(0, 2), seeds=(11, 5))
    start = projections(2, adapter.latent_shape, COUNT, seed=0)
    found = [
        list(backward_steps(samples, trajectory(samples), State(start), 1, by_block)) for by_block in (False, True)
    ]
    for whole, parts in zip(*found, strict=True):
        assert torch.equal(whole.adjoint.latent, parts.adjoint.latent)
        assert set(whole.inputs) == set(parts.inputs) == set(parts.gradients) == set(adapter.quantizable_layers())
        for layer in whole.inputs:
            assert torch.equal(whole.inputs[layer], parts.inputs[layer])
            assert torch.equal(whole.gradients[layer], parts.gradients[layer])
    for name in adapter.blocks():
        assert "forward" not in vars(adapter.transformer.get_submodule(name))


@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("name", MULTISTEP)
def test_adjoints_are_those_of_autograd_through_a_loop_that_looks_back(name: str, by_block: bool) -> None:
    samples = looking_back(name)
    latents, solver = trajectory(samples), samples.schedule.solver
    (start,) = projections(2, samples.adapter.latent_shape, 1, seed=0)
    assert solver.memory
    last = samples.schedule.steps - 1
    sweep = {own.step: own for own in backward_steps(samples, latents, State(start[None]), last, by_block)}
    layer = samples.adapter.quantizable_layers()["blocks.0.attn1.to_q"]
    state, wanted = State(latents[0]), torch.zeros_like(layer.weight)
    for step in range(last + 1):
        leaves = state.each(lambda value: value.detach().requires_grad_())
        layer.weight.requires_grad_()
        loss = (rest_of_the_loop(samples, leaves, step).latent * start).sum()
        own = sweep[step]
        found = [own.adjoint.latent[0], *(rows[0] for rows in own.adjoint.clean)]
        *expected, weight = torch.autograd.grad(
            loss, [leaves.latent, *leaves.clean, layer.weight], materialize_grads=True
        )
        assert len(found) == len(expected) == 1 + min(step, solver.memory)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() <= 1e-5 * max(other.norm(), 1e-3)
        wanted = weight if step == 0 else wanted
        layer.weight.requires_grad_(False)
        with torch.no_grad():
            state = samples.step(state, step)
    name = "blocks.0.attn1.to_q"
    summed = sum(own.gradients[name][0].flatten(0, 1).mT @ own.inputs[name].flatten(0, 1) for own in sweep.values())
    assert (summed - wanted).norm() <= 1e-5 * wanted.norm()


def test_one_block_at_a_time_is_kept() -> None:
    adapter = make_tiny_wan()
    adapter.transformer.requires_grad_(False)
    samples = Samples(adapter, adapter.schedule(2), 2.0, prompts=(0,), seeds=(11,))
    start = projections(1, adapter.latent_shape, COUNT, seed=0)
    kept: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def keep(value: Tensor) -> Tensor:
        own = value.detach()  # an output with its graph would never be freed
        kept.append(weakref.ref(own))
        alive.append(sum(value.nbytes for ref in kept if (value := ref()) is not None))
        return own

    most, shown = [], list[LayerGradients]()
    for by_block in (False, True):
        alive.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            backward_step(samples, samples.noise(), State(start), 0, shown.append, by_block)
        most.append(max(alive))
    assert len(shown) == 1 + len(adapter.blocks()) == 3
    assert most[1] < 0.7 * most[0]  # there are some operations before and after the blocks


def test_many_rows_give_the_squares_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, gradients = torch.randn(3, 7, 5, generator=generator), torch.randn(2, 3, 7, 4, generator=generator)
    few = squared_weight_gradient(inputs, gradients)
    monkeypatch.setattr(fisher, "MOST_ROW_PRODUCTS", 3 * 7**2 - 1)
    many = squared_weight_gradient(inputs, gradients)
    assert many.shape == (2, 3)
    torch.testing.assert_close(many, few)
    torch.testing.assert_close(many[1, 2], (gradients[1, 2].mT @ inputs[2]).square().sum())


def test_layers_that_never_see_the_latent_have_information(sweep: dict[int, BackwardStep]) -> None:
    # In the first double block the text branch's projections see only the prompt.
    layer = "transformer_blocks.0.attn.add_v_proj"
    assert squared_weight_gradient(sweep[0].inputs[layer], sweep[0].gradients[layer]).min() > 0


def test_the_sweep_leaves_no_hooks_and_no_gradients(samples: Samples, sweep: dict[int, BackwardStep]) -> None:
    for layer in samples.adapter.quantizable_layers().values():
        assert not layer._forward_hooks
        assert layer.weight.grad is None
        assert not layer.weight.requires_grad


def test_projections_are_unit_gaussians_and_seeded() -> None:
    u = projections(50, (10, 4), 20, seed=3)
    assert torch.equal(u, projections(50, (10, 4), 20, seed=3))
    assert not torch.equal(u, projections(50, (10, 4), 20, seed=4))
    assert abs(float(u.square().mean()) - 1) < 0.03


positive = npst.arrays(
    "float32",
    npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6),
    elements=st.floats(2**-7, 128, width=32),
)


@given(positive, st.floats(0.1, 50))
def test_temporal_weights_sum_to_one_and_favour_the_informative_step(values: object, temperature: float) -> None:
    information = torch.as_tensor(values)
    alpha = temporal_weights(information, temperature)
    torch.testing.assert_close(alpha.sum(dim=0), torch.ones(alpha.shape[1]))
    chosen = alpha.gather(0, information.argmax(dim=0, keepdim=True))[0]
    assert (chosen >= alpha.max(dim=0).values - 1e-6).all()


@given(positive)
def test_high_temperature_makes_all_steps_equal(values: object) -> None:
    alpha = temporal_weights(torch.as_tensor(values), 1e6)
    torch.testing.assert_close(alpha, torch.full_like(alpha, 1 / len(alpha)), rtol=1e-4, atol=0)


@given(positive, st.integers(-20, 20))
def test_temporal_weights_do_not_depend_on_the_scale_of_the_information(values: object, exponent: int) -> None:
    information = torch.as_tensor(values)
    torch.testing.assert_close(temporal_weights(information * 2.0**exponent, 3.0), temporal_weights(information, 3.0))


def test_temporal_weights_are_the_equations() -> None:
    alpha = temporal_weights(torch.tensor([[1.0], [3.0]]), 2.0)  # mean 2: exponents 1/4 and 3/4
    torch.testing.assert_close(alpha, torch.softmax(torch.tensor([[0.25], [0.75]]), dim=0))


def test_a_layer_without_information_weighs_all_steps_alike() -> None:
    assert torch.equal(temporal_weights(torch.zeros(4, 2), 3.0), torch.full((4, 2), 0.25))
