"""Full-precision denoising trajectories of a seeded batch: what every later measurement is relative to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from adatsq_trt.models.adapter import Conditioning, ModelAdapter
from adatsq_trt.schedule import Schedule, guidance_at, initial_noise
from adatsq_trt.solver import State

# Samples that are denoised at once when only the pictures are wanted.
SAMPLES_PER_CALL = 64


@dataclass(frozen=True)
class Samples:
    """A batch of denoising runs.

    Attributes:
        adapter: the model.
        schedule: its steps.
        guidance: guidance scale.
        prompts: one per sample: its index in the adapter's prompts.
        seeds: one per sample; decide the first latent.
        guidance_2: scale of the second expert, where there is one; None for the same.
    """

    adapter: ModelAdapter
    schedule: Schedule
    guidance: float
    prompts: tuple[int, ...]
    seeds: tuple[int, ...]
    guidance_2: float | None = None

    @property
    def conditioning(self) -> Conditioning:
        """Conditioning of all samples, where the model is."""
        return self._encoded.to(self.adapter.device)

    @cached_property
    def _encoded(self) -> Conditioning:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # the same for all devices and precisions
            return self.adapter.encode(self.prompts)

    def noise(self) -> Tensor:
        """First latents, float32 [samples, *latent_shape], on the processor."""
        return torch.from_numpy(initial_noise(self.seeds, self.adapter.latent_shape))

    def step(self, state: State[Tensor], step: int) -> State[Tensor]:
        """The state after one denoising step with the model as it stands (full precision or fake-quantized)."""
        return self.schedule.solver.following(state, self.velocity(state.latent, step), step)

    @torch.no_grad()
    def velocity(self, latent: Tensor, step: int) -> Tensor:
        """The model's prediction at a step, after guidance."""
        adapter, time = self.adapter_at(step), self.schedule.model_time(step)
        return adapter.velocity(latent, time, self.conditioning, self.guidance_at(step))

    def adapter_at(self, step: int) -> ModelAdapter:
        """The part of the model that a step calls."""
        return self.adapter.of_expert(self.schedule.expert(step))

    def guidance_at(self, step: int) -> float:
        """The scale of guidance of a step."""
        return guidance_at(self.schedule, step, self.guidance, self.guidance_2)

    def part(self, samples: slice) -> Samples:
        """Some of the samples."""
        return replace(self, prompts=self.prompts[samples], seeds=self.seeds[samples])


def seeded_samples(
    adapter: ModelAdapter,
    schedule: Schedule,
    guidance: float,
    count: int,
    first_seed: int,
    prompts: Sequence[int],
    guidance_2: float | None = None,
) -> Samples:
    """`count` samples with consecutive seeds and some prompts of the model, by their indices, in turn."""
    return Samples(
        adapter,
        schedule,
        guidance,
        tuple(prompts[i % len(prompts)] for i in range(count)),
        tuple(range(first_seed, first_seed + count)),
        guidance_2,
    )


def trajectory(
    samples: Samples, before_step: Callable[[int], None] | None = None, on_step: Callable[[], None] | None = None
) -> Tensor:
    """Run the denoising loop and keep every latent.

    Args:
        samples: the batch.
        before_step: called with the step index before each call of the model, typically to choose its formats.
        on_step: called after each step, for progress.

    Returns:
        float32 [steps + 1, samples, *latent_shape]; the last row is the picture.
    """

    def velocity(latent: Tensor, step: int) -> Tensor:
        if before_step is not None:
            before_step(step)
        return samples.velocity(latent, step)

    latents = [samples.noise().to(samples.adapter.device)]
    for latent in samples.schedule.begin(latents[0]).run(velocity):
        latents.append(latent)
        if on_step is not None:
            on_step()
    return torch.stack(latents)


def state_tensors(states: Sequence[State[Tensor]]) -> dict[str, Tensor]:
    """The states of a trajectory as tensors, which `trajectory_states` takes back.

    Args:
        states: before the first step and after each.

    Returns:
        latents: float32 [steps + 1, samples, *latent_shape].
        clean: float32 [steps, samples, *latent_shape], predicted at each step; absent for Euler's method.
    """
    tensors = {"latents": torch.stack([state.latent for state in states])}
    if states[-1].clean:
        tensors["clean"] = torch.stack([state.clean[0] for state in states[1:]])
    return tensors


def trajectory_states(tensors: Mapping[str, Tensor], memory: int) -> list[State[Tensor]]:
    """The states of a trajectory.

    Args:
        tensors: as `state_tensors` makes them.
        memory: clean latents that a state carries at most.
    """

    def clean(step: int) -> tuple[Tensor, ...]:
        return tuple(tensors["clean"][step - back] for back in range(1, min(step, memory) + 1))

    return [State(latent, clean(step)) for step, latent in enumerate(tensors["latents"])]


def final_latents(samples: Samples, before_step: Callable[[int], None] | None = None) -> Tensor:
    """The pictures of a large batch, in parts that stay in the processor's cache (a third of the time at 1,024).

    Args:
        samples: the batch.
        before_step: as in `trajectory`; called for every part.

    Returns:
        float32 [samples, *latent_shape].
    """
    count = len(samples.seeds)
    parts = [samples.part(slice(start, start + SAMPLES_PER_CALL)) for start in range(0, count, SAMPLES_PER_CALL)]
    return torch.cat([trajectory(part, before_step)[-1] for part in parts])


def latent_mse(latents: Tensor, reference: Tensor) -> float:
    """Mean squared difference, accumulated in float64."""
    return float((latents.double() - reference.double()).square().mean())
