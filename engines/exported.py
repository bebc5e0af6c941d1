"""Record of the exporter's input, kept beside PyTorch's outputs: a bundle must say the same, number by number."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, FiniteFloat

from adatsq_trt.engines.manifest import ScheduleRecord
from adatsq_trt.policy import Policy

EXPORTED_NAME = "check/exported.json"
SCALES_PREFIX = "activation_scales."  # of the tables in the reference: those that PyTorch's model was given


class Exported(BaseModel):
    """Policy, guidance, schedule and arrays that the denoising loop of the reference ran with.

    Attributes:
        policy: formats of each step.
        guidance: scale of guidance.
        guidance_2: as the manifest has it.
        rescaled_guidance: as the manifest has it.
        schedule: sigmas and timesteps.
        shapes: of a bundle of several sizes: size → its schedule.
        prompt_texts: of the stored prompts.
        arrays: file → tensor → `array_hash`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    policy: Policy
    guidance: FiniteFloat
    guidance_2: FiniteFloat | None = None
    rescaled_guidance: bool = False
    schedule: ScheduleRecord
    shapes: dict[str, ScheduleRecord] = {}
    prompt_texts: tuple[str, ...]
    arrays: dict[str, dict[str, str]]


def array_hash(array: np.ndarray) -> str:
    """Hash of an array's type, shape and bytes."""
    described = f"{array.dtype.str} {list(array.shape)} ".encode()
    return hashlib.sha256(described + np.ascontiguousarray(array).tobytes()).hexdigest()
