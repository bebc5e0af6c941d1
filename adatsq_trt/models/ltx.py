"""LTX-Video: diffusers' LTXPipeline and its LTXVideoTransformer3DModel, text to video."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx import LTXAttention, LTXVideoAttnProcessor, apply_rotary_emb
from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn import functional

from adatsq_trt.errors import DamagedFileError, MismatchError
from adatsq_trt.files import read_json_model
from adatsq_trt.models.adapter import AnySize, open_axes
from adatsq_trt.models.family import AGAIN, Canvas, Family, JsonObject, VaeScale
from adatsq_trt.models.flux import POSITIONS, time_frequencies
from adatsq_trt.models.prompted import PromptedAdapter
from adatsq_trt.schedule import TRAIN_TIMESTEPS, Schedule, Steps, make_schedule
from adatsq_trt.transformer_call import TIMESTEPS, TransformerCall, forward_arguments

_MASK = "encoder_attention_mask"
_PIXELS, _FRAMES = 32, 8  # of a cell of LTX-Video's VAE
_FRAME_RATE = 25  # the pipeline's own
_SCALES = (_FRAMES / _FRAME_RATE, float(_PIXELS), float(_PIXELS))  # of positions, in seconds and pixels
_HIDDEN = -10000.0  # what diffusers adds for a token that is not seen


class LTXAdapter(PromptedAdapter):
    """An LTX-Video with a closed set of prompts, whose latents are tokens, as its pipeline packs them.

    The encoder's second output is the mask that the pipeline makes of a text: 1 for its own tokens, 0 elsewhere.
    """

    model_class = LTXVideoTransformer3DModel
    text_width = "caption_channels"
    transformer: LTXVideoTransformer3DModel
    quantizable = re.compile(r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))")
    block_lists = ("transformer_blocks",)
    float32_inputs = ("timestep",)

    def find_latent_shape(self) -> tuple[int, ...]:
        """(tokens, channels)."""
        return (prod(self._grid), self.transformer.config.in_channels)

    @property
    def _grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens."""
        return (self.image.frames or 1, *self.image.grid)

    def make_trace(self) -> nn.Module:
        """The transformer with constant rotations."""
        return LTXTrace(self.transformer, self._grid)

    def any_size(self) -> AnySize:
        """The number of tokens, with their rotations, is left open."""
        (tokens,) = open_axes(tokens=self.latent_shape[0])
        module = LTXAnySizeTrace(self.transformer, self._grid)
        axes = {POSITIONS: {1: tokens}, "hidden_states": {1: tokens}}
        return AnySize(module, {POSITIONS: module.rotations}, axes)

    def condition(self, tokens: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        """Text tokens and their mask [B, T]."""
        return {"encoder_hidden_states": tokens, _MASK: pooled}

    def schedule(self, steps: Steps) -> Schedule:
        """The pipeline's sigmas for this video's size."""
        return make_schedule(self.scheduler, steps, self.latent_shape[0])

    def pipeline_call(self) -> TransformerCall:
        """The size comes in three numbers; scales of the positions are those of the pipeline's own frame rate."""
        config = self.transformer.config
        return TransformerCall(
            arguments=forward_arguments(LTXVideoTransformer3DModel),
            inputs={name: name for name in ("hidden_states", "encoder_hidden_states", _MASK)},
            time="timestep",
            time_range=TIMESTEPS,
            sides=("num_frames", "height", "width"),
            numbers={"rope_interpolation_scale": _SCALES},
            settings={name: config[name] for name in ("in_channels", "patch_size", "patch_size_t")},
        )


class MaskedProcessor(LTXVideoAttnProcessor):  # type: ignore[misc]
    """LTX-Video's attention with a mask [B, 1, 1, T] as it is, where diffusers repeats one for each head."""

    def __call__(
        self,
        attn: LTXAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of [B, S, width], over itself or over a text [B, T, width]; other masks are diffusers' business."""
        if attention_mask is not None and attention_mask.ndim != 4:
            return super().__call__(  # type: ignore[no-any-return]
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb) for x in (query, key))
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value, attention_mask)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class LTXTrace(nn.Module):
    """LTXVideoTransformer3DModel on one video size: constant rotations, and numbers for the mask."""

    rotations: Tensor
    frequencies: Tensor

    def __init__(self, transformer: LTXVideoTransformer3DModel, grid: tuple[int, int, int]) -> None:
        """Wrap a transformer for videos of `grid` (frames, rows, columns) tokens."""
        super().__init__()
        self.transformer = transformer
        for module in transformer.modules():
            if isinstance(module, LTXAttention):
                module.set_processor(MaskedProcessor())
        own = time_frequencies(transformer.time_embed.emb.time_proj)
        rotations = torch.cat(transformer.rope(torch.empty(1, device=own.device), *grid, _SCALES))
        for name, value in ((POSITIONS, rotations), ("frequencies", own)):
            self.register_buffer(name, value, persistent=False)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor, timestep: Tensor
    ) -> Tensor:
        """Predicted velocity, shape of `hidden_states`; `timestep` is a fraction of the 1,000 of the training."""
        return self._predict(self.rotations, hidden_states, encoder_hidden_states, encoder_attention_mask, timestep)

    def _predict(self, rotations: Tensor, latent: Tensor, condition: Tensor, mask: Tensor, timestep: Tensor) -> Tensor:
        """The same with the cosines and sines of its tokens [2, tokens, width]."""
        model = self.transformer
        tokens, text = model.proj_in(latent), model.caption_projection(condition)
        embedding = model.time_embed.emb.timestep_embedder(self._time(timestep).type_as(tokens))[:, None]
        modulation = model.time_embed.linear(model.time_embed.silu(embedding))
        both = (rotations[:1], rotations[1:])
        hidden = ((1 - mask) * _HIDDEN).type_as(tokens)[:, None, None]
        for block in model.transformer_blocks:
            tokens = block(tokens, text, modulation, both, hidden)
        shift, scale = (model.scale_shift_table + embedding).chunk(2, dim=1)
        return model.proj_out(model.norm_out(tokens) * (1 + scale) + shift)  # type: ignore[no-any-return]

    def _time(self, timestep: Tensor) -> Tensor:
        """Cosines and sines of a time, float32 [B, 256]."""
        angles = (timestep * TRAIN_TIMESTEPS)[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class LTXAnySizeTrace(LTXTrace):
    """The same for videos of any size: their rotations are an input."""

    def forward(  # type: ignore[override]
        self,
        rotations: Tensor,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        """Predicted velocity; `rotations` [2, tokens, width] of the tokens."""
        return self._predict(rotations, hidden_states, encoder_hidden_states, encoder_attention_mask, timestep)


class LTXFamily(Family):
    """LTXPipeline: text to video, at the frame rate that the pipeline has unless it is asked for another."""

    adapter, pipeline = LTXAdapter, "LTXPipeline"
    canvas = Canvas(512, 704, 161)
    text_tokens = 128
    text_outputs: ClassVar[Mapping[str, int]] = {"encoder_hidden_states": 0, _MASK: 1}
    text_options: ClassVar[Mapping[str, JsonValue]] = {"do_classifier_free_guidance": False}
    text_mask = True
    packed, patch = True, 1
    transformer_options: ClassVar[Mapping[str, JsonValue]] = {"patch_size": 1, "patch_size_t": 1}

    def defaults(self, config: Mapping[str, JsonValue]) -> tuple[int, float]:
        """Of the pipeline's call."""
        return 50, 3.0

    def require_supported(self, config: Mapping[str, JsonValue], file: Path, folder: Path) -> None:
        """Refuse a VAE that draws noise while it decodes, too.

        Raises:
            MismatchError: names the setting.
        """
        super().require_supported(config, file, folder)
        vae = folder / "vae" / "config.json"
        noise = read_json_model(vae, JsonObject, AGAIN).root.get("decoder_inject_noise")
        if isinstance(noise, list) and any(noise):
            raise MismatchError(
                f"'{vae}': decoder_inject_noise is {noise}: this VAE draws noise while it decodes, which is not "
                "followed; choose a pipeline with another one, such as that of LTX-Video 0.9.5"
            )

    def vae_scale(self, folder: Path) -> VaeScale:
        """Of LTX-Video's VAE.

        Raises:
            DamagedFileError: its configuration does not say it.
            MismatchError: another one.
        """
        config = folder / "vae" / "config.json"
        values = read_json_model(config, JsonObject, AGAIN).root
        halved = values.get("spatio_temporal_scaling")
        if not isinstance(halved, list):
            raise DamagedFileError(f"'{config}' has no list 'spatio_temporal_scaling'; {AGAIN}")
        factors = 2 ** sum(map(bool, halved))
        sides = [
            values.get(name) or int(str(values.get(patch, default))) * factors
            for name, patch, default in (
                ("spatial_compression_ratio", "patch_size", 4),
                ("temporal_compression_ratio", "patch_size_t", 1),
            )
        ]
        if sides != [_PIXELS, _FRAMES]:
            raise MismatchError(
                f"'{config}': a cell of the VAE is {sides[0]} pixels and {sides[1]} frames, expected {_PIXELS} and "
                f"{_FRAMES}, which the transformer's positions are computed for; choose another {self.pipeline}"
            )
        return VaeScale(_PIXELS, _FRAMES)
