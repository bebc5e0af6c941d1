"""Assignments, buckets and policies: what the search decides and what export, build and runtime obey."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from adatsq_trt.errors import MismatchError
from adatsq_trt.fields import Count
from adatsq_trt.files import read_json_model, write_json_model
from adatsq_trt.formats import Format, format_named, is_format

SCHEMA_VERSION: Literal[1] = 1

# What to do with a bad file that the user gave: no stage of the run writes it.
GIVEN_POLICY_ADVICE = "check the file or search again"


@dataclass(frozen=True)
class LayerShape:
    """Shape and tokens of a layer, for averages and sizes.

    Attributes:
        name: module path.
        in_features: K.
        out_features: N.
        tokens: rows that one sample sends through the layer, both guidance branches counted.
    """

    name: str
    in_features: int
    out_features: int
    tokens: int


@dataclass(frozen=True)
class Bucket:
    """Consecutive steps with one assignment.

    Attributes:
        first: index of the first step.
        last: index of the last step, inclusive.
        assignment: index into the policy's assignments.
    """

    first: int
    last: int
    assignment: int


class Policy(BaseModel):
    """A format for every (step, layer), as a short list of assignments and an index per step.

    Attributes:
        schema_version: of this file.
        model: name of the model that the policy was searched for.
        weights_sha256: hash of the transformer's weights.
        steps: length of the denoising loop.
        layers: module paths, in the order of the assignments' entries.
        assignments: distinct assignments: for each layer the name of its format; null for a layer that does not run at
            the steps of the assignment, as those of another expert.
        step_assignments: for each step the index of its assignment.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    model: str
    weights_sha256: str
    steps: Count
    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    assignments: tuple[tuple[str | None, ...], ...]
    step_assignments: tuple[int, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        if len(self.step_assignments) != self.steps:
            raise ValueError(f"step_assignments has {len(self.step_assignments)} entries, steps is {self.steps}")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("layers names one twice")
        for row in self.assignments:
            if len(row) != len(self.layers):
                raise ValueError(f"an assignment has {len(row)} entries for {len(self.layers)} layers")
            unknown = sorted(name for name in set(row) if name is not None and not is_format(name))
            if unknown:
                raise ValueError(f"unknown format {unknown[0]!r}")
        for layer, column in zip(self.layers, zip(*self.assignments, strict=True), strict=True):
            if set(column) == {None}:
                raise ValueError(f"no assignment gives layer {layer!r} a format")
        if sorted(set(self.step_assignments)) != list(range(len(self.assignments))):
            raise ValueError("step_assignments must use every assignment")
        return self

    @classmethod
    def from_steps(
        cls, model: str, weights_sha256: str, layers: Sequence[str], rows: Sequence[Sequence[str | None]]
    ) -> Policy:
        """Make a policy from one row of format names per step; equal rows become one assignment."""
        distinct = list(dict.fromkeys(tuple(row) for row in rows))
        return cls(
            model=model,
            weights_sha256=weights_sha256,
            steps=len(rows),
            layers=tuple(layers),
            assignments=tuple(distinct),
            step_assignments=tuple(distinct.index(tuple(row)) for row in rows),
        )

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Runs of steps with one assignment."""
        buckets: list[Bucket] = []
        for step, index in enumerate(self.step_assignments):
            if buckets and buckets[-1].assignment == index:
                buckets[-1] = Bucket(buckets[-1].first, step, index)
            else:
                buckets.append(Bucket(step, step, index))
        return tuple(buckets)

    @cached_property
    def rows(self) -> tuple[dict[str, str], ...]:
        """Of each assignment: layer → name of its format, for the layers that run."""
        return tuple(
            {layer: name for layer, name in zip(self.layers, row, strict=True) if name is not None}
            for row in self.assignments
        )

    @property
    def formats(self) -> set[str]:
        """Names of the formats that it uses."""
        return {name for row in self.rows for name in row.values()}

    def formats_at(self, step: int) -> dict[str, Format]:
        """Layer → format at a step, for the layers that run."""
        return {layer: format_named(name) for layer, name in self.rows[self.step_assignments[step]].items()}

    @property
    def mean_bits(self) -> float:
        """Unweighted mean over (step, layer) of (nominal weight bits + nominal activation bits) / 2."""
        return mean_bits([list(self.formats_at(step).values()) for step in range(self.steps)])

    def mean_weight_bits(self, shapes: Sequence[LayerShape]) -> float:
        """Mean over steps of stored bits per weight, scales included, weighted by parameters."""
        return self._weighted(
            shapes,
            {s.name: s.in_features * s.out_features for s in shapes},
            lambda f, k: f.stored_weight_bits(k),
        )

    def mean_activation_bits(self, shapes: Sequence[LayerShape]) -> float:
        """Mean over steps of bits per activation, dynamic scales included, weighted by multiply-accumulates."""
        return self._weighted(
            shapes,
            {s.name: s.in_features * s.out_features * s.tokens for s in shapes},
            lambda f, k: f.moved_activation_bits(k),
        )

    def _weighted(
        self, shapes: Sequence[LayerShape], weights: Mapping[str, int], bits: Callable[[Format, int], float]
    ) -> float:
        """Mean over steps of `bits(format, in_features)`, weighted by layer."""
        total, counted = 0.0, 0
        for step in range(self.steps):
            formats = self.formats_at(step)
            own = [shape for shape in shapes if shape.name in formats]
            total += sum(weights[s.name] * bits(formats[s.name], s.in_features) for s in own)
            counted += sum(weights[s.name] for s in own)
        return total / counted

    def require(self, weights_sha256: str, steps: int, layers: Sequence[str]) -> None:
        """Refuse to be used for another model or step count.

        Raises:
            MismatchError: says what differs.
        """
        if self.weights_sha256 == weights_sha256:
            self._require_layers(layers)
        else:
            raise MismatchError(
                f"the policy was searched for model '{self.model}' with weights {self.weights_sha256[:12]}, this model "
                f"has weights {weights_sha256[:12]}; run 'adatsq-trt search' on this model"
            )
        if self.steps != steps:
            raise MismatchError(
                f"the policy has {self.steps} steps, the run has {steps}; pass --steps {self.steps} or search again"
            )

    def _require_layers(self, layers: Sequence[str]) -> None:
        """Refuse other layers than those of the model: the hash says that the weights are the same, not the list."""
        missing = [name for name in layers if name not in self.layers]
        for name in self.layers:
            if name not in layers:
                near = difflib.get_close_matches(name, missing, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise MismatchError(
                    f"the policy has a layer '{name}', which model '{self.model}' has not or does not quantize{hint} "
                    f"({GIVEN_POLICY_ADVICE})"
                )
        if missing:
            raise MismatchError(
                f"the policy says nothing of {len(missing)} layers of model '{self.model}', the first is "
                f"'{missing[0]}'; {GIVEN_POLICY_ADVICE}"
            )
        if tuple(layers) != self.layers:
            index = next(i for i, name in enumerate(layers) if name != self.layers[i])
            raise MismatchError(
                f"the policy lists the layers of model '{self.model}' in another order: got '{self.layers[index]}' at "
                f"place {index}, expected '{layers[index]}'; {GIVEN_POLICY_ADVICE}"
            )

    def save(self, path: Path) -> None:
        """Write the policy as JSON, whole or not at all."""
        write_json_model(path, self)

    @classmethod
    def load(cls, path: Path, advice: str | None = None) -> Policy:
        """Read a policy.

        Args:
            path: of the file.
            advice: next step for the user, in messages about a bad file; None for a file that a stage writes.

        Raises:
            MissingFileError: no such file.
            DamagedFileError: not a policy of this schema version.
        """
        return read_json_model(path, cls, advice)


def mean_bits(rows: Sequence[Sequence[Format]]) -> float:
    """Mean over all entries of the formats' nominal bits."""
    return sum(f.bits for row in rows for f in row) / sum(len(row) for row in rows)


def resident_weight_bytes(policy: Policy, shapes: Mapping[str, LayerShape]) -> int:
    """Bytes in memory: for every layer the sum over the distinct weight grids that it uses at any step."""
    total = 0.0
    for index, layer in enumerate(policy.layers):
        shape = shapes[layer]
        names = (row[index] for row in policy.assignments)
        grids = {fmt.weight: fmt for fmt in (format_named(name) for name in names if name is not None)}
        bits = sum(fmt.stored_weight_bits(shape.in_features) for fmt in grids.values())
        total += bits / 8 * shape.in_features * shape.out_features
    return round(total)
