"""Step-level batching: generations that are at steps with the same formats and scales share a call of the denoiser.

The generation that is least advanced goes first and takes along all that can share its call. So a newcomer catches up
with those before it, and from then on they run together. While it catches up the others wait; as only so many samples
run at a time, that wait is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adatsq_trt.engines.runtime import Bundle, Conditioning
from adatsq_trt.solver import Denoising, guide

_REFERENCE = -1  # group of all steps in full precision, which have no scales


@dataclass(eq=False)  # two requests for the same picture are two
class Generation:
    """One request's samples on their way through the loop.

    Attributes:
        loop: its latents, float32 [samples, *latent_shape], and the step that comes next.
        conditioning: of every sample.
        guidance: scale of guidance.
        quantized: follow the policy; otherwise full precision.
    """

    loop: Denoising[np.ndarray]
    conditioning: Conditioning
    guidance: float
    quantized: bool = True

    @property
    def latents(self) -> np.ndarray:
        """After the steps that are done."""
        return self.loop.latent

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
            if self._group(generation) == group and samples + len(generation.latents) <= self._max_samples:
                chosen.append(generation)
                samples += len(generation.latents)
        return chosen

    def advance(self, chosen: Sequence[Generation]) -> None:
        """Advance generations that `choose` gave by a step each, with one call of the denoiser."""
        bundle = self._bundle
        parts = [bundle.step_inputs(g.step, g.latents, g.conditioning, g.guidance) for g in chosen]
        inputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        prediction = bundle.predict(chosen[0].step, inputs, chosen[0].quantized)
        ends = np.cumsum([len(part[bundle.latent_input]) for part in parts])
        for generation, rows in zip(chosen, np.split(prediction, ends[:-1]), strict=True):
            rescaled = bundle.manifest.rescaled_guidance
            generation.loop.advance(guide(rows, len(generation.latents), generation.guidance, rescaled))

    def _group(self, generation: Generation) -> int:
        return self._groups[generation.step] if generation.quantized else _REFERENCE
