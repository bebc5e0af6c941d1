"""The denoising schedule: step index, timestep and sigma, taken from diffusers' schedulers of a flow."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from adatsq_trt.errors import MismatchError, UserError, one_line
from adatsq_trt.solver import Denoising, Latent, Solver, Update, euler_updates, linear_updates

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

TRAIN_TIMESTEPS = 1000
EULER, HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
UNIPC, DPM = "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"
# As a pipeline with two transformers calls them, in the order in which they denoise.
FIRST_EXPERT, SECOND_EXPERT = EXPERTS = ("transformer", "transformer_2")
# That are followed.
SCHEDULERS = (EULER, UNIPC, DPM, HEUN)


@dataclass(frozen=True)
class Spacing:
    """A list that a pipeline is called with in the place of a number of steps.

    Attributes:
        argument: of the pipeline's call.
        values: falling, one for each step: noise levels in (0, 1], which the scheduler still shifts, or timesteps in
            (0, 1000].
    """

    argument: Literal["sigmas", "timesteps"]
    values: tuple[float, ...]


# Calls of the model, or the list that says how many and where.
Steps: TypeAlias = int | Spacing


@dataclass(frozen=True)
class Schedule:
    """Steps of one denoising run: a step is a call of the model.

    Attributes:
        sigmas: noise level at the start of each step and, last, at the end of the loop: `steps + 1` numbers, 1 to 0.
        timesteps: the scheduler's timestep at each step: `steps` numbers in (0, 1000].
        scheduler_config: of the diffusers scheduler that takes these very steps, with its class (`scheduler`).
        updates: update rule of each step; Euler's method unless given.
        experts: part of the pipeline that each step calls; none for a pipeline with one transformer.
        spacing: list that the scheduler was given; None where it was given a number of steps.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    scheduler_config: dict[str, Any]
    updates: tuple[Update, ...] = ()
    experts: tuple[str, ...] = ()
    spacing: Spacing | None = None

    def __post_init__(self) -> None:
        """Take Euler's steps where no others are given."""
        if not self.updates:
            object.__setattr__(self, "updates", euler_updates(self.sigmas))

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return len(self.timesteps)

    @property
    def pipeline_steps(self) -> int:
        """The pipeline's `num_inference_steps`: Heun's method has two calls of the model in each of them."""
        calls = calls_per_step(self.scheduler_config.get("_class_name"))
        return (self.steps + calls - 1) // calls

    @property
    def pipeline_argument(self) -> dict[str, int | list[float]]:
        """The argument with which a pipeline takes these steps, by its name."""
        if self.spacing is None:
            return {"num_inference_steps": self.pipeline_steps}
        return {self.spacing.argument: list(self.spacing.values)}

    @property
    def is_euler(self) -> bool:
        """Whether all steps are Euler's."""
        return tuple(self.updates) == euler_updates(self.sigmas)

    @property
    def solver(self) -> Solver:
        """The arithmetic of the steps."""
        return Solver(self.updates, self.sigmas)

    def scheduler(self) -> SchedulerMixin:
        """The scheduler of diffusers with which a pipeline takes these very steps."""
        import diffusers

        name = self.scheduler_config.get("_class_name")
        return getattr(diffusers, name if name in SCHEDULERS else EULER).from_config(self.scheduler_config)

    def expert(self, step: int) -> str:
        """The part of the pipeline that a step calls; "" in a pipeline with one transformer."""
        return self.experts[step] if self.experts else ""

    def model_time(self, step: int) -> float:
        """Return the time input of a trace module at `step`: timestep / 1000, in (0, 1]."""
        return self.timesteps[step] / TRAIN_TIMESTEPS

    def begin(self, noise: Latent) -> Denoising[Latent]:
        """A run of the loop from this noise, float32 [samples, ...]."""
        return Denoising(self.solver, noise)

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


def calls_per_step(scheduler: object) -> int:
    """Calls of the model in a step of a pipeline, but for the last, which has one; by the scheduler's class."""
    return 2 if scheduler == HEUN else 1


def make_schedule(
    scheduler: Any,
    steps: Steps,
    image_tokens: int | None = None,
    *,
    mu: float | None = None,
    leaves_flows: bool = False,
) -> Schedule:
    """The steps that diffusers' pipelines take with this scheduler.

    Flux and Z-Image ask for the sigmas 1 to 1/steps, shifted as the scheduler says; Wan, and Flux where the scheduler
    has sigmas of a flow, take the scheduler's own spacing. A list stands in the place of either.

    Args:
        scheduler: one of `SCHEDULERS`, with or without dynamic shifting, which needs the image tokens.
        steps: calls of the model, at least 1, and an odd number of them by Heun's method; or a list.
        image_tokens: length of the image sequence; dynamic shifting depends on it. None for the scheduler's spacing.
        mu: of dynamic shifting, for pipelines that compute it in their own way.
        leaves_flows: a pipeline with image tokens leaves the spacing to a scheduler with sigmas of a flow.

    Raises:
        UserError: fewer than one step, more than the scheduler has, an even number by Heun's method, or dynamic
            shifting without image tokens.
        MismatchError: as `linear_updates`; or a list that the pipeline or the scheduler does not take.
    """
    name, option = type(scheduler).__name__, scheduler.config.get
    if not isinstance(steps, Spacing) and steps < 1:
        raise UserError(f"steps: got {steps}, expected at least 1; pass --steps with a positive number")
    config = {"_class_name": name, **{k: v for k, v in scheduler.config.items() if _is_recorded(k, v)}}
    if image_tokens is None and option("use_dynamic_shifting"):
        raise UserError("the scheduler shifts dynamically, expected a fixed shift; set use_dynamic_shifting to false")
    shift = {} if image_tokens is None else {"mu": _dynamic_shift(scheduler, image_tokens, mu)}
    leaves = image_tokens is None or (leaves_flows and option("use_flow_sigmas"))
    if isinstance(steps, Spacing):
        _set_custom(scheduler, steps, shift, leaves_all=leaves and image_tokens is not None)
    elif leaves:
        scheduler.set_timesteps(_pipeline_steps(name, steps), **shift)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), **shift)
    schedule = Schedule(
        sigmas=tuple(float(s) for s in scheduler.sigmas),
        timesteps=tuple(float(t) for t in scheduler.timesteps),
        scheduler_config=config,
        spacing=steps if isinstance(steps, Spacing) else None,
    )
    _require_falling(schedule)
    return replace(schedule, updates=linear_updates(scheduler))


def _set_custom(scheduler: Any, spacing: Spacing, shift: dict[str, float | None], *, leaves_all: bool) -> None:
    """Give the scheduler a list, as `retrieve_timesteps` of diffusers' pipelines does.

    Args:
        scheduler: of the pipeline.
        spacing: the list.
        shift: arguments beside it.
        leaves_all: the pipeline leaves the spacing to the scheduler even where it was given a list.

    Raises:
        MismatchError: the pipeline or the scheduler does not take it; says which.
    """
    name, option = type(scheduler).__name__, f"--{spacing.argument}"
    if leaves_all:
        raise MismatchError(
            f"{option}: with the scheduler {name}, whose option use_flow_sigmas is true, the pipeline ignores them; "
            f"leave them out, or save the pipeline with {EULER}"
        )
    if shift and spacing.argument == "timesteps":
        raise MismatchError(
            f"{option}: the pipeline asks for sigmas of its own, and diffusers takes one list; pass --steps"
        )
    if spacing.argument not in inspect.signature(scheduler.set_timesteps).parameters:
        raise MismatchError(
            f"{option}: the scheduler {name} takes none; leave them out, or save the pipeline with {EULER}"
        )
    try:
        # An array, since UniPC multiplies it.
        scheduler.set_timesteps(**{spacing.argument: np.array(spacing.values)}, **shift)
    except (TypeError, ValueError, ArithmeticError) as error:  # what is raised depends on the scheduler's options
        raise MismatchError(
            f"{option}: the scheduler {name} does not take them ({one_line(error)}); leave them out, or save the "
            f"pipeline with {EULER}"
        ) from error


def _is_recorded(option: str, value: object) -> bool:
    """Whether an option is the scheduler's own; JSON has no infinity, which is a default where it occurs."""
    return not option.startswith("_") and not (isinstance(value, float) and math.isinf(value))


def _pipeline_steps(scheduler: str, steps: int) -> int:
    """Steps as the scheduler counts them.

    Raises:
        UserError: no number of them has so many calls of the model.
    """
    calls = calls_per_step(scheduler)
    if (steps + calls - 1) % calls:
        raise UserError(
            f"steps: got {steps}, expected an odd number: {scheduler} calls the model twice in each step but the last; "
            f"pass --steps {steps + 1} for num_inference_steps={steps // 2 + 1} of the pipeline"
        )
    return (steps + calls - 1) // calls


def _require_falling(schedule: Schedule) -> None:
    """Refuse steps that go nowhere.

    Raises:
        UserError: names the first.
    """
    calls, spacing = calls_per_step(schedule.scheduler_config["_class_name"]), schedule.spacing
    advice = "pass fewer --steps" if spacing is None else f"pass other --{spacing.argument}"
    for step, (sigma, following) in enumerate(pairwise(schedule.sigmas)):
        # Heun's method calls the model twice at a noise level, from the second on.
        stays = calls == 2 and step % 2 == 1 and sigma == following
        if not (stays or sigma > following):  # NaN falls nowhere
            raise UserError(
                f"step {step} of {schedule.steps}: the scheduler's sigma is {sigma:g} and then {following:g}, expected "
                f"one that falls; {advice}, or save the pipeline with another scheduler"
            )
    if not schedule.timesteps[-1] > 0:
        raise UserError(
            f"step {schedule.steps - 1}: the scheduler's timestep is {schedule.timesteps[-1]:g}, expected more than 0; "
            f"{advice}, or save the pipeline with another scheduler"
        )


def _dynamic_shift(scheduler: Any, image_tokens: int, mu: float | None) -> float | None:
    """Compute mu, which is linear in the sequence length between the scheduler's two anchors; None for a fixed shift.

    The anchors are the pipelines' own where the scheduler has none. A mu that is given is taken as it is.
    """
    option = scheduler.config.get
    if not option("use_dynamic_shifting"):
        return None
    if mu is not None:
        return mu
    least, most = option("base_image_seq_len", 256), option("max_image_seq_len", 4096)
    low, high = option("base_shift", 0.5), option("max_shift", 1.15)
    return float(low + (high - low) / (most - least) * (image_tokens - least))


def guidance_at(schedule: Schedule, step: int, guidance: float, guidance_2: float | None) -> float:
    """The scale of guidance of a step: the second expert has its own, where there is one and it is given."""
    return guidance if guidance_2 is None or schedule.expert(step) != SECOND_EXPERT else guidance_2


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
