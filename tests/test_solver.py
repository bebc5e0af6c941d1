"""The loop's coefficients against `step` of diffusers' schedulers."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from adatsq_trt.errors import MismatchError
from adatsq_trt.solver import Denoising, Solver, Update, euler_updates, guide, linear_updates

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
EULER, HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
UNIPC, DPM = "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"
# Class, options, and how many earlier predictions a step combines at most.
FOLLOWED: dict[str, tuple[str, dict[str, Any], int]] = {
    "Euler": (EULER, {"shift": 3.0}, 0),
    "Euler, dynamic shift": (EULER, {"use_dynamic_shifting": True}, 0),
    "Euler, Karras": (EULER, {"use_karras_sigmas": True}, 0),
    "Heun": (HEUN, {"shift": 3.0}, 1),
    "UniPC": (UNIPC, {**FLOW, "flow_shift": 3.0}, 2),
    "UniPC, order 3": (UNIPC, {**FLOW, "flow_shift": 12.0, "solver_order": 3}, 3),
    "UniPC without corrector": (UNIPC, {**FLOW, "flow_shift": 3.0, "disable_corrector": list(range(30))}, 1),
    "DPM++": (DPM, {**FLOW, "flow_shift": 3.0}, 1),
    "DPM++, Heun": (DPM, {**FLOW, "flow_shift": 3.0, "solver_type": "heun"}, 1),
    "DPM++, order 3": (DPM, {**FLOW, "flow_shift": 3.0, "solver_order": 3}, 2),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "noise of Euler": (EULER, {"stochastic_sampling": True}),
    "noise of DPM++": (DPM, {**FLOW, "algorithm_type": "sde-dpmsolver++"}),
    "noise of LCM": ("FlowMatchLCMScheduler", {"shift": 3.0}),
    "thresholds of UniPC": (UNIPC, {**FLOW, "thresholding": True}),
    "thresholds of DPM++": (DPM, {**FLOW, "thresholding": True}),
}


def make(name: str, options: dict[str, Any], steps: int) -> Any:
    scheduler = getattr(diffusers, name)(**options)
    if name == EULER:
        mu = 0.7 if options.get("use_dynamic_shifting") else None
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    else:
        scheduler.set_timesteps(steps)
    return scheduler


def velocity(latent: torch.Tensor, step: int) -> torch.Tensor:
    """A model that is not linear."""
    return torch.sin(3 * latent + step) + 0.5 * latent


@pytest.mark.parametrize("steps", [2, 4, 8, 25])
@pytest.mark.parametrize("case", FOLLOWED)
def test_loops_end_where_the_schedulers_do(case: str, steps: int) -> None:
    name, options, most = FOLLOWED[case]
    scheduler = make(name, options, steps)
    updates = linear_updates(scheduler)
    sigmas = scheduler.sigmas.tolist()
    ours = theirs = noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    loop = Denoising(Solver(updates, sigmas), noise)
    for step, (time, ours) in enumerate(zip(scheduler.timesteps, loop.run(velocity), strict=True)):
        theirs = scheduler.step(velocity(theirs, step), time, theirs, return_dict=False)[0]
        assert (ours - theirs).norm() < 2e-5 * theirs.norm()
    assert max(len(update.clean) for update in updates) <= most
    if most and name != HEUN and steps > 2:
        *_, euler = Denoising(Solver(euler_updates(sigmas), sigmas), noise).run(velocity)
        assert (euler - theirs).norm() > 1e-4 * theirs.norm(), "Euler's steps would have passed too"


@pytest.mark.parametrize("steps", [3, 8, 25])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_linear_is_refused_by_name(case: str, steps: int) -> None:
    name, options = REFUSED[case]
    with pytest.raises(MismatchError, match=f"{name} is not followed: its step draws noise"):
        linear_updates(make(name, options, steps))


def test_what_divides_infinities_is_refused() -> None:
    with pytest.raises(MismatchError, match="its step 3 gives NaN"):
        linear_updates(make(UNIPC, {**FLOW, "solver_type": "bh1"}, 4))


def test_long_memories_are_refused() -> None:
    with pytest.raises(MismatchError, match="depends on more than"):
        linear_updates(make(UNIPC, {**FLOW, "solver_order": 6}, 12))


def test_nothing_of_the_scheduler_changes() -> None:
    scheduler = make(UNIPC, FLOW, 4)
    before, state = scheduler.sigmas.clone(), torch.get_rng_state()
    linear_updates(scheduler)
    assert scheduler.step_index is None
    assert torch.equal(scheduler.sigmas, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("case", ["Euler", "Euler, dynamic shift", "Euler, Karras"])
def test_eulers_formula_is_what_the_scheduler_computes(case: str) -> None:
    name, options, _ = FOLLOWED[case]
    scheduler = make(name, options, 20)
    assert linear_updates(scheduler) == euler_updates(scheduler.sigmas.tolist())


def test_arrays_and_tensors_step_alike_bit_for_bit() -> None:
    scheduler = make(EULER, {"shift": 3.0}, 25)
    sigmas, generator = scheduler.sigmas.tolist(), np.random.default_rng(0)
    for step, update in enumerate(linear_updates(scheduler)):
        x, v = generator.standard_normal((2, 64), dtype=np.float32)
        plain = torch.from_numpy(x) + (sigmas[step + 1] - sigmas[step]) * torch.from_numpy(v)
        assert update(x, v).dtype == np.float32
        np.testing.assert_array_equal(update(x, v), plain.numpy())
        assert torch.equal(update(torch.from_numpy(x), torch.from_numpy(v)), plain)


def test_a_step_without_what_it_combines_fails() -> None:
    with pytest.raises(ValueError, match="got 0 earlier predictions, this step combines 1"):
        Update(1.0, -0.5, (0.2,))(torch.zeros(1), torch.zeros(1))


def test_guidance() -> None:
    prediction = np.array([[1.0], [3.0], [0.5], [1.0]], np.float32)
    np.testing.assert_array_equal(guide(prediction, 2, 2.0), np.array([[1.5], [5.0]], np.float32))
    assert guide(prediction, 4, 2.0) is prediction
    for kind in (np.asarray, torch.from_numpy):
        rows = kind(np.array([[[3.0, 4.0]], [[0.0, 1.0]]], np.float32))
        wanted = np.array([[[6.0, 7.0]]]) * 5 / 85**0.5  # as long as the conditional one
        np.testing.assert_allclose(guide(rows, 1, 2.0, rescaled=True), wanted, rtol=1e-6)
        assert guide(rows, 2, 2.0, rescaled=True) is rows
    assert torch.equal(guide(torch.from_numpy(prediction), 2, 0.0), torch.tensor([[0.5], [1.0]]))
