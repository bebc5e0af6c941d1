"""`--steps`, or `--sigmas` and `--timesteps` in its place: refused here where the pipeline does not take them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from adatsq_trt.amounts import parse_falling
from adatsq_trt.checkpoints.loading import silence
from adatsq_trt.config import BuildConfig
from adatsq_trt.errors import MismatchError, UserError
from adatsq_trt.models.families import family_of_transformer
from adatsq_trt.schedule import TRAIN_TIMESTEPS, Schedule, Spacing
from adatsq_trt.stages.models import OpenedModel

if TYPE_CHECKING:
    from adatsq_trt.models.family import Family

# Noise that is left to the image where a scheduler keeps clear of the noise level 1.
_NEARLY_ALL = 1 - 1e-5


def step_settings(config: BuildConfig, opened: OpenedModel) -> dict[str, Any]:
    """Settings of the steps, by name.

    Args:
        config: choices of the build.
        opened: the model.

    Raises:
        UserError: options that do not go together, or that the pipeline or its scheduler does not take.
    """
    family, model = _family(opened), opened.outline
    spacing = _asked(config)
    if spacing is None:
        steps = model.default_steps if config.steps is None else config.steps
        _require_noise(family, model.adapter.schedule(steps))
        return {"steps": steps}
    _require_argument(family, spacing)
    try:
        schedule = model.adapter.schedule(spacing)
    except TypeError as error:  # an adapter that computes with a number of steps
        raise MismatchError(
            f"--{spacing.argument}: the schedule of {family.pipeline} depends on a number of steps, and its adapter "
            "takes no list; pass --steps instead"
        ) from error
    _require_noise(family, schedule)
    return {"steps": schedule.steps, spacing.argument: spacing.values}


def _family(opened: OpenedModel) -> Family:
    if opened.pipeline is not None:
        return opened.pipeline.source.family
    family = family_of_transformer(opened.outline.adapter.architecture)
    assert family is not None  # models of the zoo have one
    return family


def _asked(config: BuildConfig) -> Spacing | None:
    """The list that takes the place of a number of steps.

    Raises:
        UserError: two lists, a list and another number of steps, or no list of such numbers.
    """
    if config.sigmas is not None and config.timesteps is not None:
        raise UserError("--sigmas and --timesteps: expected one of them; leave the other out")
    spacing = None
    if config.sigmas is not None:
        spacing = Spacing("sigmas", parse_falling(config.sigmas, "--sigmas", 1))
    if config.timesteps is not None:
        spacing = Spacing("timesteps", parse_falling(config.timesteps, "--timesteps", TRAIN_TIMESTEPS))
    if spacing is not None and config.steps not in (None, len(spacing.values)):
        raise UserError(
            f"--steps {config.steps}: --{spacing.argument} has {len(spacing.values)} numbers, which are as many steps; "
            "leave --steps out"
        )
    return spacing


def _require_argument(family: Family, spacing: Spacing) -> None:
    """Refuse a list that the pipeline's call has no argument for.

    Raises:
        MismatchError: names the pipeline.
    """
    silence()  # importing a pipeline's class says what its processors could do
    arguments = inspect.signature(family.load_pipeline_class().__call__).parameters
    if spacing.argument in arguments:
        return
    instead = "--sigmas" if "sigmas" in arguments else "--steps"
    raise MismatchError(
        f"--{spacing.argument}: {family.pipeline} has no such argument, whatever its scheduler; pass {instead} instead"
    )


def _require_noise(family: Family, schedule: Schedule) -> None:
    """Refuse a first step at which the pipeline mixes its image into the noise.

    Raises:
        MismatchError: names the noise level.
    """
    condition = family.image_condition
    if condition is not None and condition.mixed and schedule.sigmas[0] < _NEARLY_ALL:
        raise MismatchError(
            f"the first step is at sigma {schedule.sigmas[0]:g}, where {family.pipeline} begins with a part of its "
            "image, which is not followed; expected 1: let --sigmas begin with 1, or save the pipeline with another "
            "scheduler"
        )
