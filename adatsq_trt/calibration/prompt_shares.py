"""Which prompts a batch draws: calibration, selection and scoring have none in common, where there are enough."""

from __future__ import annotations

from enum import Enum

# A model of fewer prompts, such as classes, is asked for all of them in every batch: their seeds differ in any case.
LEAST = 20
# Of each five in turn. Five has no divisor in common with the worlds whose prompts come in six kinds in turn.
_CYCLE = 5


class Use(Enum):
    """Purpose of a batch, with its places in each cycle of prompts."""

    CALIBRATION = (0, 1)
    SELECTION = (2,)
    SCORING = (3, 4)


def apart(prompts: int) -> bool:
    """Whether a model with so many prompts has different ones for each use."""
    return prompts >= LEAST


def shared_prompts(prompts: int, use: Use) -> tuple[int, ...]:
    """Indices of the prompts for a use.

    Args:
        prompts: how many the model has.
        use: purpose of the batch that draws them.
    """
    places = use.value if apart(prompts) else range(_CYCLE)
    return tuple(i for i in range(prompts) if i % _CYCLE in places)
