"""Two transformers of one pipeline, each of which denoises some of the steps: the experts of Wan 2.2.

A pipeline with `boundary_ratio` calls `transformer` as long as the noise is high and `transformer_2` afterwards. Layers
are named by expert, "transformer.blocks.0.ffn.net.2". A layer does not run at the other expert's steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from adatsq_trt.errors import UserError
from adatsq_trt.models.adapter import Conditioning, ModelAdapter
from adatsq_trt.models.prompted import PromptedAdapter
from adatsq_trt.schedule import EXPERTS, FIRST_EXPERT, SECOND_EXPERT, TRAIN_TIMESTEPS, Schedule, Steps
from adatsq_trt.transformer_call import TransformerCall


class ExpertsAdapter(ModelAdapter):
    """Two transformers of one architecture, which take the same inputs.

    Attributes:
        boundary_ratio: of the timesteps of the training: at and above it the first expert denoises.
    """

    def __init__(self, experts: Mapping[str, PromptedAdapter], boundary_ratio: float) -> None:
        """Join two models.

        Args:
            experts: by the names in `EXPERTS`.
            boundary_ratio: of the pipeline.
        """
        self._experts = {name: experts[name] for name in EXPERTS}
        self.boundary_ratio = boundary_ratio
        first = experts[FIRST_EXPERT]
        self.architecture, self.latent_shape, self.image = first.architecture, first.latent_shape, first.image
        self.float32_inputs, self.rescaled_guidance = first.float32_inputs, first.rescaled_guidance
        self.image_inputs, self.negatives = first.image_inputs, first.negatives
        self.transformer = nn.ModuleDict({name: own.transformer for name, own in self._experts.items()})
        self._traces = nn.ModuleDict({name: own.trace_module() for name, own in self._experts.items()})

    def of_expert(self, expert: str) -> PromptedAdapter:
        """One of the two."""
        return self._experts[expert]

    def active(self, schedule: Schedule) -> NDArray[np.bool_]:
        """[steps, layers]: a layer runs at its own expert's steps."""
        layers = list(self.quantizable_layers())
        return np.array([[name.startswith(f"{expert}.") for name in layers] for expert in schedule.experts])

    def schedule(self, steps: Steps) -> Schedule:
        """The first expert's, with the expert of each step by the pipeline's rule.

        Raises:
            UserError: one of them has no step.
        """
        schedule, scheduler = self._experts[FIRST_EXPERT].schedule(steps), self._experts[FIRST_EXPERT].scheduler
        boundary = self.boundary_ratio * TRAIN_TIMESTEPS
        # By the scheduler's own numbers and in their type, as the pipeline compares them.
        high = (scheduler.timesteps >= boundary).tolist()
        experts = tuple(FIRST_EXPERT if above else SECOND_EXPERT for above in high)
        for name in EXPERTS:
            if name not in experts:
                raise UserError(
                    f"steps: none of {schedule.steps} steps is of the expert '{name}', whose boundary is at timestep "
                    f"{boundary:g}; pass more --steps"
                )
        return replace(schedule, experts=experts)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Both experts are asked for the same."""
        return self._experts[FIRST_EXPERT].prompts

    @property
    def takes_guidance(self) -> bool:
        """As the experts do."""
        return self._experts[FIRST_EXPERT].takes_guidance

    def quantizable_layers(self) -> dict[str, nn.Linear]:
        """Of both, by expert."""
        return {
            path: layer
            for name, own in self._experts.items()
            for layer_name, layer in own.quantizable_layers().items()
            if (path := f"{name}.{layer_name}") not in self.excluded
        }

    def blocks(self) -> tuple[str, ...]:
        """Of both, by expert; a call of the model calls those of one."""
        return tuple(f"{name}.{block}" for name, own in self._experts.items() for block in own.blocks())

    def encode(self, prompts: Sequence[int]) -> Conditioning:
        """As either expert takes it."""
        return self._experts[FIRST_EXPERT].encode(prompts)

    def model_inputs(
        self, latent: Tensor, model_time: float, condition: Mapping[str, Tensor], guidance: float
    ) -> dict[str, Tensor]:
        """As either expert takes them."""
        return self._experts[FIRST_EXPERT].model_inputs(latent, model_time, condition, guidance)

    def trace_module(self) -> nn.Module:
        """Both trace modules, for what is done to all weights; a call and a trace are of one expert (`of_expert`)."""
        return self._traces

    def pipeline_call(self) -> TransformerCall | None:
        """The same for both."""
        return self._experts[FIRST_EXPERT].pipeline_call()
