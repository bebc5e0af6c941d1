"""Which step of the loop a pipeline is at: pipelines pass a timestep as a tensor and do not tell its index."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from adatsq_trt.errors import MismatchError
from adatsq_trt.schedule import Schedule

# A pipeline in bfloat16 rounds its timesteps to eight significant bits, before it divides them by 1000 and afterwards.
_TOLERANCE = 2 * 2.0**-8


class StepClock:
    """Reads timesteps that are on the processor; of those on a device only the first of a generation.

    Some schedulers have several steps with one timestep, as Heun's method has; then too only the first is read. From
    there the steps follow in order: a pipeline calls each branch of guidance once per step. Some tell the index
    when they announce a branch, and then none is read. What is passed is compared on the device, without waiting: after
    a timestep that is not the expected one all predictions are NaN, and the end of the generation says why.
    """

    def __init__(self) -> None:
        """Before the first generation."""
        self._branch: str | None = None
        self._told: tuple[int | None, int | None] = (None, None)
        self._forget()

    def _forget(self) -> None:
        self._schedule: Schedule | None = None
        self._at = 0
        self._seen: set[str | None] = set()
        self._strayed: Tensor | None = None

    def enter(self, branch: str | None, step: int | None = None, steps: int | None = None) -> None:
        """The calls that follow are of this branch of guidance; None where a call has all.

        Args:
            branch: its name.
            step: index in the pipeline's loop, where the pipeline tells it.
            steps: length of that loop, likewise.
        """
        self._branch, self._told = branch, (step, steps)

    def finish(self) -> None:
        """A generation has ended, or another begins: the next timestep is read.

        Raises:
            MismatchError: one of the timesteps was not that of its step; waits for the device to know.
        """
        strayed, schedule = self._strayed, self._schedule
        self._forget()
        if schedule is not None and strayed is not None and bool(strayed.cpu()):
            raise MismatchError(
                f"the pipeline's timesteps are not the bundle's, so its latents are NaN; {_ask(schedule)}"
            )

    def step(self, time: Tensor, schedule: Schedule) -> int:
        """The step of a call.

        Args:
            time: [rows], timestep / 1000; one step for all rows.
            schedule: of the call's size.

        Raises:
            MismatchError: none of the schedule's steps; or as `finish`.
        """
        if time.device.type == "cpu":
            if len(set(schedule.timesteps)) == schedule.steps:
                return find_step(time.detach().float().numpy(), schedule)
            self._require_branch(schedule)
        told, steps = self._told
        if told is not None and steps == schedule.steps:
            self._at, self._schedule = told, schedule
            self._compare(time, schedule.model_time(told))
            return told
        if self._schedule == schedule and self._branch in self._seen:
            self._at, self._seen = self._at + 1, set()
        if self._schedule != schedule or self._at == schedule.steps:
            self.finish()
            self._at = find_step(time.detach().float().cpu().numpy(), schedule)
            self._schedule = schedule
        else:
            self._compare(time, schedule.model_time(self._at))
        self._seen.add(self._branch)
        return self._at

    def _require_branch(self, schedule: Schedule) -> None:
        if self._branch is None:
            raise MismatchError(
                f"two of the bundle's {schedule.steps} steps have the same timestep, by which a pipeline tells its "
                "step unless it announces branches of guidance; build a bundle with fewer --steps, or run this one "
                "with Bundle.denoise"
            )

    def _compare(self, time: Tensor, expected: float) -> None:
        strays = (time.detach().float() - expected).abs().amax() > _TOLERANCE * expected
        self._strayed = strays if self._strayed is None else self._strayed | strays

    def checked(self, velocity: Tensor) -> Tensor:
        """A prediction, or NaN where the pipeline has strayed from the schedule."""
        return velocity if self._strayed is None else velocity.masked_fill(self._strayed, torch.nan)


def find_step(time: np.ndarray, schedule: Schedule) -> int:
    """The step that timesteps belong to, the first of several.

    Args:
        time: float32 [rows], timestep / 1000.
        schedule: of the call's size.

    Raises:
        MismatchError: they belong to none.
    """
    times = np.asarray([schedule.model_time(step) for step in range(schedule.steps)])
    step = int(np.abs(times - time.flat[0]).argmin())
    if np.abs(time - times[step]).max() > _TOLERANCE * times[step]:
        raise MismatchError(
            f"timestep: got {time.min():.6g} to {time.max():.6g}, the nearest step of the bundle is {times[step]:.6g}; "
            f"{_ask(schedule)}"
        )
    return step


def _ask(schedule: Schedule) -> str:
    ((name, value),) = schedule.pipeline_argument.items()
    return (
        f"call the pipeline with {name}={value}, the scheduler that the bundle was "
        "built with and the image size that it was exported for"
    )
