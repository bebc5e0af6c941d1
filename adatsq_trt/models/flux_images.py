"""Flux with an image beside the prompt: diffusers' FluxKontextPipeline and FluxFillPipeline.

Kontext's image is as large as the picture, and its tokens follow the picture's, at positions whose first coordinate is
1. Fill's image, without what is masked, and its mask are further channels of the picture's own tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from pydantic import JsonValue
from torch import Tensor, nn

from adatsq_trt.image import ImageShape
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.family import Canvas, VaeScale
from adatsq_trt.models.flux import FluxAdapter, FluxFamily, FluxTrace
from adatsq_trt.models.image_condition import IMAGE_LATENTS, ImageCondition, ImageTokens, first_draw
from adatsq_trt.schedule import EULER, UNIPC

TOKENS, CHANNELS = 1, 2  # axes of [B, tokens, channels]


class FluxKontextAdapter(FluxAdapter):
    """A Flux that is shown an image, whose tokens follow the picture's."""

    joined_axis: ClassVar[int] = TOKENS
    leaves_flows: ClassVar[bool] = False
    any_size = ModelAdapter.any_size  # which refuses other sizes

    def make_trace(self) -> nn.Module:
        """The transformer with the position ids of both as constants."""
        return FluxImageTrace(self.transformer, self.image.grid, self.encoder.text_tokens, self.joined_axis)


class FluxFillAdapter(FluxKontextAdapter):
    """A Flux that fills what is masked of an image, which is given in further channels."""

    joined_axis: ClassVar[int] = CHANNELS


class FluxImageTrace(FluxTrace):
    """FluxTransformer2DModel whose latents are continued by those of an image."""

    def __init__(
        self, transformer: FluxTransformer2DModel, grid: tuple[int, int], text_tokens: int, joined_axis: int
    ) -> None:
        """Wrap a transformer.

        Args:
            transformer: for both latents together.
            grid: rows and columns of the picture's tokens, and of the image's.
            text_tokens: of a prompt.
            joined_axis: of [B, tokens, channels], along which the image's latents follow the picture's.
        """
        super().__init__(transformer, grid, text_tokens)
        self.joined_axis = joined_axis
        if joined_axis == TOKENS:
            self.image_ids = torch.cat([self.image_ids, self.image_ids + torch.tensor([1.0, 0.0, 0.0])])

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        image_latents: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predicted velocity of the picture alone, shape of `hidden_states`."""
        both = torch.cat([hidden_states, image_latents], dim=self.joined_axis)
        condition = (encoder_hidden_states, pooled_projections, timestep, guidance)
        return self._predict(self.image_ids, both, *condition)[:, : hidden_states.shape[1]]


class KontextCondition(ImageTokens):
    """The image's latents, as tokens; the image is resized to the size that is drawn."""

    def encode(self, pipe: Any, image: Image.Image, mask: Image.Image | None, canvas: Canvas) -> dict[str, Tensor]:
        """As the pipeline's call does without `_auto_resize`."""
        size, vae = (canvas.height, canvas.width), pipe.vae
        pixels = pipe.image_processor.preprocess(pipe.image_processor.resize(image, *size), *size)
        channels = vae.config.latent_channels
        _, latents, _, _ = pipe.prepare_latents(pixels, 1, channels, *size, vae.dtype, vae.device)
        return {IMAGE_LATENTS: latents[0]}


class FillCondition(ImageCondition):
    """The latents of the image without what is masked, and the mask's pixels, in the channels of a token."""

    masked = mixed = True

    def channels(self, latent: int, scale: VaeScale) -> int:
        """As many as the noise, and one for each pixel of a token."""
        return latent + (FluxFamily.patch * scale.pixels) ** 2

    def shapes(self, config: Mapping[str, Any], image: ImageShape, folder: Path) -> dict[str, tuple[int, ...]]:
        """All channels that are not the noise's."""
        rows, columns = image.grid
        return {IMAGE_LATENTS: (rows * columns, config["in_channels"] - config["out_channels"])}

    def encode(self, pipe: Any, image: Image.Image, mask: Image.Image | None, canvas: Canvas) -> dict[str, Tensor]:
        """As the pipeline's call does."""
        size, vae = (canvas.height, canvas.width), pipe.vae
        pixels = pipe.image_processor.preprocess(image, *size)
        holes = pipe.mask_processor.preprocess(mask, *size)
        kept = (pixels * (1 - holes)).to(vae.device, vae.dtype)
        channels = vae.config.latent_channels
        holes, latents = pipe.prepare_mask_latents(
            holes, kept, 1, channels, 1, *size, vae.dtype, vae.device, first_draw()
        )
        return {IMAGE_LATENTS: torch.cat([latents, holes], dim=-1)[0]}


class FluxKontextFamily(FluxFamily):
    """FluxKontextPipeline, with an image of the picture's size. It asks every scheduler for the same noise levels."""

    adapter, pipeline = FluxKontextAdapter, "FluxKontextPipeline"
    schedulers = (EULER, UNIPC)  # DPM-Solver++ takes none
    scheduler_options: ClassVar[Mapping[str, Mapping[str, JsonValue]]] = {}
    image_condition: ClassVar[ImageCondition] = KontextCondition()


class FluxFillFamily(FluxKontextFamily):
    """FluxFillPipeline, with an image and a mask."""

    adapter, pipeline = FluxFillAdapter, "FluxFillPipeline"
    image_condition: ClassVar[ImageCondition] = FillCondition()

    def defaults(self, config: Mapping[str, Any]) -> tuple[int, float]:
        """Of Flux Fill dev."""
        return 50, 30.0
