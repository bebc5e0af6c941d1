"""Qwen-Image: diffusers' QwenImagePipeline and its QwenImageTransformer2DModel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn import functional

from adatsq_trt.errors import DamagedFileError, MismatchError
from adatsq_trt.files import read_json_model
from adatsq_trt.models.adapter import AnySize, open_axes
from adatsq_trt.models.family import AGAIN, Family, JsonObject, VaeScale
from adatsq_trt.models.masked import attention_mask, count_tokens
from adatsq_trt.models.prompted import PromptedAdapter
from adatsq_trt.models.rotary import require_positions, rotate_pairs
from adatsq_trt.schedule import Schedule, Steps, make_schedule
from adatsq_trt.transformer_call import TransformerCall, forward_arguments

_ROTATIONS, _TEXT_ROTATIONS = "rotations", "text_rotations"
# Of the last block: what only they make is the text behind it, which nothing reads.
_UNREAD = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")


class QwenImageAdapter(PromptedAdapter):
    """A Qwen-Image with a closed set of prompts, whose latents are tokens, as its pipeline packs them.

    Rows of zeros follow a prompt's own tokens, and attention does not look at them. A guided prediction has the norm of
    the conditional one, token by token.
    """

    model_class = QwenImageTransformer2DModel
    text_width = "joint_attention_dim"
    transformer: QwenImageTransformer2DModel
    quantizable = re.compile(
        r"transformer_blocks\.\d+\."
        r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|(img|txt)_mlp\.net\.(0\.proj|2))"
    )
    block_lists = ("transformer_blocks",)
    float32_inputs = ("timestep",)
    rescaled_guidance = True

    def find_latent_shape(self) -> tuple[int, ...]:
        """(tokens, channels)."""
        rows, columns = self.image.grid
        return (rows * columns, self.transformer.config.in_channels)

    def quantizable_layers(self) -> dict[str, nn.Linear]:
        """Without those of the last block that make nothing but the text behind it."""
        last = len(self.transformer.transformer_blocks) - 1
        unread = {f"transformer_blocks.{last}.{layer}" for layer in _UNREAD}
        return {name: layer for name, layer in super().quantizable_layers().items() if name not in unread}

    def make_trace(self) -> nn.Module:
        """The transformer with constant rotations."""
        return QwenImageTrace(self.transformer, self.image.grid, self.encoder.text_tokens)

    def any_size(self) -> AnySize:
        """The number of tokens is left open; where the text's positions begin depends on the size, too."""
        (tokens,) = open_axes(tokens=self.latent_shape[0])
        module = QwenImageAnySizeTrace(self.transformer, self.image.grid, self.encoder.text_tokens)
        return AnySize(
            module,
            {_ROTATIONS: module.rotations, _TEXT_ROTATIONS: module.text_rotations},
            {_ROTATIONS: {1: tokens}, "hidden_states": {1: tokens}},
        )

    def condition(self, tokens: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        """Text tokens; rows of zeros stand for no token."""
        return {"encoder_hidden_states": tokens}

    def schedule(self, steps: Steps) -> Schedule:
        """Qwen-Image's sigmas for this image size."""
        return make_schedule(self.scheduler, steps, self.latent_shape[0])

    def pipeline_call(self) -> TransformerCall:
        """A mask says how long a text is, and a list of grids how large the image."""
        return TransformerCall(
            arguments=forward_arguments(QwenImageTransformer2DModel),
            inputs={name: name for name in ("hidden_states", "encoder_hidden_states")},
            time="timestep",
            grids="img_shapes",
            masks={"encoder_hidden_states": "encoder_hidden_states_mask"},
            settings={name: self.transformer.config[name] for name in ("in_channels", "guidance_embeds")},
        )


class RealRotaryProcessor(QwenDoubleStreamAttnProcessor2_0):  # type: ignore[misc]
    """Qwen-Image's attention with real numbers.

    `image_rotary_emb` are cosines and sines of the image and of the text, each [2, S, 1, D / 2];
    `encoder_hidden_states_mask` [B, T] is added to the products with the text's keys.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of image [B, S, width] and text [B, T, width]; complex rotations are diffusers' business."""
        if encoder_hidden_states is None or image_rotary_emb is None or image_rotary_emb[0].is_complex():
            return super().__call__(  # type: ignore[no-any-return]
                attn,
                hidden_states,
                encoder_hidden_states,
                encoder_hidden_states_mask,
                attention_mask,
                image_rotary_emb,
            )
        own, texts = image_rotary_emb
        image = self._projected(attn, hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), own)
        text = self._projected(
            attn,
            encoder_hidden_states,
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            ("norm_added_q", "norm_added_k"),
            texts,
        )
        query, key, value = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(text, image, strict=True))
        mask = encoder_hidden_states_mask
        if mask is not None:  # the image is seen
            mask = functional.pad(mask, (0, hidden_states.shape[1]))[:, None, None]
        mixed = functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
        length = encoder_hidden_states.shape[1]
        return attn.to_out[0](mixed[:, length:]), attn.to_add_out(mixed[:, :length])

    @staticmethod
    def _projected(
        attn: Attention, tokens: Tensor, layers: tuple[str, ...], norms: tuple[str, str], rotations: Tensor
    ) -> list[Tensor]:
        """Query, key and value of one of the two, [B, S, heads, D], turned by their positions."""
        query, key, value = (getattr(attn, layer)(tokens).unflatten(-1, (attn.heads, -1)) for layer in layers)
        turned = (
            rotate_pairs(getattr(attn, norm)(x).float(), *rotations).type_as(x)
            for norm, x in zip(norms, (query, key), strict=True)
        )
        return [*turned, value]


class QwenImageTrace(nn.Module):
    """QwenImageTransformer2DModel on one image size: constant rotations in real numbers.

    Prompts of several lengths share a batch: zeros in the condition say where each ends.

    Attributes:
        images: that have tokens, all of one size: the picture, and what it is drawn beside.
    """

    images: ClassVar[int] = 1
    rotations: Tensor
    text_rotations: Tensor
    places: Tensor

    def __init__(self, transformer: QwenImageTransformer2DModel, grid: tuple[int, int], length: int) -> None:
        """Wrap a transformer.

        Args:
            transformer: its attention gets a processor that also takes real rotations.
            grid: rows and columns of tokens.
            length: of the longest prompt.

        Raises:
            MismatchError: the image or the text is longer than the transformer's table of positions.
        """
        super().__init__()
        self.transformer, table = transformer, transformer.pos_embed
        rows, most = max(grid), len(table.pos_freqs)
        require_positions(grid, (most, most))
        if rows // 2 + length > most:
            raise MismatchError(
                f"prompts of {length} tokens beside an image of {' x '.join(map(str, grid))}: the model's table of "
                f"positions has room for {most - rows // 2}; shorten the longest of the prompts (--prompts FILE)"
            )
        for module in transformer.modules():
            if isinstance(module, Attention):
                module.set_processor(RealRotaryProcessor())
        image, text = table([[(1, *grid)] * self.images], max_txt_seq_len=length, device=table.pos_freqs.device)
        buffers = {_ROTATIONS: _real(image), _TEXT_ROTATIONS: _real(text), "places": torch.arange(1.0, length + 1)}
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """Predicted velocity, shape of `hidden_states`."""
        rotations = (self.rotations, self.text_rotations)
        return self._predict(rotations, hidden_states, encoder_hidden_states, timestep)

    def _predict(self, rotations: tuple[Tensor, Tensor], latent: Tensor, condition: Tensor, timestep: Tensor) -> Tensor:
        """The same with the rotations of image and text."""
        model = self.transformer
        image, text = model.img_in(latent), model.txt_in(model.txt_norm(condition))
        mask = attention_mask(count_tokens(condition, self.places), self.places).type_as(text)
        modulation = model.time_text_embed(timestep, image)
        for block in model.transformer_blocks:
            text, image = block(image, text, mask, modulation, rotations)
        return model.proj_out(model.norm_out(image, modulation))  # type: ignore[no-any-return]


class QwenImageAnySizeTrace(QwenImageTrace):
    """The same for images of any size: the rotations are inputs."""

    def forward(  # type: ignore[override]
        self,
        rotations: Tensor,
        text_rotations: Tensor,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        """Predicted velocity; rotations [2, tokens, 1, D / 2] of the image's tokens and of the text's."""
        return self._predict((rotations, text_rotations), hidden_states, encoder_hidden_states, timestep)


def _real(rotations: Tensor) -> Tensor:
    """Complex [S, D / 2] → cosines and sines, float32 [2, S, 1, D / 2]."""
    return torch.stack([rotations.real, rotations.imag])[:, :, None].contiguous()


class QwenImageFamily(Family):
    """QwenImagePipeline. It guides where it is given a negative prompt, which may be empty."""

    adapter, pipeline = QwenImageAdapter, "QwenImagePipeline"
    token_multiple = 32  # so that bundles also take prompts that are a little longer
    packed = True
    transformer_options: ClassVar[Mapping[str, JsonValue]] = {
        "patch_size": 2,
        "guidance_embeds": False,
        "zero_cond_t": False,
        "use_additional_t_cond": False,
        "use_layer3d_rope": False,
    }
    vae_channels = "z_dim"

    def defaults(self, config: Mapping[str, JsonValue]) -> tuple[int, float]:
        """Of Qwen-Image."""
        return 50, 4.0

    def returned_channels(self, config: Mapping[str, JsonValue]) -> JsonValue:
        """A token's, where `out_channels` are those of a cell."""
        cells, side = config.get("out_channels") or config.get("in_channels"), config.get("patch_size")
        return cells * side**2 if isinstance(cells, int) and isinstance(side, int) else cells

    def vae_scale(self, folder: Path) -> VaeScale:
        """Of Qwen-Image's VAE, which is one of videos."""
        config = folder / "vae" / "config.json"
        levels = read_json_model(config, JsonObject, AGAIN).root.get("temperal_downsample")
        if not isinstance(levels, list):
            raise DamagedFileError(f"'{config}' has no list 'temperal_downsample'; {AGAIN}")
        return VaeScale(2 ** len(levels))
