"""Flux: diffusers' FluxTransformer2DModel."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn

from adatsq_trt.models.adapter import Conditioning, ImageShape, ModelAdapter
from adatsq_trt.schedule import Schedule, make_schedule

# Modulation (norm*.linear), embedders, norm_out and proj_out stay in high precision.
_BLOCK_LINEAR = re.compile(
    r"(transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out))"
)
MIN_FEATURES = 16


class FluxAdapter(ModelAdapter):
    """A class-conditional Flux on square images cut in 2x2 patches, as Flux packs its latents."""

    architecture = "FluxTransformer2DModel"
    transformer: FluxTransformer2DModel

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        class_embedding: nn.Embedding,
        scheduler: FlowMatchEulerDiscreteScheduler,
        image_size: int,
    ) -> None:
        """Adapt a transformer.

        Args:
            transformer: with in_channels = 4 * image channels and pooled_projection_dim = joint_attention_dim.
            class_embedding: [classes + 1, joint_attention_dim]; the last row is "no class".
            scheduler: its configuration decides the sigmas.
            image_size: height and width in pixels, even.
        """
        self.transformer = transformer.float().eval()
        self.class_embedding = class_embedding.float().eval()
        self.scheduler = scheduler
        self.image = ImageShape(image_size // 2, transformer.config.in_channels // 4)
        self.latent_shape = (self.image.patches**2, transformer.config.in_channels)
        self._trace = FluxTrace(self.transformer, self.image.patches)

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
    def classes(self) -> int:
        """Number of classes that can be asked for."""
        return self.class_embedding.num_embeddings - 1

    def encode(self, prompts: Sequence[int]) -> Conditioning:
        """Class ids → one text token and the pooled projection; the last embedding row is the unguided branch."""
        ids = torch.as_tensor(list(prompts), dtype=torch.long)
        return Conditioning(self._embed(ids), self._embed(torch.full_like(ids, self.classes)))

    def _embed(self, ids: Tensor) -> dict[str, Tensor]:
        embedding = self.class_embedding(ids)
        return {"encoder_hidden_states": embedding[:, None], "pooled_projections": embedding}

    def model_inputs(self, latent: Tensor, model_time: float, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """hidden_states [B, tokens, C], encoder_hidden_states [B, 1, D], pooled_projections [B, D], timestep [B]."""
        return {"hidden_states": latent, **condition, "timestep": torch.full((len(latent),), model_time)}

    def schedule(self, steps: int) -> Schedule:
        """Flux's sigmas for this image size."""
        return make_schedule(self.scheduler, steps, self.latent_shape[0])

    def trace_module(self) -> nn.Module:
        """The transformer with its position ids as constants."""
        return self._trace

    def decode(self, latent: Tensor) -> Tensor:
        """Unpack 2x2 patches: [B, patches², 4c] → [B, size, size, c], from [-1, 1] to [0, 1]."""
        side, channels = self.image.patches, self.image.channels
        grid = latent.reshape(-1, side, side, channels, 2, 2)
        image = grid.permute(0, 1, 4, 2, 5, 3).reshape(-1, 2 * side, 2 * side, channels)
        return (image / 2 + 0.5).clamp(0, 1)


class FluxTrace(nn.Module):
    """FluxTransformer2DModel with positional tensors only; image and text ids are buffers of the module."""

    def __init__(self, transformer: FluxTransformer2DModel, patches: int) -> None:
        """Wrap a transformer for images of `patches` x `patches` tokens and one text token."""
        super().__init__()
        self.transformer = transformer
        rows = torch.arange(patches, dtype=torch.float32)
        ids = torch.stack([torch.zeros(patches, patches), *torch.meshgrid(rows, rows, indexing="ij")], dim=-1)
        self.register_buffer("image_ids", ids.reshape(-1, 3), persistent=False)
        self.register_buffer("text_ids", torch.zeros(1, 3), persistent=False)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor
    ) -> Tensor:
        """Predicted velocity, shape of `hidden_states`."""
        return self.transformer(  # type: ignore[no-any-return]
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]


def pack(images: Tensor) -> Tensor:
    """[B, size, size, c] in [0, 1] → latents [B, patches², 4c] in [-1, 1]: the inverse of `FluxAdapter.decode`."""
    batch, size, _, channels = images.shape
    grid = (images * 2 - 1).reshape(batch, size // 2, 2, size // 2, 2, channels)
    return grid.permute(0, 1, 3, 5, 2, 4).reshape(batch, (size // 2) ** 2, 4 * channels)
