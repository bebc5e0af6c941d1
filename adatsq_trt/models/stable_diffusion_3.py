"""Stable Diffusion 3 and 3.5: diffusers' StableDiffusion3Pipeline and its SD3Transformer2DModel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from diffusers import SD3Transformer2DModel
from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn import functional

from adatsq_trt.models.adapter import AnySize, open_axes
from adatsq_trt.models.family import Family
from adatsq_trt.models.prompted import PromptedAdapter
from adatsq_trt.models.rotary import require_positions
from adatsq_trt.schedule import DPM, EULER, TRAIN_TIMESTEPS, UNIPC, Schedule, Steps, make_schedule
from adatsq_trt.transformer_call import TIMESTEPS, TransformerCall, forward_arguments

_POSITIONS = "positions"
_T5_TOKENS, _CLIP_TOKENS = 256, 77


class StableDiffusion3Adapter(PromptedAdapter):
    """A Stable Diffusion 3 or 3.5 with a closed set of prompts; latents are [channels, rows, columns]."""

    model_class = SD3Transformer2DModel
    text_width, pooled_width = "joint_attention_dim", "pooled_projection_dim"
    transformer: SD3Transformer2DModel
    # Medium has a second attention, of the image alone, in its first blocks.
    quantizable = re.compile(
        r"transformer_blocks\.\d+\."
        r"(attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
    )
    block_lists = ("transformer_blocks",)
    float32_inputs = ("timestep",)

    def find_latent_shape(self) -> tuple[int, ...]:
        """(channels, rows, columns)."""
        return (self.transformer.config.in_channels, *self.image.grid)

    def make_trace(self) -> nn.Module:
        """The transformer with constant positions."""
        return StableDiffusion3Trace(self.transformer, self.latent_shape)

    @property
    def patch_cells(self) -> int:
        """A token's side."""
        return int(self.transformer.config.patch_size)

    def any_size(self) -> AnySize:
        """Rows and columns of tokens, with their positions, are left open."""
        module = StableDiffusion3AnySizeTrace(self.transformer, self.latent_shape)
        height, width = module.positions.shape[:2]
        rows, columns = open_axes(rows=height, columns=width)
        side = self.patch_cells
        axes = {_POSITIONS: {0: rows, 1: columns}, "hidden_states": {2: side * rows, 3: side * columns}}
        return AnySize(module, {_POSITIONS: module.positions}, axes)

    def condition(self, tokens: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        """Tokens of CLIP and T5, and the pooled projections of both CLIPs."""
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def schedule(self, steps: Steps) -> Schedule:
        """The scheduler's own sigmas, which do not depend on the size."""
        return make_schedule(self.scheduler, steps)

    def pipeline_call(self) -> TransformerCall:
        """By diffusers' own names, with the scheduler's timesteps."""
        inputs, config = ("hidden_states", "encoder_hidden_states", "pooled_projections"), self.transformer.config
        return TransformerCall(
            arguments=forward_arguments(SD3Transformer2DModel),
            inputs={name: name for name in inputs},
            time="timestep",
            time_range=TIMESTEPS,
            settings={name: config[name] for name in ("in_channels", "patch_size", "sample_size")},
        )


class StableDiffusion3Trace(nn.Module):
    """SD3Transformer2DModel on one image size: constant positions, no convolution."""

    positions: Tensor

    def __init__(self, transformer: SD3Transformer2DModel, latent_shape: tuple[int, ...]) -> None:
        """Wrap a transformer.

        Args:
            transformer: its table of positions is cut to the middle, as in diffusers.
            latent_shape: (channels, rows, columns).

        Raises:
            MismatchError: the image is larger than that table.
        """
        super().__init__()
        self.transformer, self.side = transformer, int(transformer.config.patch_size)
        rows, columns = (size // self.side for size in latent_shape[1:])
        require_positions((rows, columns), [transformer.config.pos_embed_max_size] * 2)
        table = transformer.pos_embed.cropped_pos_embed(*latent_shape[1:])
        self.register_buffer(_POSITIONS, table[0].unflatten(0, (rows, columns)).contiguous(), persistent=False)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor
    ) -> Tensor:
        """Predicted velocity, shape of `hidden_states`; `timestep` is a fraction of the 1,000 of the training."""
        return self._predict(self.positions, hidden_states, encoder_hidden_states, pooled_projections, timestep)

    def _predict(
        self, positions: Tensor, latent: Tensor, condition: Tensor, pooled: Tensor, timestep: Tensor
    ) -> Tensor:
        """The same with the positions of its tokens [rows, columns, width], which say the size."""
        model = self.transformer
        rows, columns = positions.shape[:2]
        # The patch embedding's stride is its kernel, so it is a linear layer; ONNX has no bfloat16 convolution.
        embedding = model.pos_embed.proj
        tokens = functional.linear(self._patchify(latent, rows, columns), embedding.weight.flatten(1), embedding.bias)
        tokens = (tokens + positions.flatten(0, 1)).type_as(tokens)
        modulation = model.time_text_embed(timestep * TRAIN_TIMESTEPS, pooled)
        text = model.context_embedder(condition)
        for block in model.transformer_blocks:
            text, tokens = block(tokens, text, modulation)
        return self._unpatchify(model.proj_out(model.norm_out(tokens, modulation)), rows, columns)

    def _patchify(self, latent: Tensor, rows: int, columns: int) -> Tensor:
        """[B, C, H, W] → [B, tokens, C p²]."""
        side, channels = self.side, latent.shape[1]
        cells = latent.reshape(-1, channels, rows, side, columns, side)
        return cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, rows * columns, channels * side * side)

    def _unpatchify(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """[B, tokens, p² C] → [B, C, H, W]."""
        side, channels = self.side, self.transformer.out_channels
        cells = tokens.reshape(-1, rows, columns, side, side, channels)
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * side, columns * side)


class StableDiffusion3AnySizeTrace(StableDiffusion3Trace):
    """The same for images of any size: their positions are an input."""

    def forward(  # type: ignore[override]
        self,
        positions: Tensor,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        """Predicted velocity; `positions` [rows, columns, width] of the tokens."""
        return self._predict(positions, hidden_states, encoder_hidden_states, pooled_projections, timestep)


class StableDiffusion3Family(Family):
    """StableDiffusion3Pipeline with all three text encoders; it guides without skipped layers."""

    adapter, pipeline = StableDiffusion3Adapter, "StableDiffusion3Pipeline"
    encoders = tuple(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    text_tokens = _CLIP_TOKENS + _T5_TOKENS
    # Tokens of both CLIPs side by side, then T5's; and the pooled projections of both CLIPs.
    text_outputs: ClassVar[Mapping[str, int]] = {"encoder_hidden_states": 0, "pooled_projections": 2}
    text_options: ClassVar[Mapping[str, JsonValue]] = {
        **{"prompt_2": None, "prompt_3": None},
        "do_classifier_free_guidance": False,
        "max_sequence_length": _T5_TOKENS,
    }
    schedulers = (EULER, UNIPC, DPM)
    scheduler_options: ClassVar[Mapping[str, Mapping[str, JsonValue]]] = {
        name: {"use_dynamic_shifting": False} for name in (EULER, UNIPC, DPM)
    }
    transformer_options: ClassVar[Mapping[str, JsonValue]] = {"patch_size": 2}

    def defaults(self, config: Mapping[str, JsonValue]) -> tuple[int, float]:
        """Of the pipeline."""
        return 28, 7.0
