"""Flux: diffusers' FluxPipeline and its FluxTransformer2DModel."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from diffusers import FluxTransformer2DModel, ModelMixin
from diffusers.models.embeddings import Timesteps
from pydantic import JsonValue
from torch import Tensor, nn

from adatsq_trt.models.adapter import AnySize, open_axes
from adatsq_trt.models.family import Family
from adatsq_trt.models.prompted import PromptedAdapter
from adatsq_trt.schedule import DPM, EULER, UNIPC, Schedule, Steps, make_schedule
from adatsq_trt.transformer_call import TransformerCall, forward_arguments

POSITIONS = "rotations"


class FluxAdapter(PromptedAdapter):
    """A Flux with a closed set of prompts, whose latents are tokens, as Flux packs them.

    Attributes:
        joined_axis: of [B, tokens, channels], along which an image's latents follow the picture's; None without image.
        leaves_flows: the pipeline leaves the noise levels to a scheduler with sigmas of a flow, whatever it is given.
    """

    model_class = FluxTransformer2DModel
    text_width = "joint_attention_dim"
    pooled_width: ClassVar[str | None] = "pooled_projection_dim"
    transformer: FluxTransformer2DModel
    quantizable = re.compile(
        r"(transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
        r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out))"
    )
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    joined_axis: ClassVar[int | None] = None
    leaves_flows: ClassVar[bool] = True

    def find_latent_shape(self) -> tuple[int, ...]:
        """(tokens, channels of the noise)."""
        (rows, columns), config = self.image.grid, self.transformer.config
        return (rows * columns, config.out_channels or config.in_channels)

    def make_trace(self) -> nn.Module:
        """The transformer with its position ids as constants."""
        return FluxTrace(self.transformer, self.image.grid, self.encoder.text_tokens)

    def any_size(self) -> AnySize:
        """The number of tokens, with their rotations, is left open."""
        (tokens,) = open_axes(tokens=self.latent_shape[0])
        grid, text_tokens = self.image.grid, self.encoder.text_tokens
        return AnySize(
            FluxAnySizeTrace(self.transformer, grid, text_tokens),
            {POSITIONS: rotations(self.transformer, position_ids(grid))},
            {POSITIONS: {0: tokens}, "hidden_states": {1: tokens}},
        )

    @property
    def takes_guidance(self) -> bool:
        """As a weight of two branches or as an input; a model like Flux schnell has neither."""
        return bool(not self.guidance_distilled or self.transformer.config.guidance_embeds)

    def condition(self, tokens: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        """Text tokens and the pooled projection."""
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def model_inputs(
        self, latent: Tensor, model_time: float, condition: Mapping[str, Tensor], guidance: float
    ) -> dict[str, Tensor]:
        """hidden_states [B, tokens, C], encoder_hidden_states [B, T, D], pooled_projections [B, D], timestep [B].

        With a guidance embedding also guidance [B].
        """
        rows, device = len(latent), latent.device
        inputs = {"hidden_states": latent, **condition, "timestep": torch.full((rows,), model_time, device=device)}
        if self.transformer.config.guidance_embeds:
            inputs["guidance"] = torch.full((rows,), guidance, device=device)
        return inputs

    def schedule(self, steps: Steps) -> Schedule:
        """Flux's sigmas for this image size."""
        return make_schedule(self.scheduler, steps, self.latent_shape[0], leaves_flows=self.leaves_flows)

    def pipeline_call(self) -> TransformerCall:
        """Positions tell the size: several sizes may have the same number of tokens."""
        config = self.transformer.config
        inputs, joined = ["hidden_states", "encoder_hidden_states", "pooled_projections"], self.joined_axis
        return TransformerCall(
            arguments=forward_arguments(FluxTransformer2DModel),
            inputs={name: name for name in (*inputs, *(["guidance"] if config.guidance_embeds else []))}
            | dict.fromkeys(self.image_inputs, "hidden_states"),
            joined={} if joined is None else {"hidden_states": joined},
            time="timestep",
            positions="img_ids",
            zeros=("txt_ids",),
            settings={"in_channels": config.in_channels, "guidance_embeds": config.guidance_embeds},
        )


class FluxTrace(nn.Module):
    """FluxTransformer2DModel with positional tensors only; image and text ids are buffers of the module."""

    image_ids: Tensor
    text_ids: Tensor

    def __init__(self, transformer: FluxTransformer2DModel, grid: tuple[int, int], text_tokens: int) -> None:
        """Wrap a transformer for images of `grid` (rows, columns) tokens and prompts of `text_tokens`."""
        super().__init__()
        self.transformer = transformer
        embedding = transformer.time_text_embed
        if isinstance(embedding.time_proj, Timesteps):
            embedding.time_proj = TabledTimesteps(embedding.time_proj)
        self.register_buffer("image_ids", position_ids(grid), persistent=False)
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
        condition = (encoder_hidden_states, pooled_projections, timestep, guidance)
        return self._predict(self.image_ids, hidden_states, *condition)

    def _predict(
        self,
        image_ids: Tensor,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
    ) -> Tensor:
        return self.transformer(  # type: ignore[no-any-return]
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            guidance=guidance,
            img_ids=image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]


class TabledTimesteps(nn.Module):
    """diffusers' sines and cosines of a time or a scale of guidance, with a table of frequencies.

    In the place of the table the exporter would put NumPy's exponentials, some of which are rounded otherwise than
    PyTorch's. A scale of guidance is multiplied by 1,000: at 30, as Flux Fill has it, that makes 1e-3 of a sine.
    """

    frequencies: Tensor

    def __init__(self, own: Timesteps) -> None:
        super().__init__()
        self.register_buffer("frequencies", time_frequencies(own), persistent=False)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Cosines, then sines, float32 [B, channels], of times or scales [B]."""
        angles = timesteps[:, None].float() * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def time_frequencies(own: Timesteps) -> Tensor:
    """Of diffusers' sines and cosines of a time, float32 [channels / 2]."""
    assert own.flip_sin_to_cos
    assert own.scale == 1
    half = own.num_channels // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32) / (half - own.downscale_freq_shift)
    return torch.exp(exponents)


class FluxAnySizeTrace(FluxTrace):
    """The same for images of any size: their rotations are an input."""

    def __init__(self, transformer: FluxTransformer2DModel, grid: tuple[int, int], text_tokens: int) -> None:
        """Wrap a transformer; `grid` is that of an example."""
        super().__init__(transformer, grid, text_tokens)
        # In the place of ids the transformer concatenates their rotations, which its embedding only has to part: it
        # would compute them in float64, which TensorRT lacks.
        self.transformer = copy.copy(transformer)
        self.transformer._modules = {**transformer._modules, "pos_embed": _Halves()}
        self.text_ids = rotations(transformer, self.text_ids)

    def forward(  # type: ignore[override]
        self,
        rotations: Tensor,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predicted velocity; `rotations` is as the function of that name gives them for the image's positions."""
        condition = (encoder_hidden_states, pooled_projections, timestep, guidance)
        return self._predict(rotations, hidden_states, *condition)


class _Halves(nn.Module):
    """The first and the second half of the columns."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        cosines, sines = rows.chunk(2, dim=-1)
        return cosines, sines


def rotations(transformer: ModelMixin, ids: Tensor) -> Tensor:
    """Cosines, then sines, of the angles of every position, float32 [positions, 2 * attention head's width]."""
    return torch.cat(transformer.pos_embed(ids), dim=-1)


def position_ids(grid: tuple[int, int]) -> Tensor:
    """Zero, row and column of every token, float32 [rows * columns, 3]."""
    places = [torch.arange(size, dtype=torch.float32) for size in grid]
    return torch.cartesian_prod(torch.zeros(1), *places)


class FluxFamily(Family):
    """FluxPipeline: guidance is an input of the transformer (dev), or there is none (schnell)."""

    adapter, pipeline = FluxAdapter, "FluxPipeline"
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    packed, guided = True, False
    text_outputs: ClassVar[Mapping[str, int]] = {"encoder_hidden_states": 0, "pooled_projections": 1}  # of T5, of CLIP
    schedulers: tuple[str, ...] = (EULER, UNIPC, DPM)
    scheduler_options: ClassVar[Mapping[str, Mapping[str, JsonValue]]] = {
        EULER: {"use_flow_sigmas": False},  # one that was UniPC is asked for its own sigmas
        DPM: {"use_dynamic_shifting": True},  # the pipeline says how far, which it takes with this alone
    }
    transformer_options: ClassVar[Mapping[str, JsonValue]] = {"patch_size": 1}

    def defaults(self, config: Mapping[str, JsonValue]) -> tuple[int, float]:
        """Of Flux dev and of Flux schnell."""
        return (28, 3.5) if config.get("guidance_embeds") else (4, 0.0)


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
