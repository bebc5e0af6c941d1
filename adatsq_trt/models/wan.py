"""Wan 2.1 and 2.2: diffusers' WanPipeline and its WanTransformer3DModel, text to video."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn import functional

from adatsq_trt.errors import DamagedFileError, UnsupportedFormatError
from adatsq_trt.files import read_json_model
from adatsq_trt.models.adapter import AnySize, open_axes
from adatsq_trt.models.family import AGAIN, Canvas, Family, JsonObject, VaeScale
from adatsq_trt.models.prompted import PromptedAdapter
from adatsq_trt.models.rotary import require_positions, rotate_pairs
from adatsq_trt.schedule import DPM, SCHEDULERS, TRAIN_TIMESTEPS, UNIPC, Schedule, Steps, make_schedule
from adatsq_trt.transformer_call import TIMESTEPS, TransformerCall, forward_arguments

_FLAT = re.compile(r"lora_unet__?blocks_(\d+)_(self_attn|cross_attn|ffn)_(\w+)")


class WanAdapter(PromptedAdapter):
    """A Wan with a closed set of prompts; latents are [channels, frames, rows, columns].

    The steps are those that its scheduler takes by itself in a WanPipeline.
    """

    model_class = WanTransformer3DModel
    text_width = "text_dim"
    transformer: WanTransformer3DModel
    quantizable = re.compile(r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))")
    block_lists = ("blocks",)
    float32_inputs = ("timestep",)

    def find_latent_shape(self) -> tuple[int, ...]:
        """(channels, frames, rows, columns)."""
        return (self.transformer.config.in_channels, self.image.frames or 1, *self.image.grid)

    def make_trace(self) -> nn.Module:
        """The transformer with constant rotations."""
        return WanTrace(self.transformer, self.latent_shape)

    @property
    def patch_cells(self) -> int:
        """A token's side."""
        return int(max(self.transformer.config.patch_size[1:]))

    def any_size(self) -> AnySize:
        """Frames, rows and columns of tokens, with their rotations, are left open."""
        module = WanAnySizeTrace(self.transformer, self.latent_shape)
        frames, rows, columns = module.rotations.shape[1:4]
        tokens = open_axes(frames=frames, rows=rows, columns=columns)
        latent = {axis: side * dim for axis, (side, dim) in enumerate(zip(module.sides, tokens, strict=True), 2)}
        axes = {"rotations": dict(enumerate(tokens, 1)), "hidden_states": latent}
        return AnySize(module, {"rotations": module.rotations}, axes)

    def condition(self, tokens: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        """Text tokens; rows of zeros, which fill short prompts up, are seen like any other, as in diffusers."""
        return {"encoder_hidden_states": tokens}

    def schedule(self, steps: Steps) -> Schedule:
        """The scheduler's own sigmas, which do not depend on the size."""
        return make_schedule(self.scheduler, steps)

    def pipeline_call(self) -> TransformerCall:
        """A patch of one cell rules no size out; those that the bundle was not exported for are refused later."""
        inputs = ("hidden_states", "encoder_hidden_states")
        return TransformerCall(
            arguments=forward_arguments(WanTransformer3DModel),
            inputs={name: name for name in inputs},
            time="timestep",
            time_range=TIMESTEPS,
            settings={"in_channels": self.transformer.config.in_channels, "patch_size": [1, 1, 1]},
        )


class RealRotaryProcessor(WanAttnProcessor):  # type: ignore[misc]
    """Wan's attention without assignments to slices, which the exporter would turn into scatters."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of [B, S, width], over itself or over a text [B, T, width]."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            query, key = (rotate_pairs(x, *rotary_emb).type_as(x) for x in (query, key))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class WanTrace(nn.Module):
    """WanTransformer3DModel on one video size: constant rotations, no convolution."""

    rotations: Tensor
    processor: ClassVar[type[WanAttnProcessor]] = RealRotaryProcessor
    takes_images: ClassVar[bool] = False

    def __init__(self, transformer: WanTransformer3DModel, latent_shape: tuple[int, ...]) -> None:
        """Wrap a transformer.

        Args:
            transformer: text to video; its attention gets a processor without scatters.
            latent_shape: (channels, frames, rows, columns).

        Raises:
            UnsupportedFormatError: a transformer that also takes images.
        """
        super().__init__()
        config = transformer.config
        if not self.takes_images and (config.image_dim is not None or config.added_kv_proj_dim is not None):
            raise UnsupportedFormatError("this Wan takes images as a condition, expected one that takes text only")
        self.transformer = transformer
        for module in transformer.modules():
            if isinstance(module, WanAttention):
                module.set_processor(self.processor())
        self.sides = tuple(transformer.config.patch_size)
        grid = tuple(size // side for size, side in zip(latent_shape[1:], self.sides, strict=True))
        require_positions(grid, [transformer.config.rope_max_seq_len] * 3)
        # Every angle twice; one is enough.
        tables = torch.stack([x[0, :, :, ::2] for x in transformer.rope(torch.empty(1, *latent_shape, device="meta"))])
        self.register_buffer("rotations", tables.unflatten(1, grid), persistent=False)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """Predicted velocity, shape of `hidden_states`; `timestep` is a fraction of the 1,000 of the training."""
        return self._predict(self.rotations, hidden_states, encoder_hidden_states, timestep)

    def _predict(
        self, rotations: Tensor, latent: Tensor, condition: Tensor, timestep: Tensor, image: Tensor | None = None
    ) -> Tensor:
        """The same with the rotations of its tokens [2, frames, rows, columns, 1, D / 2], which say the size."""
        model = self.transformer
        embedding, modulation, text, shown = model.condition_embedder(timestep * TRAIN_TIMESTEPS, condition, image)
        text = text if shown is None else torch.cat([shown, text], dim=1)
        modulation = modulation.unflatten(1, (6, -1))
        # The patch embedding's stride is its kernel, so it is a linear layer; ONNX has no bfloat16 convolution.
        kernel = model.patch_embedding.weight.flatten(1)
        grid = rotations.shape[1:4]
        tokens = functional.linear(self._patchify(latent, grid), kernel, model.patch_embedding.bias)
        both = tuple(rotations.flatten(1, 3))
        for block in model.blocks:
            tokens = block(tokens, text, modulation, both)
        shift, scale = (model.scale_shift_table + embedding[:, None]).chunk(2, dim=1)
        tokens = (model.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens)
        return self._unpatchify(model.proj_out(tokens), grid)

    def _patchify(self, latent: Tensor, grid: Sequence[int]) -> Tensor:
        """[B, C, F, H, W] → [B, tokens, C pt ph pw]."""
        channels = latent.shape[1]
        sizes = [size for pair in zip(grid, self.sides, strict=True) for size in pair]
        cells = latent.reshape(-1, channels, *sizes).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return cells.reshape(-1, prod(grid), channels * prod(self.sides))

    def _unpatchify(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """[B, tokens, pt ph pw C] → [B, C, F, H, W]."""
        cells = tokens.reshape(-1, *grid, *self.sides, tokens.shape[-1] // prod(self.sides))
        return cells.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class WanAnySizeTrace(WanTrace):
    """The same for videos of any size: their rotations are an input."""

    def forward(  # type: ignore[override]
        self, rotations: Tensor, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor
    ) -> Tensor:
        """Predicted velocity; `rotations` [2, frames, rows, columns, 1, D / 2] of the tokens."""
        return self._predict(rotations, hidden_states, encoder_hidden_states, timestep)


class WanFamily(Family):
    """WanPipeline: text to video."""

    adapter, pipeline = WanAdapter, "WanPipeline"
    canvas = Canvas(480, 832, 81)
    text_library = "ftfy"
    text_options: ClassVar[Mapping[str, JsonValue]] = {"do_classifier_free_guidance": False}
    schedulers = SCHEDULERS
    # The pipeline does not say how far sigmas are shifted.
    scheduler_options: ClassVar[Mapping[str, Mapping[str, JsonValue]]] = {
        UNIPC: {"use_dynamic_shifting": False},
        DPM: {"use_dynamic_shifting": False},
    }
    transformer_options: ClassVar[Mapping[str, JsonValue]] = {
        "image_dim": None,
        "added_kv_proj_dim": None,
        "pos_embed_seq_len": None,
    }
    # That of Wan 2.2 in 5B, whose pipeline gives every token a time of its own.
    pipeline_options: ClassVar[Mapping[str, JsonValue]] = {"expand_timesteps": False}
    experts = True  # of Wan 2.2 in 14B
    instead = "choose another checkpoint, such as Wan 2.1 or Wan 2.2 T2V-A14B"
    vae_channels = "z_dim"

    def defaults(self, config: Mapping[str, JsonValue]) -> tuple[int, float]:
        """Of the pipeline's call."""
        return 50, 5.0

    def vae_scale(self, folder: Path) -> VaeScale:
        """Of Wan's video VAE."""
        config = folder / "vae" / "config.json"
        values = read_json_model(config, JsonObject, AGAIN).root
        pixels, frames = values.get("scale_factor_spatial", 8), values.get("scale_factor_temporal", 4)
        if not isinstance(pixels, int) or not isinstance(frames, int):
            raise DamagedFileError(f"'{config}': scale factors {pixels} and {frames}, expected integers; {AGAIN}")
        return VaeScale(pixels, frames)

    def lora_layer(self, name: str) -> str:
        """With dots again, which the converter wants."""
        return _FLAT.sub(r"diffusion_model.blocks.\1.\2.\3", name)

    def own_name(self, weight: str) -> str:
        """By diffusers' converter of whole checkpoints."""
        from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

        return str(next(iter(convert_wan_transformer_to_diffusers({weight: torch.empty(0)}))))
