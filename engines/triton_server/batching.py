"""Step-level batching: generations that are at steps with the same formats and scales share a call of the denoiser.

The generation that is least advanced goes first and takes along all that can share its call. So a newcomer catches up
with those before it, and from then on they run together. While it catches up the others wait; as only so many samples
run at a time, that wait is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adatsq_trt.engines.generation import Array, DenoisingLoop, as_array
from adatsq_trt.engines.runtime import Bundle, Conditioning
from adatsq_trt.solver import Denoising, State


@dataclass(eq=False)  # two requests for the same picture are two
class Generation:
    """One request's samples on their way through the loop.

    Attributes:
        loop: its latents, float32 [samples, *latent_shape], and the step that comes next.
        conditioning: of every sample.
        guidance: scale of guidance.
        quantized: follow the policy; otherwise full precision.
        guidance_2: scale at the steps of the second of two transformers; None for the same.
        placed: the run where the bundle computes, from the first step on.
    """

    loop: Denoising[Array]
    conditioning: Conditioning
    guidance: float
    quantized: bool = True
    guidance_2: float | None = None
    placed: DenoisingLoop | None = field(default=None, init=False)

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self.loop.latent)

    @property
    def latents(self) -> np.ndarray:
        """After the steps that are done; asking for them on a GPU waits until they are."""
        return as_array(self.loop.latent)

    @property
    def step(self) -> int:
        """The one that comes next."""
        return self.loop.step


def interchangeable_steps(bundle: Bundle) -> tuple[int, ...]:
    """For every step a number; steps of the same number can share a call.

    These are the steps of one assignment with the same activation scales. Formats with static scales usually have other
    scales at every step.
    """
    groups: dict[tuple[int, bytes], int] = {}
    numbers = []
    for step, assignment in enumerate(bundle.policy.step_assignments):
        scales = bundle.files.scales(step)
        key = (assignment, b"".join(scales[name].tobytes() for name in sorted(scales)))
        numbers.append(groups.setdefault(key, len(groups)))
    return tuple(numbers)


class StepBatcher:
    """Chooses which generations advance together, and advances them."""

    def __init__(self, bundle: Bundle, max_samples: int) -> None:
        """Prepare for a bundle.

        Args:
            bundle: runs the steps.
            max_samples: most samples of one call.
        """
        self._bundle, self._max_samples = bundle, max_samples
        self._groups = interchangeable_steps(bundle)

    def choose(self, running: Sequence[Generation]) -> list[Generation]:
        """The least advanced generation and those that share its call, least advanced first.

        Args:
            running: at least one; none has finished, and none has more samples than one call takes.
        """
        waiting = sorted(running, key=lambda generation: generation.step)
        group = self._group(waiting[0])
        chosen, samples = [], 0
        for generation in waiting:
            if self._group(generation) == group and samples + generation.samples <= self._max_samples:
                chosen.append(generation)
                samples += generation.samples
        return chosen

    def advance(self, chosen: Sequence[Generation]) -> None:
        """Advance generations that `choose` gave by a step each, with one call of the denoiser.

        On a GPU nothing is read back, and nothing is brought there but by a generation's first step.
        """
        first, start = chosen[0], 0
        with self._bundle.runner(first.quantized).working():
            placed = [self._place(generation) for generation in chosen]
            parts = [own.inputs(g.loop.latent, g.step) for own, g in zip(placed, chosen, strict=True)]
            inputs = {name: _joined([part[name] for part in parts]) for name in parts[0]}
            prediction = self._bundle.predict(first.step, inputs, first.quantized)
            for own, generation in zip(placed, chosen, strict=True):
                rows = prediction[start : start + own.request.rows]
                generation.loop.advance(own.guided(rows, generation.step))
                start += own.request.rows

    def _place(self, generation: Generation) -> DenoisingLoop:
        """Bring latents and conditioning to where the bundle computes, once."""
        if generation.placed is None:
            loop = generation.loop
            guidance, guidance_2 = generation.guidance, generation.guidance_2
            request = self._bundle.request(loop.latent, generation.conditioning, guidance, guidance_2=guidance_2)
            generation.placed = self._bundle.runner(generation.quantized).loop(request)
            loop.state = State(generation.placed.first_latents())
        return generation.placed

    def _group(self, generation: Generation) -> int | str:
        """Assignments are of one transformer each, and full precision of a transformer has no scales."""
        step = generation.step
        return self._groups[step] if generation.quantized else self._bundle.files.expert(step)


def _joined(rows: list[Any]) -> Array:
    """Rows of several generations one behind the other, where they are."""
    if isinstance(rows[0], np.ndarray):
        return np.concatenate(rows)
    import torch

    return torch.cat(rows)
