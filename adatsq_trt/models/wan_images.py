"""Wan with a first image: diffusers' WanImageToVideoPipeline, of Wan 2.1 and of Wan 2.2 with its two transformers.

The image's latents, with a mask of the frames that it says, are 20 further channels of the video's. Wan 2.1's
transformer also sees the embedding of CLIP's image encoder, beside the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from PIL import Image
from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn import functional

from adatsq_trt.errors import MismatchError
from adatsq_trt.files import read_json_model
from adatsq_trt.image import ImageShape
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.family import AGAIN, Canvas, JsonObject, VaeScale
from adatsq_trt.models.image_condition import IMAGE_LATENTS, ImageCondition, first_draw
from adatsq_trt.models.wan import RealRotaryProcessor, WanAdapter, WanFamily, WanTrace
from adatsq_trt.transformer_call import TransformerCall

EMBEDDING = "encoder_hidden_states_image"
_ENCODER = "image_encoder"
_TEXT_TOKENS = 512  # behind which the transformer's attention expects the image's tokens to end


class WanImageAdapter(WanAdapter):
    """A Wan that is shown the first frame."""

    quantizable = re.compile(
        r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|attn2\.add_[kv]_proj|ffn\.net\.(0\.proj|2))"
    )
    any_size = ModelAdapter.any_size  # which refuses other sizes

    def find_latent_shape(self) -> tuple[int, ...]:
        """(channels of the noise, frames, rows, columns)."""
        return (self.transformer.config.out_channels, *super().find_latent_shape()[1:])

    def make_trace(self) -> nn.Module:
        """The transformer with constant rotations, with or without an embedding of the image."""
        if self.transformer.config.image_dim is None:
            return WanImageTrace(self.transformer, self.latent_shape)
        if self.encoder.text_tokens != _TEXT_TOKENS:
            raise MismatchError(
                f"texts of {self.encoder.text_tokens} tokens: a Wan that sees an embedding of an image takes "
                f"{_TEXT_TOKENS}; encode them with max_sequence_length={_TEXT_TOKENS}"
            )
        return WanEmbeddedImageTrace(self.transformer, self.latent_shape)

    def pipeline_call(self) -> TransformerCall:
        """The image's latents follow the video's in the channels; its embedding is an argument of its own."""
        call, config = super().pipeline_call(), self.transformer.config
        own = {name: name if name == EMBEDDING else "hidden_states" for name in self.image_inputs}
        return TransformerCall(
            **{
                **call.model_dump(),
                "inputs": {**call.inputs, **own},
                "joined": {"hidden_states": 1},
                "settings": {**call.settings, "image_dim": config.image_dim},
            }
        )


class ImageRotaryProcessor(RealRotaryProcessor):
    """Wan's attention over an image's tokens and a text, each by itself: both results are added."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of [B, S, width], over itself or over an image and a text [B, N + 512, width]."""
        if attn.add_k_proj is None or encoder_hidden_states is None:
            own: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            return own
        image, text = encoder_hidden_states[:, :-_TEXT_TOKENS], encoder_hidden_states[:, -_TEXT_TOKENS:]
        query = attn.norm_q(attn.to_q(hidden_states))
        of_image = (attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image))
        of_text = (attn.norm_k(attn.to_k(text)), attn.to_v(text))

        def by_head(tokens: Tensor) -> Tensor:
            split: Tensor = tokens.unflatten(2, (attn.heads, -1))
            return split.transpose(1, 2)

        mixed = [
            functional.scaled_dot_product_attention(by_head(query), by_head(key), by_head(value))
            for key, value in (of_text, of_image)
        ]
        joined: Tensor = attn.to_out[0]((mixed[0] + mixed[1]).transpose(1, 2).flatten(2))
        return joined


class WanImageTrace(WanTrace):
    """WanTransformer3DModel whose latents are continued by those of an image."""

    processor, takes_images = ImageRotaryProcessor, True

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, image_latents: Tensor, timestep: Tensor
    ) -> Tensor:
        """Predicted velocity, shape of `hidden_states`."""
        both = torch.cat([hidden_states, image_latents], dim=1)
        return self._predict(self.rotations, both, encoder_hidden_states, timestep)


class WanEmbeddedImageTrace(WanImageTrace):
    """The same with the embedding of the image."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        image_latents: Tensor,
        encoder_hidden_states_image: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        """Predicted velocity, shape of `hidden_states`."""
        both = torch.cat([hidden_states, image_latents], dim=1)
        return self._predict(self.rotations, both, encoder_hidden_states, timestep, encoder_hidden_states_image)


class FirstFrameCondition(ImageCondition):
    """Latents of a video that begins with the image, a mask of its frames, and CLIP's embedding where it is seen."""

    encoders: ClassVar[Mapping[str, str]] = {_ENCODER: "CLIPVisionModel", "image_processor": "CLIPImageProcessor"}

    def parts(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """CLIP's, where the transformer takes its embedding of the image."""
        return {} if config.get("image_dim") is None else self.encoders

    def channels(self, latent: int, scale: VaeScale) -> int:
        """As many as the noise, and one for each frame of a latent's frame."""
        return latent + (scale.frames or 1)

    def shapes(self, config: Mapping[str, Any], image: ImageShape, folder: Path) -> dict[str, tuple[int, ...]]:
        """All channels that are not the noise's; CLIP's tokens, one for each of its patches and one for all."""
        channels = config["in_channels"] - config["out_channels"]
        shapes: dict[str, tuple[int, ...]] = {IMAGE_LATENTS: (channels, image.frames or 1, *image.grid)}
        if config.get("image_dim") is not None:
            file = folder / _ENCODER / "config.json"
            own = read_json_model(file, JsonObject, AGAIN).root
            side, patch, width = own.get("image_size"), own.get("patch_size"), own.get("hidden_size")
            if not isinstance(side, int) or not isinstance(patch, int) or width != config["image_dim"]:
                raise MismatchError(
                    f"'{file}': image_size {side}, patch_size {patch} and hidden_size {width}, expected an encoder "
                    f"whose tokens are {config['image_dim']} wide; {AGAIN}"
                )
            shapes[EMBEDDING] = ((side // patch) ** 2 + 1, config["image_dim"])
        return shapes

    def encode(self, pipe: Any, image: Image.Image, mask: Image.Image | None, canvas: Canvas) -> dict[str, Tensor]:
        """As the pipeline's call does with a first image alone."""
        size, vae = (canvas.height, canvas.width), pipe.vae
        pixels = pipe.video_processor.preprocess(image, *size).to(vae.device, torch.float32)
        frames = canvas.frames or 1
        _, latents = pipe.prepare_latents(
            pixels, 1, vae.config.z_dim, *size, frames, torch.float32, vae.device, first_draw()
        )
        tensors = {IMAGE_LATENTS: latents[0]}
        if pipe.image_encoder is not None:
            tensors[EMBEDDING] = pipe.encode_image(image, vae.device)[0]
        return tensors


class WanImageFamily(WanFamily):
    """WanImageToVideoPipeline with a first image alone."""

    adapter, pipeline = WanImageAdapter, "WanImageToVideoPipeline"
    image_condition: ClassVar[ImageCondition] = FirstFrameCondition()
    transformer_options: ClassVar[Mapping[str, JsonValue]] = {"pos_embed_seq_len": None}
    instead = "choose another checkpoint, such as Wan 2.1's image to video"

    def require_supported(self, config: Mapping[str, JsonValue], file: Path, folder: Path) -> None:
        """Also refuse a transformer that embeds an image and does not look at it, or the other way round."""
        super().require_supported(config, file, folder)
        given, looked = config.get("image_dim"), config.get("added_kv_proj_dim")
        if (given is None) != (looked is None):
            raise MismatchError(
                f"'{file}': image_dim is {given} and added_kv_proj_dim {looked}, expected both or none; choose another "
                f"{self.pipeline}"
            )
