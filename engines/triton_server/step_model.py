"""The step model: one call of the denoiser, for clients that run the loop themselves.

The server's dynamic batching gathers requests; those at steps with the same formats and scales run together. Runs
inside the server only, which provides `triton_python_backend_utils`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as server

from adatsq_trt.engines.runtime import TIME_INPUT
from adatsq_trt.engines.triton_server.batching import interchangeable_steps
from adatsq_trt.engines.triton_server.parameters import read_parameters
from adatsq_trt.engines.triton_server.python_backend import (
    failure,
    make_response,
    open_bundle,
    read_tensors,
    refusal,
)
from adatsq_trt.errors import AdatsqError, UserError


class TritonPythonModel:
    """Model that the Python backend loads: latents in, velocities out."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle.

        Raises:
            TritonModelException: the bundle cannot be opened; with the sentence that says why.
        """
        self._bundle, _ = open_bundle(args)
        self._groups = interchangeable_steps(self._bundle)
        self._inputs = {"step", *(signature.name for signature in self._bundle.inputs)} - {TIME_INPUT}

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer a batch that the server has gathered."""
        responses: list[Any] = [None] * len(requests)
        groups: dict[int, list[tuple[int, int, dict[str, np.ndarray]]]] = {}
        for index, request in enumerate(requests):
            try:
                read_parameters(request.parameters(), (), self._inputs)
                step, inputs = self._read(read_tensors(request))
            except UserError as error:
                responses[index] = refusal(str(error), server.TritonError.INVALID_ARG)
            except Exception as error:  # the rest of the batch is answered
                responses[index] = failure("reading the request", error)
            else:
                groups.setdefault(self._groups[step], []).append((index, step, inputs))
        for group in groups.values():
            indices, steps, inputs = zip(*group, strict=True)
            for index, answer in zip(indices, self._answers(steps[0], inputs), strict=True):
                responses[index] = answer
        return responses

    def finalize(self) -> None:
        """Give the memory back."""
        self._bundle.close()

    def _read(self, tensors: dict[str, np.ndarray]) -> tuple[int, dict[str, np.ndarray]]:
        """A request's step and the denoiser's inputs.

        Raises:
            UserError: several steps or one that the policy does not have; numbers that are not finite.
        """
        steps = np.unique(tensors.pop("step"))
        if len(steps) != 1 or not 0 <= steps[0] < len(self._groups):
            raise UserError(f"step: got {steps.tolist()}, expected one of 0 to {len(self._groups) - 1} for all rows")
        for name, value in tensors.items():
            if not np.isfinite(value).all():
                raise UserError(f"input '{name}': got NaN or infinity, expected finite numbers")
        step, rows = int(steps[0]), len(next(iter(tensors.values())))
        time = np.full(rows, self._bundle.schedule.model_time(step), np.float32)
        return step, {**tensors, TIME_INPUT: time}

    def _answers(self, step: int, inputs: tuple[dict[str, np.ndarray], ...]) -> list[Any]:
        """Responses to requests that share a call."""
        try:
            velocities = self._predict(step, inputs)
        except Exception as error:  # whatever the libraries below raise: the rest of the batch is answered
            return [failure(f"step {step}", error) for _ in inputs]
        return [
            make_response({"velocity": velocity})
            if np.isfinite(velocity).all()
            else failure(f"step {step}", AdatsqError("the velocities have NaN or infinity; give smaller inputs"))
            for velocity in velocities
        ]

    def _predict(self, step: int, inputs: tuple[dict[str, np.ndarray], ...]) -> list[np.ndarray]:
        """Velocities of requests that share a call; in several where plans take fewer rows."""
        joined = {name: np.concatenate([one[name] for one in inputs]) for name in inputs[0]}
        ends = np.cumsum([len(one[TIME_INPUT]) for one in inputs])
        most = self._bundle.most_rows(None) or int(ends[-1])
        parts = [{n: value[i : i + most] for n, value in joined.items()} for i in range(0, int(ends[-1]), most)]
        velocities = np.concatenate([self._bundle.predict(step, part) for part in parts])
        return np.split(velocities, ends[:-1])
