"""The schedule against diffusers' own scheduler and pipeline."""

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from adatsq_trt.errors import UserError
from adatsq_trt.schedule import initial_noise, make_schedule

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shifted": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 4096},
}


def pipeline_shift() -> Callable[..., float]:
    """`calculate_shift` of the Flux pipeline; its module cannot be imported without the transformers library."""
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "pipelines" / "flux" / "pipeline_flux.py"
    tree = ast.parse(path.read_text())
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "calculate_shift")
    scope: dict[str, Any] = {}
    exec(compile(ast.Module([function], []), str(path), "exec"), scope)
    return scope["calculate_shift"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_advance_is_the_schedulers_step(config: dict[str, Any], steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    schedule = make_schedule(scheduler, steps, image_tokens=1024)
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 16, 4, generator=generator)
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn(2, 16, 4, generator=generator)
        ours = schedule.advance(ours, velocity, step)
        theirs = scheduler.step(velocity, timestep, theirs, return_dict=False)[0]
        # The scheduler subtracts sigmas in float32, we subtract in float64 and round once.
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert schedule.steps == steps


@pytest.mark.parametrize("image_tokens", [16, 256, 1024, 4096])
def test_dynamic_shift_is_that_of_the_flux_pipeline(image_tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**CONFIGS["dynamic"])
    schedule = make_schedule(scheduler, 20, image_tokens)
    c = scheduler.config
    mu = pipeline_shift()(image_tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    reference = FlowMatchEulerDiscreteScheduler(**CONFIGS["dynamic"])
    reference.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20), mu=mu)
    assert schedule.sigmas == pytest.approx(reference.sigmas.tolist(), abs=1e-6)
    assert schedule.timesteps == pytest.approx(reference.timesteps.tolist(), abs=1e-3)


@given(steps=st.integers(1, 60), config=st.sampled_from(list(CONFIGS.values())))
def test_sigmas_fall_from_one_to_zero(steps: int, config: dict[str, Any]) -> None:
    schedule = make_schedule(FlowMatchEulerDiscreteScheduler(**config), steps, image_tokens=16)
    assert len(schedule.sigmas) == steps + 1
    assert schedule.sigmas[0] == pytest.approx(1)
    assert schedule.sigmas[-1] == 0
    assert all(a > b for a, b in zip(schedule.sigmas, schedule.sigmas[1:], strict=False))
    for step in range(steps):
        assert schedule.model_time(step) == pytest.approx(schedule.sigmas[step], abs=1e-6)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_stored_configuration_makes_the_same_schedule(config: dict[str, Any]) -> None:
    schedule = make_schedule(FlowMatchEulerDiscreteScheduler(**config), 7, image_tokens=64)
    again = make_schedule(FlowMatchEulerDiscreteScheduler.from_config(schedule.scheduler_config), 7, image_tokens=64)
    assert again == schedule


@pytest.mark.parametrize("steps", [0, -3])
def test_a_loop_needs_a_step(steps: int) -> None:
    with pytest.raises(UserError, match=f"got {steps}, expected at least 1"):
        make_schedule(FlowMatchEulerDiscreteScheduler(), steps, image_tokens=16)


@given(seeds=st.lists(st.integers(0, 2**63), min_size=1, max_size=5))
def test_noise_of_a_sample_does_not_depend_on_its_batch(seeds: list[int]) -> None:
    batch = initial_noise(seeds, (16, 4))
    assert batch.dtype == np.float32
    assert batch.shape == (len(seeds), 16, 4)
    for seed, sample in zip(seeds, batch, strict=True):
        np.testing.assert_array_equal(sample, initial_noise([seed], (16, 4))[0])


def test_noise_is_unit_normal_and_differs_between_seeds() -> None:
    noise = initial_noise(range(64), (16, 16))
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert len({sample.tobytes() for sample in noise}) == 64


def test_pipelines_that_pass_sigmas_pass_them_to_a_scheduler_with_sigmas_of_a_flow_too() -> None:
    """As one that was made of UniPC's configuration has; Flux and FLUX.2 alone leave the spacing to it."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.register_to_config(use_flow_sigmas=True)
    assert make_schedule(scheduler, 4, 16).sigmas == pytest.approx((1.0, 0.75, 0.5, 0.25, 0.0))
    assert make_schedule(scheduler, 4, 16, leaves_flows=True).sigmas != pytest.approx((1.0, 0.75, 0.5, 0.25, 0.0))
