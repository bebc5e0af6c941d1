"""The denoising schedule: step index, timestep and sigma, taken from diffusers' flow-matching scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adatsq_trt.errors import UserError

if TYPE_CHECKING:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """Steps of one denoising run.

    Attributes:
        sigmas: noise level at the start of each step and, last, at the end of the loop: `steps + 1` numbers, 1 to 0.
        timesteps: what the scheduler calls the timestep of each step: `steps` numbers in (0, 1000].
        scheduler_config: the diffusers scheduler's configuration, so that a bundle can make the same scheduler again.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    scheduler_config: dict[str, Any]

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return len(self.timesteps)

    def model_time(self, step: int) -> float:
        """What a trace module is given at `step`: timestep / 1000, in (0, 1]."""
        return self.timesteps[step] / TRAIN_TIMESTEPS

    def advance(self, latent: torch.Tensor, velocity: torch.Tensor, step: int) -> torch.Tensor:
        """One Euler step: x[t+1] = x[t] + (sigma[t+1] - sigma[t]) v.

        The formula of FlowMatchEulerDiscreteScheduler.step; written out because beam paths need it without the
        scheduler's hidden step counter (a test holds the two together).

        Args:
            latent: [batch, ...] float32.
            velocity: same shape: the model's prediction after guidance.
            step: index in the loop.
        """
        return latent + (self.sigmas[step + 1] - self.sigmas[step]) * velocity


def make_schedule(scheduler: FlowMatchEulerDiscreteScheduler, steps: int, image_tokens: int | None = None) -> Schedule:
    """The schedule that diffusers' pipelines use with this scheduler.

    Flux and Z-Image ask for the sigmas 1 to 1/steps, shifted as the scheduler says. Wan takes the scheduler's own
    spacing, which ends at its smallest sigma.

    Args:
        scheduler: with or without dynamic shifting, which needs the image tokens.
        steps: number of denoising steps, at least 1.
        image_tokens: length of the image sequence; dynamic shifting depends on it. None for the scheduler's spacing.

    Raises:
        UserError: fewer than one step, or dynamic shifting without image tokens.
    """
    if steps < 1:
        raise UserError(f"steps: got {steps}, expected at least 1; pass --steps with a positive number")
    if image_tokens is not None:
        sigmas = np.linspace(1.0, 1.0 / steps, steps).tolist()
        scheduler.set_timesteps(sigmas=sigmas, mu=_shift(scheduler, image_tokens))
    elif scheduler.config.use_dynamic_shifting:
        raise UserError("the scheduler shifts dynamically, expected a fixed shift; set use_dynamic_shifting to false")
    else:
        scheduler.set_timesteps(steps)
    return Schedule(
        sigmas=tuple(float(s) for s in scheduler.sigmas),
        timesteps=tuple(float(t) for t in scheduler.timesteps),
        scheduler_config={k: v for k, v in scheduler.config.items() if not k.startswith("_")},
    )


def _shift(scheduler: FlowMatchEulerDiscreteScheduler, image_tokens: int) -> float | None:
    """Dynamic shift mu, linear in the sequence length between the scheduler's two anchors."""
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return None
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return float(config.base_shift + slope * (image_tokens - config.base_image_seq_len))


def initial_noise(seeds: Sequence[int], latent_shape: Sequence[int]) -> np.ndarray:
    """The first latent of every sample: one NumPy PCG64 stream per seed, so a sample does not depend on its batch.

    Args:
        seeds: one non-negative integer per sample.
        latent_shape: shape of one sample's latent.

    Returns:
        float32 [len(seeds), *latent_shape], unit normal.
    """
    shape = tuple(latent_shape)
    return np.stack([np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) for seed in seeds])
