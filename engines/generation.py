"""One run of the denoising loop: what goes in, and how a backend takes it from step to step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from adatsq_trt.errors import UserError
from adatsq_trt.graph_index import TensorSignature
from adatsq_trt.schedule import Schedule, guidance_at
from adatsq_trt.solver import guide

if TYPE_CHECKING:
    import torch

TIME_INPUT, GUIDANCE_INPUT = "timestep", "guidance"
Array: TypeAlias = "np.ndarray | torch.Tensor"
Arrays: TypeAlias = Mapping[str, Any]  # of Array; both are used alike


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of a batch of samples.

    Attributes:
        conditional: input name → [samples, ...], float32 or a tensor of any floating type.
        unconditional: the same names for the unguided branch; None when the model is not guided.
    """

    conditional: Arrays
    unconditional: Arrays | None = None

    @property
    def branches(self) -> int:
        """How many rows of a call a sample takes."""
        return 1 if self.unconditional is None else 2


@dataclass(frozen=True)
class DenoisingRequest:
    """Input of one run of the denoising loop.

    Attributes:
        latents: initial noise, [samples, *latent_shape].
        conditioning: of every sample.
        guidance: scale of guidance.
        guidance_2: at the steps of the second of two experts; None for the same.
        schedule: of the run's size.
        latent_input: name of the input that takes the latents.
        inputs: names of all inputs with rows.
        size: in pixels, one of the bundle's; None for its own.
        rescaled_guidance: as of the bundle's manifest.
    """

    latents: Array
    conditioning: Conditioning
    guidance: float
    schedule: Schedule
    latent_input: str
    inputs: tuple[str, ...]
    size: tuple[int, ...] | None
    rescaled_guidance: bool = False
    guidance_2: float | None = None

    def guidance_at(self, step: int) -> float:
        """The scale of guidance of a step."""
        return guidance_at(self.schedule, step, self.guidance, self.guidance_2)

    @property
    def rows(self) -> int:
        """Samples times guidance branches."""
        return len(self.latents) * self.conditioning.branches

    def row_values(self, step: int) -> dict[str, float]:
        """Inputs that are one number for all rows: the time of a step, and the guidance scale where the model asks."""
        values = {TIME_INPUT: self.schedule.model_time(step), GUIDANCE_INPUT: self.guidance_at(step)}
        return {name: value for name, value in values.items() if name in self.inputs}


class DenoisingLoop(ABC):
    """A run of the loop on a backend, which binds once what stays the same over the steps.

    Attributes:
        request: input of the run.
    """

    def __init__(self, request: DenoisingRequest) -> None:
        """Begin before the first step."""
        self.request = request

    def run(self) -> Iterator[Array]:
        """Take all steps.

        Yields:
            The latents after each step, float32 [samples, *latent_shape], where the backend computes.
        """
        start = self.request.schedule.begin(self.first_latents())
        yield from start.run(lambda latents, step: self.guided(self.predict(latents, step), step))

    def guided(self, prediction: Array, step: int) -> Array:
        """The velocity that the scheduler takes a step with, [samples, ...], of both branches' predictions."""
        request = self.request
        return guide(prediction, len(request.latents), request.guidance_at(step), request.rescaled_guidance)

    @abstractmethod
    def first_latents(self) -> Array:
        """The request's, as float32, where the backend computes."""

    @abstractmethod
    def inputs(self, latents: Array, step: int) -> Arrays:
        """The model's inputs at a step, where the backend computes; those of several runs may share a call.

        Args:
            latents: float32 [samples, *latent_shape].
            step: index in the loop.

        Returns:
            Name → [rows, ...]; valid until they are asked for again.
        """

    @abstractmethod
    def predict(self, latents: Array, step: int) -> Array:
        """Run the model once for both branches of guidance.

        Args:
            latents: float32 [samples, *latent_shape].
            step: index in the loop.

        Returns:
            The velocity, float32 [rows, *latent_shape].
        """


class ArrayLoop(DenoisingLoop):
    """A run of the loop on the processor, in NumPy."""

    def __init__(self, run: Callable[[int, Arrays, tuple[int, ...] | None], Array], request: DenoisingRequest) -> None:
        """Begin with the noise.

        Args:
            run: (step, inputs, size) → velocity, as `StepRunner.run`.
            request: input of the run.
        """
        super().__init__(request)
        self._run = run

    def first_latents(self) -> np.ndarray:
        """As an array."""
        return as_array(self.request.latents)

    def inputs(self, latents: Array, step: int) -> dict[str, np.ndarray]:
        """As arrays."""
        return array_inputs(replace(self.request, latents=latents), step)

    def predict(self, latents: Array, step: int) -> Array:
        """As an array."""
        return self._run(step, self.inputs(latents, step), self.request.size)


def array_inputs(request: DenoisingRequest, step: int) -> dict[str, np.ndarray]:
    """All inputs with rows: both branches of guidance in one batch, conditional rows first, float32 [rows, ...]."""
    branches, conditioning = request.conditioning.branches, request.conditioning
    halves = [conditioning.conditional, conditioning.unconditional or {}]
    condition = {
        name: np.concatenate([as_array(half[name]) for half in halves if name in half])
        for name in conditioning.conditional
    }
    values = {name: np.full(request.rows, value, np.float32) for name, value in request.row_values(step).items()}
    return {request.latent_input: np.concatenate([as_array(request.latents)] * branches), **condition, **values}


def as_array(value: Array) -> np.ndarray:
    """An array as it is; a tensor as float32."""
    return value if isinstance(value, np.ndarray) else np.asarray(value.detach().float().cpu().numpy())


def like(given: Array, value: Array) -> Any:
    """Latents as the kind that the caller has: an array, or a tensor on the same device."""
    if isinstance(given, np.ndarray):
        return value if isinstance(value, np.ndarray) else value.cpu().numpy()
    import torch

    return torch.as_tensor(value, device=given.device)


def require_inputs(
    signatures: Sequence[TensorSignature], inputs: Arrays, max_rows: int | None = None, branches: int = 1
) -> None:
    """Refuse inputs that a graph does not take, before anything is computed.

    Args:
        signatures: of the graph's inputs.
        inputs: by name.
        max_rows: the most that the plans' optimization profile accepts; None for any number.
        branches: how many times these rows go into a call.

    Raises:
        UserError: says which name, shape or number of rows is wrong.
    """
    names = [signature.name for signature in signatures]
    if set(names) != set(inputs):
        raise UserError(f"got the inputs {sorted(inputs)}, expected {sorted(names)}; give exactly these")
    rows = len(inputs[names[0]]) if inputs[names[0]].ndim else 0
    if max_rows is not None and branches * rows > max_rows:
        raise UserError(
            f"got {branches * rows} rows (samples times guidance branches), the plans accept at most {max_rows}; "
            "denoise fewer samples at a time"
        )
    for signature in signatures:
        value = inputs[signature.name]
        wanted = (rows, *signature.shape[1:])
        if tuple(value.shape) != wanted or not _is_real(value) or not rows:
            raise UserError(
                f"input '{signature.name}': got {value.dtype} {list(value.shape)}, expected float32 "
                f"{['rows', *signature.shape[1:]]} with as many rows, at least one, in every input"
            )


def _is_real(value: Any) -> bool:
    """Whether the runtime takes such numbers: arrays of float32, tensors of any floating type."""
    return bool(value.dtype == np.float32 if isinstance(value, np.ndarray) else value.is_floating_point())
