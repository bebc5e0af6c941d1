"""Flux: diffusers' FluxTransformer2DModel."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn

from adatsq_trt.models.adapter import Conditioning, ImageShape, ModelAdapter
from adatsq_trt.models.prompts import PromptEncoder
from adatsq_trt.schedule import Schedule, make_schedule

# Modulation (norm*.linear), embedders, norm_out and proj_out stay in high precision.
_BLOCK_LINEAR = re.compile(
    r"(transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out))"
)
MIN_FEATURES = 16


class FluxAdapter(ModelAdapter):
    """A Flux with a closed set of prompts, on images cut in patches, as Flux packs its latents."""

    architecture = "FluxTransformer2DModel"
    transformer: FluxTransformer2DModel

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        encoder: PromptEncoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
        image: ImageShape,
        guidance_distilled: bool = False,
    ) -> None:
        """Adapt a transformer.

        Args:
            transformer: with in_channels = patch_size² * channels of the image or of the VAE's latent.
            encoder: of the prompts.
            scheduler: its configuration decides the sigmas.
            image: what a latent decodes to.
            guidance_distilled: the model needs no branch without a prompt.
        """
        self.transformer = transformer.float().eval()
        self.encoder = encoder.float().eval()
        self.scheduler = scheduler
        self.image = image
        self.latent_shape = (prod(image.grid), transformer.config.in_channels)
        self._guidance_distilled = guidance_distilled
        self._trace = FluxTrace(self.transformer, image.grid, encoder.text_tokens)

    def quantizable_layers(self) -> dict[str, nn.Linear]:
        """Attention and feed-forward linears of both kinds of block."""
        return {
            name: module
            for name, module in self.transformer.named_modules()
            if isinstance(module, nn.Linear)
            and _BLOCK_LINEAR.fullmatch(name)
            and min(module.in_features, module.out_features) >= MIN_FEATURES
        }

    def blocks(self) -> tuple[str, ...]:
        """Double-stream blocks, then single-stream blocks."""
        kinds = ("transformer_blocks", "single_transformer_blocks")
        return tuple(f"{kind}.{i}" for kind in kinds for i in range(len(getattr(self.transformer, kind))))

    @property
    def prompts(self) -> tuple[str, ...]:
        """Those of the encoder."""
        return self.encoder.prompts

    @property
    def takes_guidance(self) -> bool:
        """As a weight of two branches or as an input; a model like Flux schnell has neither."""
        return bool(not self._guidance_distilled or self.transformer.config.guidance_embeds)

    def encode(self, prompts: Sequence[int]) -> Conditioning:
        """Text tokens and the pooled projection; the unguided branch is given the empty prompt."""
        unconditional = None if self._guidance_distilled else self._encode([None] * len(prompts))
        return Conditioning(self._encode(prompts), unconditional)

    def _encode(self, prompts: Sequence[int | None]) -> dict[str, Tensor]:
        tokens, pooled = self.encoder.encode(prompts)
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def model_inputs(
        self, latent: Tensor, model_time: float, condition: Mapping[str, Tensor], guidance: float
    ) -> dict[str, Tensor]:
        """hidden_states [B, tokens, C], encoder_hidden_states [B, T, D], pooled_projections [B, D], timestep [B].

        With a guidance embedding also guidance [B].
        """
        rows = len(latent)
        inputs = {"hidden_states": latent, **condition, "timestep": torch.full((rows,), model_time)}
        if self.transformer.config.guidance_embeds:
            inputs["guidance"] = torch.full((rows,), guidance)
        return inputs

    def schedule(self, steps: int) -> Schedule:
        """Flux's sigmas for this image size."""
        return make_schedule(self.scheduler, steps, self.latent_shape[0])

    def trace_module(self) -> nn.Module:
        """The transformer with its position ids as constants."""
        return self._trace

    def decode(self, latent: Tensor) -> Tensor:
        """Unpack patches: [B, rows * columns, p² c] → [B, p rows, p columns, c]; an image from [-1, 1] to [0, 1]."""
        (rows, columns), channels, pixels = self.image.grid, self.image.channels, self.image.patch_size
        grid = latent.reshape(-1, rows, columns, channels, pixels, pixels)
        image = grid.permute(0, 1, 4, 2, 5, 3).reshape(-1, pixels * rows, pixels * columns, channels)
        return image if self.image.vae else (image / 2 + 0.5).clamp(0, 1)


class FluxTrace(nn.Module):
    """FluxTransformer2DModel with positional tensors only; image and text ids are buffers of the module."""

    def __init__(self, transformer: FluxTransformer2DModel, grid: tuple[int, int], text_tokens: int) -> None:
        """Wrap a transformer for images of rows x columns tokens and prompts of `text_tokens`."""
        super().__init__()
        self.transformer = transformer
        rows, columns = (torch.arange(count, dtype=torch.float32) for count in grid)
        ids = torch.stack([torch.zeros(grid), *torch.meshgrid(rows, columns, indexing="ij")], dim=-1)
        self.register_buffer("image_ids", ids.reshape(-1, 3), persistent=False)
        self.register_buffer("text_ids", torch.zeros(text_tokens, 3), persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predicted velocity, shape of `hidden_states`; `guidance` is for models with a guidance embedding."""
        return self.transformer(  # type: ignore[no-any-return]
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            guidance=guidance,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]


def pack(images: Tensor, patch_size: int = 2) -> Tensor:
    """Images in [0, 1] → latents in [-1, 1]: the inverse of `FluxAdapter.decode`.

    Args:
        images: [B, size, size, c].
        patch_size: p: height and width of a patch in pixels.

    Returns:
        [B, (size / p)², p² c].
    """
    batch, size, _, channels = images.shape
    side = size // patch_size
    grid = (images * 2 - 1).reshape(batch, side, patch_size, side, patch_size, channels)
    return grid.permute(0, 1, 3, 5, 2, 4).reshape(batch, side**2, channels * patch_size**2)
