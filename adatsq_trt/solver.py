"""A scheduler's step as linear coefficients, and the denoising loop that calibration and all backends run with them.

A step of every scheduler here is linear in the latents and velocities so far. With sigma[s] the noise level at which
the model was asked, and the clean latent d[s] = x[s] - sigma[s] v[s] that it predicted there,

    x[t+1] = a x[t] + b v[t] + c[1] d[t-1] + c[2] d[t-2] + …

Euler's method has a = 1, b = sigma[t+1] - sigma[t] and no c; DPM-Solver++ of second order has c[1]; UniPC's corrector
reaches back as many steps as its order.

The coefficients do not depend on any tensor, so they are known before the loop: nothing in it looks up an index or
waits for a device, as diffusers' `step` does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar, cast

import numpy as np

from adatsq_trt.errors import MismatchError

# An array of NumPy, or a tensor of PyTorch on any device: what follows is the same for both.
Latent = TypeVar("Latent", bound=Any)

# Schedulers compute in float32: what is left of a step that is linear, and how far two runs of it are apart.
_RESIDUAL = 1e-5
# Of numbers that are tried: noise shows beside small ones, and thresholds beside large ones.
_SIZES = (1, 1000)
# Earlier steps that a solver may look back to.
_MOST_EARLIER = 4


@dataclass(frozen=True)
class Update:
    """The coefficients of one step.

    Attributes:
        latent: a.
        velocity: b.
        clean: c[1], c[2], …: of the clean latents that were predicted in the steps before, the latest first.
    """

    latent: float
    velocity: float
    clean: tuple[float, ...] = ()

    def __call__(self, latent: Latent, velocity: Latent, clean: Sequence[Latent] = ()) -> Latent:
        """The next latent, of the shape and type of this one.

        Args:
            latent: x[t], float32.
            velocity: v[t], after guidance.
            clean: d[t-1], d[t-2], …, at least as many as there are coefficients.

        Raises:
            ValueError: too few of them.
        """
        if len(clean) < len(self.clean):
            raise ValueError(f"got {len(clean)} earlier predictions, this step combines {len(self.clean)}")
        following: Any = latent if self.latent == 1 else self.latent * latent
        following = following + self.velocity * velocity
        for factor, earlier in zip(self.clean, clean, strict=False):
            following = following + factor * earlier
        return cast(Latent, following)


def guide(prediction: Latent, samples: int, guidance: float) -> Latent:
    """Classifier-free guidance, v0 + guidance (v - v0) (Ho and Salimans 2022, eq. 6).

    Args:
        prediction: [2 samples, ...], conditional rows first; or [samples, ...], which is the velocity itself.
        samples: how many there are.
        guidance: its scale.
    """
    if len(prediction) == samples:
        return prediction
    conditional, unconditional = prediction[:samples], prediction[samples:]
    guided: Latent = unconditional + guidance * (conditional - unconditional)
    return guided


class Denoising(Generic[Latent]):
    """A run of the loop, from noise to the last latent.

    Attributes:
        latent: after the steps that are done, float32 [samples, ...].
        step: the one that comes next.
    """

    def __init__(self, updates: Sequence[Update], sigmas: Sequence[float], noise: Latent) -> None:
        """Begin before the first step; see `Schedule.begin`.

        Args:
            updates: of every step.
            sigmas: noise level of every step.
            noise: the first latent.
        """
        self._updates, self._sigmas = updates, sigmas
        self.latent, self.step = noise, 0
        self._clean: tuple[Latent, ...] = ()
        self._most = max((len(update.clean) for update in updates), default=0)

    def advance(self, velocity: Latent) -> None:
        """Take a step with the model's prediction, after guidance."""
        following = self._updates[self.step](self.latent, velocity, self._clean)
        if self._most:
            clean = self.latent - self._sigmas[self.step] * velocity
            self._clean = (clean, *self._clean[: self._most - 1])
        self.latent, self.step = following, self.step + 1

    def run(self, velocity: Callable[[Latent, int], Latent]) -> Iterator[Latent]:
        """Take all steps that are left.

        Args:
            velocity: (latent, step) → the model's prediction, after guidance.

        Yields:
            The latent after each step.
        """
        while self.step < len(self._updates):
            self.advance(velocity(self.latent, self.step))
            yield self.latent


def euler_updates(sigmas: Sequence[float]) -> tuple[Update, ...]:
    """Euler's method: x[t+1] = x[t] + (sigma[t+1] - sigma[t]) v, the difference rounded to float32 once."""
    return tuple(Update(1.0, float(np.float32(following - sigma))) for sigma, following in pairwise(sigmas))


def linear_updates(scheduler: Any) -> tuple[Update, ...]:
    """The coefficients of a scheduler of diffusers, found by stepping a copy of it with unit vectors.

    Args:
        scheduler: after `set_timesteps`.

    Raises:
        MismatchError: its step is not linear, not finite, draws noise, or depends on more than the last steps; names
            its class.
    """
    steps, name = len(scheduler.timesteps), type(scheduler).__name__
    # Row t: x[t] in the basis of x[0], v[0], v[1], …
    unit = np.eye(steps + 1)
    rows = _run(scheduler, unit[0], unit[1:])
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise MismatchError(
            f"the scheduler {name} is not followed: its step {int(finite.argmin()) - 1} gives NaN or "
            "infinite latents; save the pipeline with other options of it, such as solver_type 'bh2'"
        )
    if not all(_follows(scheduler, rows, size) for size in _SIZES):
        raise MismatchError(
            f"the scheduler {name} is not followed: its step draws noise, or is not linear in the latents and "
            "predictions; take these options out, or save the pipeline with FlowMatchEulerDiscreteScheduler"
        )
    sigmas = [float(sigma) for sigma in scheduler.sigmas[:steps]]
    clean = [rows[step] - sigma * unit[step + 1] for step, sigma in enumerate(sigmas)]
    return tuple(
        _fit(name, rows[step + 1], rows[step], step, [clean[s] for s in range(step - 1, -1, -1)])
        for step in range(steps)
    )


def _follows(scheduler: Any, rows: np.ndarray, size: float) -> bool:
    """Whether the loop is these combinations of its noise and velocities, for random ones of a size."""
    generator = np.random.default_rng(0)
    values = size * generator.standard_normal((len(rows), 8))
    difference = np.abs(_run(scheduler, values[0], values[1:]) - rows @ values).max()
    return bool(difference <= _RESIDUAL * size * np.abs(rows).sum(axis=1).max())


def _fit(name: str, following: np.ndarray, latent: np.ndarray, step: int, clean: Sequence[np.ndarray]) -> Update:
    """A step in terms of the latent, the velocity and as few clean latents as it takes."""
    velocity = float(following[step + 1])  # nothing before contains it
    rest = following.copy()
    rest[step + 1] = 0
    if np.array_equal(rest, latent):
        return Update(1.0, velocity)
    for count in range(min(len(clean), _MOST_EARLIER) + 1):
        known = np.stack([latent, *clean[:count]], axis=1)
        factors, *_ = np.linalg.lstsq(known, rest)
        if np.abs(known @ factors - rest).max() <= _RESIDUAL:
            return Update(float(factors[0]), velocity, tuple(map(float, factors[1:])))
    raise MismatchError(
        f"the scheduler {name} is not followed: its step {step} depends on more than the latent and the "
        f"{_MOST_EARLIER} predictions before; save the pipeline with FlowMatchEulerDiscreteScheduler"
    )


def _run(scheduler: Any, start: np.ndarray, velocities: np.ndarray) -> np.ndarray:
    """The latents of a loop in which the model predicts these velocities.

    Args:
        scheduler: after `set_timesteps`; left alone.
        start: [numbers].
        velocities: [steps, numbers].

    Returns:
        float64 [steps + 1, numbers].
    """
    import torch

    own = copy.deepcopy(scheduler)
    own.sigmas = own.sigmas.double()
    own.set_begin_index(0)
    # Some schedulers take images only.
    latents = [torch.from_numpy(start)[:, None, None, None]]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for time, velocity in zip(own.timesteps, velocities, strict=True):
            prediction = torch.from_numpy(velocity)[:, None, None, None]
            latents.append(own.step(prediction, time, latents[-1], return_dict=False)[0])
    return np.stack([latent.flatten().double().numpy() for latent in latents])
