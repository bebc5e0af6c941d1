"""Base of the adapters of models with a closed set of prompts."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin
from torch import Tensor, nn

from adatsq_trt.image import ImageShape
from adatsq_trt.models.adapter import Conditioning, ModelAdapter
from adatsq_trt.models.prompts import PromptEncoder

MIN_FEATURES = 16


class PromptedAdapter(ModelAdapter):
    """A diffusers transformer with an encoder of its prompts and its scheduler.

    Attributes:
        model_class: diffusers' class of the transformer.
        text_width: name of the transformer's setting for the width of a text token.
        pooled_width: likewise of the pooled projection, for models that take one.
        quantizable: module paths of the linear layers that a policy may quantize. Modulation, embedders, norm_out and
            the final projection stay in high precision.
        block_lists: the module lists that hold the transformer's blocks, in the order of execution.
    """

    model_class: ClassVar[type[ModelMixin]]
    text_width: ClassVar[str]
    pooled_width: ClassVar[str | None] = None
    quantizable: ClassVar[re.Pattern[str]]
    block_lists: ClassVar[tuple[str, ...]]
    transformer: ModelMixin

    def __init__(
        self,
        transformer: ModelMixin,
        encoder: PromptEncoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
        image: ImageShape,
        guidance_distilled: bool = False,
    ) -> None:
        """Adapt a transformer.

        Args:
            transformer: of the class `model_class`.
            encoder: of the prompts, as wide as the transformer's condition.
            scheduler: its configuration decides the sigmas.
            image: shape of a decoded latent.
            guidance_distilled: the model needs no branch without a prompt.
        """
        self.architecture = self.model_class.__name__
        self.transformer = transformer.float().eval()
        self.encoder = encoder.float().eval()
        self.scheduler = scheduler
        self.image = image
        self.image_inputs, self.negatives = encoder.image_inputs, encoder.negatives
        self.latent_shape = self.find_latent_shape()
        self.guidance_distilled = guidance_distilled
        self._trace = self.make_trace()

    @abstractmethod
    def find_latent_shape(self) -> tuple[int, ...]:
        """The shape of one sample's latent, from the transformer's channels and the image."""

    @abstractmethod
    def make_trace(self) -> nn.Module:
        """The trace module; `transformer`, `encoder` and `latent_shape` are set."""

    @abstractmethod
    def condition(self, tokens: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        """Return the encoder's outputs as graph inputs by name.

        Args:
            tokens: float32 [B, text tokens, width].
            pooled: float32 [B, width].
        """

    def model_inputs(
        self, latent: Tensor, model_time: float, condition: Mapping[str, Tensor], guidance: float
    ) -> dict[str, Tensor]:
        """Latent, condition and time [B] by diffusers' names, for transformers that take no scale of guidance."""
        return {
            "hidden_states": latent,
            **condition,
            "timestep": torch.full((len(latent),), model_time, device=latent.device),
        }

    def trace_module(self) -> nn.Module:
        """As `make_trace` made it."""
        return self._trace

    def resized(self, image: ImageShape) -> Self:
        """Share transformer and encoder."""
        other = type(self)(self.transformer, self.encoder, self.scheduler, image, self.guidance_distilled)
        other.excluded = self.excluded
        return other

    def quantizable_layers(self) -> dict[str, nn.Linear]:
        """Those that `quantizable` names, with at least `MIN_FEATURES` inputs and outputs, that are not excluded."""
        return {
            name: module
            for name, module in self.transformer.named_modules()
            if isinstance(module, nn.Linear)
            and self.quantizable.fullmatch(name)
            and name not in self.excluded
            and min(module.in_features, module.out_features) >= MIN_FEATURES
        }

    def blocks(self) -> tuple[str, ...]:
        """The members of `block_lists`."""
        return tuple(f"{kind}.{i}" for kind in self.block_lists for i in range(len(getattr(self.transformer, kind))))

    @property
    def prompts(self) -> tuple[str, ...]:
        """Those of the encoder."""
        return self.encoder.prompts

    @property
    def takes_guidance(self) -> bool:
        """As the weight of two branches."""
        return not self.guidance_distilled

    def encode(self, prompts: Sequence[int]) -> Conditioning:
        """The prompts with their images; the unguided branch is given the empty prompt and the same images."""
        images = self.encoder.images(prompts)
        negative = None if self.guidance_distilled else self.encoder.encode_negative(prompts)
        unconditional = None if negative is None else self.condition(*negative) | images
        return Conditioning(self._encode(prompts) | images, unconditional)

    def _encode(self, prompts: Sequence[int | None]) -> dict[str, Tensor]:
        return self.condition(*self.encoder.encode(prompts))
