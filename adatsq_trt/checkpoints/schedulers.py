"""The schedulers that are followed, option by option: each is followed, of no effect, or refused by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue, model_validator

from adatsq_trt.errors import DamagedFileError, MismatchError, one_line
from adatsq_trt.files import read_json_model
from adatsq_trt.models.family import AGAIN, Family, JsonObject
from adatsq_trt.schedule import DPM, EULER, HEUN, SCHEDULERS, TRAIN_TIMESTEPS, UNIPC
from adatsq_trt.zoo.loading import SCHEDULER_CONFIG

if TYPE_CHECKING:
    from adatsq_trt.models.adapter import ModelAdapter

_INFINITE = "lambda_min_clipped"
_ADVICE = "correct it, or save or download the pipeline again"


@dataclass(frozen=True)
class SchedulerOptions:
    """Options of a class of schedulers: followed, without effect, or followed at one value only.

    Attributes:
        followed: decide sigmas, timesteps and steps, which are the scheduler's own.
        idle: have no effect under the values that are required.
        required: option → its one value that is followed.
    """

    followed: frozenset[str]
    idle: frozenset[str]
    required: Mapping[str, JsonValue] = field(default_factory=dict)


# Of a variance-preserving diffusion, whose noise levels are not those of a flow.
_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
_SPACING = ("timestep_spacing", "steps_offset")
_OF_THRESHOLDING = ("dynamic_thresholding_ratio", "sample_max_value")
_MULTISTEP = ("solver_order", "solver_type", "lower_order_final", "flow_shift", "use_dynamic_shifting")
_OF_FLOWS: dict[str, JsonValue] = {
    "num_train_timesteps": TRAIN_TIMESTEPS,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "use_exponential_sigmas": False,  # of a variance-preserving diffusion
    "use_beta_sigmas": False,  # likewise
    "thresholding": False,  # steps that are not linear
    "final_sigmas_type": "zero",
}

OPTIONS = {
    EULER: SchedulerOptions(
        followed=frozenset(
            {
                *("shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len"),
                *("max_image_seq_len", "time_shift_type", "shift_terminal"),
                *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
            }
        ),
        idle=frozenset(),
        required={
            "num_train_timesteps": TRAIN_TIMESTEPS,
            "invert_sigmas": False,  # sigmas that rise
            "stochastic_sampling": False,  # fresh noise in every step
        },
    ),
    HEUN: SchedulerOptions(
        followed=frozenset({"shift"}), idle=frozenset(), required={"num_train_timesteps": TRAIN_TIMESTEPS}
    ),
    UNIPC: SchedulerOptions(
        # Betas are of Karras' sigmas.
        followed=frozenset(
            {
                *_MULTISTEP,
                *_BETAS,
                *("disable_corrector", "time_shift_type", "shift_terminal"),
                *("use_karras_sigmas", "sigma_min", "sigma_max"),
            }
        ),
        idle=frozenset({*_OF_THRESHOLDING, *_SPACING}),
        required={
            **_OF_FLOWS,
            "predict_x0": True,  # without it, diffusers' UniPC steps along no flow
            "solver_p": None,
        },
    ),
    DPM: SchedulerOptions(
        followed=frozenset(_MULTISTEP),
        # Its step to sigma 0 is Euler's in any case.
        idle=frozenset({*_BETAS, *_OF_THRESHOLDING, *_SPACING, _INFINITE, "time_shift_type", "euler_at_final"}),
        required={
            **_OF_FLOWS,
            "algorithm_type": "dpmsolver++",  # others draw noise or do not reach sigma 0
            "use_karras_sigmas": False,  # of a variance-preserving diffusion
            "use_lu_lambdas": False,  # likewise
            "variance_type": None,
        },
    ),
}


class SchedulerConfig(JsonObject):
    """A scheduler's file, without the one option whose default JSON cannot say and diffusers writes nevertheless."""

    @model_validator(mode="before")
    @classmethod
    def _without_infinity(cls, root: object) -> object:
        if isinstance(root, dict) and root.get(_INFINITE) == -math.inf:
            return {option: value for option, value in root.items() if option != _INFINITE}
        return root


def make_scheduler(family: Family, folder: Path) -> Any:
    """The scheduler of a pipeline.

    Args:
        family: of the pipeline.
        folder: of the pipeline.

    Raises:
        MismatchError: a class that the pipeline's loop is not known for, or an option that is not followed.
        MissingFileError: it has none.
        DamagedFileError: diffusers cannot make it.
    """
    import diffusers

    file = folder / SCHEDULER_CONFIG
    config, allowed = read_json_model(file, SchedulerConfig, AGAIN).root, family.schedulers
    name = config.get("_class_name")
    if name not in allowed:
        which = "that one" if len(allowed) == 1 else "one of these"
        raise MismatchError(
            f"'{file}': got the scheduler {name}, expected {' or '.join(allowed)}; save the pipeline with {which}"
        )
    try:
        scheduler = getattr(diffusers, str(name)).from_config(dict(config))
    except Exception as error:  # what is raised depends on the option
        raise DamagedFileError(f"'{file}' does not describe a scheduler ({one_line(error)}); {_ADVICE}") from error
    _require_options(file, scheduler, family.scheduler_options.get(str(name), {}))
    return scheduler


def require_schedule(adapter: ModelAdapter, steps: int, file: Path) -> None:
    """Refuse a scheduler that makes no schedule: some options are first looked at then.

    Args:
        adapter: the model with its scheduler.
        steps: of the schedule.
        file: the scheduler's configuration, as messages name it.

    Raises:
        DamagedFileError: diffusers cannot make a schedule.
        UserError: as `make_schedule`.
    """
    try:
        adapter.schedule(steps)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DamagedFileError(f"'{file}' gives no schedule of {steps} steps ({one_line(error)}); {_ADVICE}") from error


def _require_options(file: Path, scheduler: Any, required: Mapping[str, JsonValue]) -> None:
    """Refuse an option that is neither followed nor without effect.

    Raises:
        MismatchError: names it.
    """
    name = type(scheduler).__name__
    options, expected = OPTIONS[name], {**_defaults(name), **OPTIONS[name].required, **required}
    # Diffusers keeps the options of the class that a scheduler was converted from, where nothing reads them.
    leftovers = {option for relative in SCHEDULERS for option in _defaults(relative)}
    free = (options.followed | options.idle) - required.keys()
    for option, value in scheduler.config.items():
        if option.startswith("_") or option in free:
            continue
        if option in expected and value != expected[option]:
            raise MismatchError(
                f"'{file}': {name} with {option} = {value!r} is not followed, expected {expected[option]!r}; save the "
                "pipeline with a scheduler that has this"
            )
        if option not in expected and option not in leftovers:
            raise MismatchError(
                f"'{file}': {name} of the installed diffusers has no option '{option}'; take it out, or install the "
                "diffusers that the pipeline was saved with"
            )


def _defaults(name: str) -> dict[str, Any]:
    """Options of a class of diffusers → their defaults."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key != "self"}
