"""Full-precision trajectories: seeds, steps, guidance."""

import math

import pytest
import torch
from torch import Tensor

from adatsq_trt.calibration.trajectory import Samples, final_latents, latent_mse, seeded_samples, trajectory
from adatsq_trt.models.flux import FluxAdapter


def test_a_samples_noise_depends_on_its_seed_alone(tiny_flux: FluxAdapter) -> None:
    def noise(*seeds: int) -> Tensor:
        return Samples(tiny_flux, tiny_flux.schedule(2), 2.0, (0,) * len(seeds), seeds).noise()

    batch = noise(4, 9, 2)
    for row, seed in zip(batch, (4, 9, 2), strict=True):
        assert torch.equal(row, noise(seed)[0])
    assert not torch.equal(batch[0], batch[1])
    assert batch.shape == (3, *tiny_flux.latent_shape)
    assert batch.dtype == torch.float32


def test_noise_is_unit_normal(tiny_flux: FluxAdapter) -> None:
    values = seeded_samples(tiny_flux, tiny_flux.schedule(1), 2.0, 200, 0, range(10)).noise()
    n = values.numel()
    assert abs(float(values.mean())) < 4 / math.sqrt(n)
    assert abs(float(values.var()) - 1) < 4 * math.sqrt(2 / n)


def test_a_step_is_eulers_with_the_guided_velocity(samples: Samples, latents: Tensor) -> None:
    adapter, schedule = samples.adapter, samples.schedule
    with torch.no_grad():
        velocity = adapter.velocity(latents[1], schedule.model_time(1), adapter.encode(samples.prompts), 2.0)
    assert torch.equal(latents[2], latents[1] + (schedule.sigmas[2] - schedule.sigmas[1]) * velocity)


def test_the_trajectory_is_that_of_diffusers_scheduler(samples: Samples, latents: Tensor) -> None:
    adapter: FluxAdapter = samples.adapter  # type: ignore[assignment]
    schedule = adapter.schedule(samples.schedule.steps)
    adapter.scheduler.set_begin_index(0)
    latent = samples.noise()
    for time in schedule.timesteps:
        with torch.no_grad():
            velocity = adapter.velocity(latent, time / 1000, samples.conditioning, 2.0)
        latent = adapter.scheduler.step(velocity, torch.tensor(time), latent, return_dict=False)[0]
    torch.testing.assert_close(latents[-1], latent, rtol=1e-5, atol=1e-5)


def test_a_samples_trajectory_does_not_depend_on_its_batch(samples: Samples, latents: Tensor) -> None:
    alone = trajectory(samples.part(slice(1, 2)))
    torch.testing.assert_close(alone[:, 0], latents[:, 1], rtol=1e-4, atol=1e-5)
    assert samples.part(slice(1, 2)).prompts == (8,)
    assert samples.part(slice(1, 2)).seeds == (5,)


def test_prompts_and_guidance_matter(samples: Samples, latents: Tensor) -> None:
    others = (
        Samples(samples.adapter, samples.schedule, 2.0, (4, 8), samples.seeds),
        Samples(samples.adapter, samples.schedule, 1.0, samples.prompts, samples.seeds),
    )
    for other in others:
        assert (trajectory(other)[-1, 0] - latents[-1, 0]).abs().max() > 1e-4


def test_callbacks_surround_each_step(samples: Samples) -> None:
    seen: list[str] = []
    trajectory(samples, lambda step: seen.append(f"before {step}"), lambda: seen.append("after"))
    assert seen == ["before 0", "after", "before 1", "after", "before 2", "after"]


def test_classes_come_in_turn_and_seeds_one_after_another(tiny_flux: FluxAdapter) -> None:
    batch = seeded_samples(tiny_flux, tiny_flux.schedule(1), 2.0, 5, 100, range(3))
    assert batch.prompts == (0, 1, 2, 0, 1)
    assert batch.seeds == (100, 101, 102, 103, 104)


def test_latent_mse_is_the_mean_of_squares() -> None:
    assert latent_mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, -2.0]])) == pytest.approx(8.0)
    # A float32 mean of squares of this size would be off in the third digit.
    many = torch.full((4_000_000,), 1e-3)
    assert latent_mse(many, torch.zeros(())) == pytest.approx(float(many[0].double()) ** 2, rel=1e-9)


def test_parts_give_the_pictures_of_the_whole_batch(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adatsq_trt.calibration.trajectory.SAMPLES_PER_CALL", 3)
    whole = trajectory(samples)[-1]
    torch.testing.assert_close(final_latents(samples), whole, rtol=1e-4, atol=1e-5)
