"""Chroma: diffusers' ChromaPipeline and its ChromaTransformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from diffusers import ChromaTransformer2DModel
from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn import functional

from adatsq_trt.models.adapter import AnySize, open_axes
from adatsq_trt.models.family import Family
from adatsq_trt.models.flux import POSITIONS, FluxAdapter, position_ids, rotations, time_frequencies
from adatsq_trt.models.prompted import PromptedAdapter
from adatsq_trt.schedule import TRAIN_TIMESTEPS, Schedule, Steps, make_schedule
from adatsq_trt.transformer_call import TransformerCall, forward_arguments

_MASK = "attention_mask"


class ChromaAdapter(PromptedAdapter):
    """A Chroma with a closed set of prompts, whose latents are tokens, as its pipeline packs them.

    The encoder's second output is the mask that the pipeline makes of a text: 1 for its own tokens and one more, 0
    elsewhere. Diffusers adds the product of a query's and a key's number to their product, so what is at 0 is seen, but
    less.
    """

    model_class = ChromaTransformer2DModel
    text_width = "joint_attention_dim"
    transformer: ChromaTransformer2DModel
    quantizable, block_lists = FluxAdapter.quantizable, FluxAdapter.block_lists
    float32_inputs = ("timestep",)

    def find_latent_shape(self) -> tuple[int, ...]:
        """(tokens, channels)."""
        rows, columns = self.image.grid
        return (rows * columns, self.transformer.config.in_channels)

    def make_trace(self) -> nn.Module:
        """The transformer with constant rotations."""
        return ChromaTrace(self.transformer, self.image.grid, self.encoder.text_tokens)

    def any_size(self) -> AnySize:
        """The number of tokens, with their rotations, is left open."""
        (tokens,) = open_axes(tokens=self.latent_shape[0])
        module = ChromaAnySizeTrace(self.transformer, self.image.grid, self.encoder.text_tokens)
        axes = {POSITIONS: {0: tokens}, "hidden_states": {1: tokens}}
        return AnySize(module, {POSITIONS: module.rotations}, axes)

    def condition(self, tokens: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        """Text tokens and their mask [B, T]."""
        return {"encoder_hidden_states": tokens, _MASK: pooled}

    def schedule(self, steps: Steps) -> Schedule:
        """Flux's sigmas for this image size."""
        return make_schedule(self.scheduler, steps, self.latent_shape[0])

    def pipeline_call(self) -> TransformerCall:
        """As Flux's; the pipeline's mask goes on with ones for the picture's tokens."""
        inputs = ("hidden_states", "encoder_hidden_states", _MASK)
        return TransformerCall(
            arguments=forward_arguments(ChromaTransformer2DModel),
            inputs={name: name for name in inputs},
            ones_behind=(_MASK,),
            time="timestep",
            positions="img_ids",
            zeros=("txt_ids",),
            settings={"in_channels": self.transformer.config.in_channels},
        )


class ChromaTrace(nn.Module):
    """ChromaTransformer2DModel on one image size: constant rotations, and a text's mask without the image's ones."""

    rotations: Tensor
    text_rotations: Tensor
    frequencies: Tensor
    same_inputs: Tensor

    def __init__(self, transformer: ChromaTransformer2DModel, grid: tuple[int, int], text_tokens: int) -> None:
        """Wrap a transformer for images of `grid` (rows, columns) tokens and prompts of `text_tokens`."""
        super().__init__()
        self.transformer = transformer
        embedding = transformer.time_text_embed
        which = embedding.mod_proj
        guidance = embedding.guidance_proj(torch.zeros(1, device=which.device))
        buffers = {
            POSITIONS: rotations(transformer, position_ids(grid)),
            "text_rotations": rotations(transformer, torch.zeros(text_tokens, 3)),
            "frequencies": time_frequencies(embedding.time_proj),
            "same_inputs": torch.cat([guidance.expand(len(which), -1), which], dim=-1),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor, timestep: Tensor
    ) -> Tensor:
        """Predicted velocity, shape of `hidden_states`; `attention_mask` [B, T] is of the text's tokens."""
        return self._predict(self.rotations, hidden_states, encoder_hidden_states, attention_mask, timestep)

    def _predict(self, rotations: Tensor, latent: Tensor, condition: Tensor, mask: Tensor, timestep: Tensor) -> Tensor:
        """The same with the rotations of the image's tokens."""
        model = self.transformer
        image, text = model.x_embedder(latent), model.context_embedder(condition)
        modulation = model.distilled_guidance_layer(self._modulation_inputs(timestep).type_as(image))
        mask = functional.pad(mask, (0, latent.shape[1]), value=1.0).type_as(image)
        both = torch.cat([self.text_rotations, rotations]).chunk(2, dim=-1)
        # First those of the single blocks, then the image's of the others, then the text's, then the last norm's.
        single, double = model.single_transformer_blocks, model.transformer_blocks
        of_image, of_text = 3 * len(single), 3 * len(single) + 6 * len(double)
        for i, block in enumerate(double):
            parts = [modulation[:, start + 6 * i : start + 6 * i + 6] for start in (of_image, of_text)]
            text, image = block(image, text, torch.cat(parts, dim=1), both, mask)
        tokens = torch.cat([text, image], dim=1)
        for i, block in enumerate(single):
            tokens = block(tokens, modulation[:, 3 * i : 3 * i + 3], both, mask)
        image = tokens[:, text.shape[1] :]
        return model.proj_out(model.norm_out(image, modulation[:, -2:]))  # type: ignore[no-any-return]

    def _modulation_inputs(self, timestep: Tensor) -> Tensor:
        """Of the network that makes all modulations, float32 [B, modulations, C].

        The time, then what is the same at all times: a guidance of 0, and which of the modulations it is.
        """
        angles = (timestep * TRAIN_TIMESTEPS)[:, None] * self.frequencies
        time, same = torch.cat([angles.cos(), angles.sin()], dim=-1)[:, None], self.same_inputs
        return torch.cat([time.expand(-1, same.shape[0], -1), same.expand(timestep.shape[0], -1, -1)], dim=-1)


class ChromaAnySizeTrace(ChromaTrace):
    """The same for images of any size: their rotations are an input."""

    def forward(  # type: ignore[override]
        self,
        rotations: Tensor,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        """Predicted velocity; `rotations` [tokens, 2 * attention head's width] are of the image's tokens."""
        return self._predict(rotations, hidden_states, encoder_hidden_states, attention_mask, timestep)


class ChromaFamily(Family):
    """ChromaPipeline: every prompt has all its tokens, and a mask."""

    adapter, pipeline = ChromaAdapter, "ChromaPipeline"
    packed = True
    text_outputs: ClassVar[Mapping[str, int]] = {"encoder_hidden_states": 0, _MASK: 2}
    text_options: ClassVar[Mapping[str, JsonValue]] = {"do_classifier_free_guidance": False}
    text_mask = True
    transformer_options: ClassVar[Mapping[str, JsonValue]] = {"patch_size": 1}

    def defaults(self, config: Mapping[str, JsonValue]) -> tuple[int, float]:
        """Of the pipeline's call."""
        return 35, 5.0
