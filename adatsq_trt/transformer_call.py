"""How a diffusers pipeline calls its transformer, as data.

The adapter of an architecture says it, a bundle's manifest carries it, and `adatsq_trt.engines.transformer` does what
it says: so a bundle takes the place of any transformer, also of one that was registered by a user.
"""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, NonNegativeInt, PositiveInt, model_validator

from adatsq_trt.schedule import TRAIN_TIMESTEPS

RETURN_DICT = "return_dict"


class TransformerCall(BaseModel):
    """The arguments of a transformer's `forward`, and what the graph takes and gives in their place.

    An argument that has no part in this may only have its default.

    Attributes:
        arguments: name → default, in the order of `forward`; None where there is no default.
        inputs: graph input → the argument that it is; all inputs but the time.
        joined: argument that is several inputs → its axis along which they follow each other, in the order of `inputs`.
        time: the argument that says the time, [rows].
        time_range: its values for noise and for a finished sample: (1, 0), or (1000, 0) for the scheduler's timesteps.
        positions: the argument that says where a token of the latents lies, [tokens, axes], with one for each row of a
            batch or not: zero, row, column, and zeros from there on.
        position_axes: numbers of a position.
        grids: the argument that lists, for each row, the frames, rows and columns of its latents' tokens.
        sides: the arguments that say how many frames, rows and columns the latents' tokens have.
        numbers: argument → the numbers that it has to have, which the graph's constants were computed with.
        masks: graph input → the argument that says which of its tokens there are, [rows, tokens]; None for all. These
            inputs may be shorter than the graph's, where they end in zeros.
        ones_behind: graph inputs [rows, tokens of a text] behind which the argument has a one for each token of the
            latents: numbers by which queries and keys are weighed.
        zeros: arguments that are zero throughout, such as the positions of a text.
        counted: positions of a text that count its tokens in their last number: 0, 1, 2; their others are zero.
        zeros_behind: argument that has more channels than the graph's input → how many, all zero, follow the input's.
        listed: rows come and go in lists. Rows of a condition that are shorter than the graph's end in zeros there.
        unit_axis: an axis of a row of the latents that always has one element and that the graph does not have.
        negated: whether the pipeline expects the opposite of the velocity.
        settings: entries of the transformer's configuration that the pipeline reads.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    arguments: dict[str, JsonValue]
    inputs: dict[str, str]
    joined: dict[str, PositiveInt] = {}
    time: str
    time_range: tuple[FiniteFloat, FiniteFloat] = (1.0, 0.0)
    positions: str | None = None
    position_axes: Annotated[int, Field(ge=3)] = 3
    grids: str | None = None
    sides: tuple[str, ...] = ()
    numbers: dict[str, tuple[FiniteFloat, ...]] = {}
    masks: dict[str, str] = {}
    ones_behind: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    counted: tuple[str, ...] = ()
    zeros_behind: dict[str, PositiveInt] = {}
    listed: bool = False
    unit_axis: NonNegativeInt | None = None
    negated: bool = False
    settings: dict[str, JsonValue] = {}

    @property
    def required(self) -> tuple[str, ...]:
        """Arguments that every call has."""
        places = (name for name in (self.positions, self.grids) if name is not None)
        return (*self.inputs.values(), self.time, *places, *self.sides, *self.numbers)

    @property
    def followed(self) -> set[str]:
        """Arguments that have a part in this."""
        return {*self.required, *self.masks.values(), *self.zeros, *self.counted, RETURN_DICT}

    @model_validator(mode="after")
    def _consistent(self) -> TransformerCall:
        unknown = self.followed - {*self.arguments, RETURN_DICT}
        if unknown:
            raise ValueError(f"'{min(unknown)}' is none of the arguments {', '.join(self.arguments)}")
        if set(self.ones_behind) - self.inputs.keys():
            raise ValueError(f"ones_behind {self.ones_behind}, expected graph inputs: {', '.join(self.inputs)}")
        if self.masks.keys() - self.inputs.keys():
            raise ValueError(f"masks of {', '.join(self.masks)}, expected of graph inputs: {', '.join(self.inputs)}")
        if self.zeros_behind.keys() - self.inputs.values():
            raise ValueError(f"zeros_behind of {sorted(self.zeros_behind)}, expected of {sorted(self.inputs.values())}")
        several = {name for name, count in Counter(self.inputs.values()).items() if count > 1}
        if several != self.joined.keys():
            raise ValueError(f"joined {sorted(self.joined)}, several inputs are of {sorted(several)}")
        if self.time_range[0] == self.time_range[1]:
            raise ValueError(f"time_range {self.time_range} has one value for noise and for a finished sample")
        return self


TIMESTEPS = (float(TRAIN_TIMESTEPS), 0.0)  # a `time_range`


def forward_arguments(model_class: type) -> dict[str, JsonValue]:
    """The arguments of a class's `forward` with their defaults, as `TransformerCall.arguments` has them."""
    forward: Any = model_class.forward  # type: ignore[attr-defined]
    return {
        name: parameter.default if isinstance(parameter.default, bool | int | float | str) else None
        for name, parameter in inspect.signature(forward).parameters.items()
        if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
