"""Pictures from an adapter in full precision, for the trainings and their records."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adatsq_trt.models.adapter import ModelAdapter


@torch.no_grad()
def sample(adapter: ModelAdapter, prompts: Sequence[int], steps: int, guidance: float, seed: int) -> Tensor:
    """Images [B, height, width, channels] in [0, 1], from one stream of noise for the whole batch."""
    schedule, conditioning = adapter.schedule(steps), adapter.encode(prompts)
    latent = torch.randn(len(prompts), *adapter.latent_shape, generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        velocity = adapter.velocity(latent, schedule.model_time(step), conditioning, guidance)
        latent = schedule.advance(latent, velocity, step)
    return adapter.decode(latent)
