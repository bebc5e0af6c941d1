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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar, cast

import numpy as np

from adatsq_trt.errors import MismatchError, one_line

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


def guide(prediction: Latent, samples: int, guidance: float, rescaled: bool = False) -> Latent:
    """Classifier-free guidance, w = v0 + guidance (v - v0) (Ho and Salimans 2022, eq. 6).

    Args:
        prediction: [2 samples, ...], conditional rows first; or [samples, ...], which is the velocity itself.
        samples: how many there are.
        guidance: its scale.
        rescaled: every token of w gets the Euclidean norm of v's, w |v| / |w|, as Qwen-Image's pipelines do.
    """
    if len(prediction) == samples:
        return prediction
    conditional, unconditional = prediction[:samples], prediction[samples:]
    guided: Latent = unconditional + guidance * (conditional - unconditional)
    if not rescaled:
        return guided
    return cast(Latent, guided * (_token_norms(conditional) / _token_norms(guided)))


def _token_norms(tokens: Latent) -> Latent:
    """Euclidean norms over the last axis, which stays with one element."""
    return cast(Latent, (tokens * tokens).sum(axis=-1, keepdims=True) ** 0.5)


@dataclass(frozen=True)
class State(Generic[Latent]):
    """Tensors that a loop carries from step to step; or, as an adjoint, the gradient of a loss for each of them.

    Attributes:
        latent: x[t], float32 [samples, ...].
        clean: d[t-1], d[t-2], …, as many as a later step combines; none for Euler's method.
    """

    latent: Latent
    clean: tuple[Latent, ...] = ()

    def each(self, change: Callable[[Latent], Latent]) -> State[Latent]:
        """The same change of the latent and of each clean one."""
        return State(change(self.latent), tuple(map(change, self.clean)))

    def __getitem__(self, index: Any) -> State[Latent]:
        """The same part of each."""
        return self.each(lambda value: cast(Latent, value[index]))

    def named(self, name: str) -> dict[str, Latent]:
        """The tensors of a file that holds it, which `from_named` takes back."""
        return {name: self.latent, **{f"{name}.{back}": value for back, value in enumerate(self.clean, 1)}}

    @staticmethod
    def from_named(tensors: Mapping[str, Latent], name: str) -> State[Latent]:
        """Read the tensors that `named` wrote."""
        count = sum(key.startswith(f"{name}.") for key in tensors)
        return State(tensors[name], tuple(tensors[f"{name}.{back}"] for back in range(1, count + 1)))

    @staticmethod
    def joined(states: Sequence[State[Latent]], join: Callable[[list[Latent]], Latent]) -> State[Latent]:
        """One state of several that are at the same step.

        Args:
            states: at least one.
            join: makes one tensor of several.
        """
        clean = zip(*(state.clean for state in states), strict=True)
        return State(join([state.latent for state in states]), tuple(join(list(same)) for same in clean))


@dataclass(frozen=True)
class Solver:
    """The steps of a loop.

    Attributes:
        updates: of every step.
        sigmas: noise level of every step, at least.
    """

    updates: Sequence[Update]
    sigmas: Sequence[float]

    @property
    def memory(self) -> int:
        """Most clean latents of earlier steps that a step combines."""
        return max((len(update.clean) for update in self.updates), default=0)

    def own_part(self, latent: Latent, velocity: Latent, step: int) -> State[Latent]:
        """This step's own part of the next state: the latent without earlier ones, and d[t] where it is carried.

        Args:
            latent: x[t], float32 [samples, ...].
            velocity: v[t], after guidance.
            step: t.
        """
        update = self.updates[step]
        own = Update(update.latent, update.velocity)
        return State(own(latent, velocity), self._carried(latent, velocity, step))

    def following(self, state: State[Latent], velocity: Latent, step: int) -> State[Latent]:
        """The state after a step.

        Args:
            state: before it.
            velocity: the model's prediction there, after guidance.
            step: its index.

        Raises:
            ValueError: the state has fewer clean latents than the step combines.
        """
        latent = self.updates[step](state.latent, velocity, state.clean)
        carried = self._carried(state.latent, velocity, step)
        return State(latent, (*carried, *state.clean)[: self.memory])

    def _carried(self, latent: Latent, velocity: Latent, step: int) -> tuple[Latent, ...]:
        """d[t], if a later step may combine it."""
        return (latent - self.sigmas[step] * velocity,) if self.memory else ()

    def adjoint_of_clean(self, adjoint: State[Latent], step: int) -> tuple[Latent, ...]:
        """∂L/∂d[t-1], ∂L/∂d[t-2], …: the coefficients of `following`, transposed.

        Args:
            adjoint: ∂L/∂x[t+1] and ∂L/∂d[t], ∂L/∂d[t-1], …; without the latter after the last step of all.
            step: t.
        """
        factors, later = self.updates[step].clean, adjoint.clean[1:]
        gradients: list[Any] = []
        for back in range(min(step, self.memory)):
            own: Any = (factors[back] if back < len(factors) else 0.0) * adjoint.latent
            gradients.append(own + later[back] if back < len(later) else own)
        return tuple(gradients)


class Denoising(Generic[Latent]):
    """A run of the loop, from noise to the last latent.

    Attributes:
        state: after the steps that are done.
        step: the one that comes next.
    """

    def __init__(self, solver: Solver, noise: Latent) -> None:
        """Begin before the first step; see `Schedule.begin`.

        Args:
            solver: the steps.
            noise: the first latent, float32 [samples, ...].
        """
        self._solver = solver
        self.state, self.step = State(noise), 0

    @property
    def latent(self) -> Latent:
        """After the steps that are done, float32 [samples, ...]."""
        return self.state.latent

    def advance(self, velocity: Latent) -> None:
        """Take a step with the model's prediction, after guidance."""
        self.state = self._solver.following(self.state, velocity, self.step)
        self.step += 1

    def run(self, velocity: Callable[[Latent, int], Latent]) -> Iterator[Latent]:
        """Take all steps that are left.

        Args:
            velocity: (latent, step) → the model's prediction, after guidance.

        Yields:
            The latent after each step.
        """
        while self.step < len(self._solver.updates):
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

    Raises:
        MismatchError: it fails; names the step.
    """
    import torch

    own = copy.deepcopy(scheduler)
    own.sigmas = own.sigmas.double()
    own.set_begin_index(0)
    # Some schedulers take images only.
    latents = [torch.from_numpy(start)[:, None, None, None]]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for step, (time, velocity) in enumerate(zip(own.timesteps, velocities, strict=True)):
            prediction = torch.from_numpy(velocity)[:, None, None, None]
            try:
                latents.append(own.step(prediction, time, latents[-1], return_dict=False)[0])
            except (RuntimeError, ValueError, TypeError) as error:  # what is raised depends on the options
                raise MismatchError(
                    f"the scheduler {type(scheduler).__name__} is not followed: its step {step} fails "
                    f"({one_line(error)}); save the pipeline with other options of it, or with another scheduler"
                ) from error
    return np.stack([latent.flatten().double().numpy() for latent in latents])
