"""The denoising schedule: step index, timestep and sigma, taken from diffusers' schedulers of a flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from adatsq_trt.errors import UserError
from adatsq_trt.solver import Denoising, Latent, Update, euler_updates, linear_updates

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

TRAIN_TIMESTEPS = 1000
EULER, UNIPC = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"


@dataclass(frozen=True)
class Schedule:
    """Steps of one denoising run.

    Attributes:
        sigmas: noise level at the start of each step and, last, at the end of the loop: `steps + 1` numbers, 1 to 0.
        timesteps: the scheduler's timestep at each step: `steps` numbers in (0, 1000].
        scheduler_config: of the diffusers scheduler that takes these very steps, with its class (`scheduler`).
        updates: update rule of each step; Euler's method unless given.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    scheduler_config: dict[str, Any]
    updates: tuple[Update, ...] = ()

    def __post_init__(self) -> None:
        """Take Euler's steps where no others are given."""
        if not self.updates:
            object.__setattr__(self, "updates", euler_updates(self.sigmas))

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return len(self.timesteps)

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler:
        """A scheduler of diffusers with which a pipeline takes these very steps, by Euler's method."""
        import diffusers

        kind = getattr(diffusers, UNIPC if self.scheduler_config.get("_class_name") == UNIPC else EULER)
        return kind.from_config(self.scheduler_config)

    def model_time(self, step: int) -> float:
        """Return the time input of a trace module at `step`: timestep / 1000, in (0, 1]."""
        return self.timesteps[step] / TRAIN_TIMESTEPS

    def begin(self, noise: Latent) -> Denoising[Latent]:
        """A run of the loop from this noise, float32 [samples, ...]."""
        return Denoising(self.updates, self.sigmas, noise)

    def advance(self, latent: Latent, velocity: Latent, step: int) -> Latent:
        """One step on its own, of a scheduler whose steps need no earlier ones.

        Args:
            latent: [batch, ...] float32.
            velocity: same shape: the model's prediction after guidance.
            step: index in the loop.

        Raises:
            ValueError: this one does; take its steps with `begin`.
        """
        return self.updates[step](latent, velocity)


def make_schedule(
    scheduler: FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler, steps: int, image_tokens: int | None = None
) -> Schedule:
    """The sigmas and timesteps that diffusers' pipelines use with this scheduler.

    Flux and Z-Image ask for the sigmas 1 to 1/steps, shifted as the scheduler says. Wan takes the scheduler's own
    spacing; of UniPC, which combines the predictions of several steps, the loop takes the spacing alone.

    Args:
        scheduler: with or without dynamic shifting, which needs the image tokens.
        steps: number of denoising steps, at least 1.
        image_tokens: length of the image sequence; dynamic shifting depends on it. None for the scheduler's spacing.

    Raises:
        UserError: fewer than one step, more than the scheduler has, or dynamic shifting without image tokens.
        MismatchError: as `linear_updates`.
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
    schedule = Schedule(
        sigmas=tuple(float(s) for s in scheduler.sigmas),
        timesteps=tuple(float(t) for t in scheduler.timesteps),
        scheduler_config=_euler_config(scheduler, steps),
    )
    _require_falling(schedule)
    if type(scheduler).__name__ == UNIPC:
        return schedule
    return replace(schedule, updates=linear_updates(scheduler))


def _euler_config(scheduler: FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler, steps: int) -> dict[str, Any]:
    """The configuration of the scheduler with which a pipeline takes the same steps.

    UniPC of first order without its corrector is DDIM, which on a flow is Euler's method: with sigma s before and t
    after the step and x0 = x - s v, t/s x + (1 - t/s) x0 = x + (t - s) v.
    """
    name = type(scheduler).__name__
    config = {"_class_name": name, **{k: v for k, v in scheduler.config.items() if not k.startswith("_")}}
    # Of its two solver types, bh1 divides infinities in the step to sigma 0.
    first_order = {"solver_order": 1, "solver_type": "bh2", "disable_corrector": list(range(steps))}
    return config | first_order if name == UNIPC else config


def _require_falling(schedule: Schedule) -> None:
    """Refuse steps that go nowhere.

    Raises:
        UserError: names the first.
    """
    for step, (sigma, following) in enumerate(pairwise(schedule.sigmas)):
        if not sigma > following:  # NaN falls nowhere
            raise UserError(
                f"step {step} of {schedule.steps}: the scheduler's sigma is {sigma:g} and then {following:g}, expected "
                "one that falls; pass fewer --steps, or save the pipeline with another scheduler"
            )
    if not schedule.timesteps[-1] > 0:
        raise UserError(
            f"step {schedule.steps - 1}: the scheduler's timestep is {schedule.timesteps[-1]:g}, expected more than 0; "
            "pass fewer --steps, or save the pipeline with another scheduler"
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
