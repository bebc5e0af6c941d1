"""HunyuanVideo-1.5: diffusers' HunyuanVideo15Pipeline and its HunyuanVideo15Transformer3DModel, text to video."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn import functional

from adatsq_trt.errors import DamagedFileError, MismatchError
from adatsq_trt.files import read_json_model
from adatsq_trt.models.adapter import AnySize, open_axes
from adatsq_trt.models.family import AGAIN, Canvas, Family, JsonObject, VaeScale
from adatsq_trt.models.masked import attention_mask, count_tokens
from adatsq_trt.models.prompted import PromptedAdapter
from adatsq_trt.models.rotary import rotate_pairs
from adatsq_trt.schedule import EULER, TRAIN_TIMESTEPS, Schedule, Steps, make_schedule
from adatsq_trt.text_call import TextCall
from adatsq_trt.transformer_call import TIMESTEPS, TransformerCall, forward_arguments

_LATENTS, _TEXT, _GLYPHS, _ROTATIONS = "hidden_states", "encoder_hidden_states", "encoder_hidden_states_2", "rotations"
_GLYPH_TOKENS = 256  # at most
_GUIDER = "guider"
# Of the last block: what only they make is the text behind it, which nothing reads.
_UNREAD = ("attn.add_q_proj", "attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")


class HunyuanVideo15Adapter(PromptedAdapter):
    """A HunyuanVideo-1.5 with a closed set of prompts; latents are [channels, frames, rows, columns].

    A condition is two texts: the prompt by a language model, and what it has in quotes, letter by letter, which may be
    nothing. Rows of zeros follow a text's own tokens, and attention does not look at them.
    """

    model_class = HunyuanVideo15Transformer3DModel
    text_width = "text_embed_dim"
    transformer: HunyuanVideo15Transformer3DModel
    quantizable = re.compile(
        r"transformer_blocks\.\d+\."
        r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
    )
    block_lists = ("transformer_blocks",)
    float32_inputs = ("timestep",)

    def find_latent_shape(self) -> tuple[int, ...]:
        """(channels of the noise, frames, rows, columns)."""
        return (self.transformer.config.out_channels, self.image.frames or 1, *self.image.grid)

    def quantizable_layers(self) -> dict[str, nn.Linear]:
        """Without those of the last block that make nothing but the text behind it."""
        last = len(self.transformer.transformer_blocks) - 1
        unread = {f"transformer_blocks.{last}.{layer}" for layer in _UNREAD}
        return {name: layer for name, layer in super().quantizable_layers().items() if name not in unread}

    def make_trace(self) -> nn.Module:
        """The transformer with constant rotations."""
        return HunyuanVideo15Trace(self.transformer, self.latent_shape, self.encoder.text_tokens)

    def any_size(self) -> AnySize:
        """Frames, rows and columns, with their rotations, are left open."""
        module = HunyuanVideo15AnySizeTrace(self.transformer, self.latent_shape, self.encoder.text_tokens)
        frames, rows, columns = self.latent_shape[1:]
        cells = open_axes(frames=frames, rows=rows, columns=columns)
        axes = {_ROTATIONS: dict(enumerate(cells, 1)), _LATENTS: dict(enumerate(cells, 2))}
        return AnySize(module, {_ROTATIONS: module.rotations}, axes)

    def condition(self, tokens: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        """Both texts; the second comes as one row of numbers for each prompt."""
        return {_TEXT: tokens, _GLYPHS: pooled.unflatten(-1, (-1, self.transformer.config.text_embed_2_dim))}

    def schedule(self, steps: Steps) -> Schedule:
        """Sigmas from 1 to 1/steps with the scheduler's shift, which does not depend on the size."""
        return make_schedule(self.scheduler, steps, image_tokens=0)

    def pipeline_call(self) -> TransformerCall:
        """Masks say how long the texts are; an image's latents and embedding are there and are zero."""
        config = self.transformer.config
        return TransformerCall(
            arguments=forward_arguments(HunyuanVideo15Transformer3DModel),
            inputs={name: name for name in (_LATENTS, _TEXT, _GLYPHS)},
            time="timestep",
            time_range=TIMESTEPS,
            masks={_TEXT: "encoder_attention_mask", _GLYPHS: "encoder_attention_mask_2"},
            zeros=("image_embeds",),
            zeros_behind={_LATENTS: config.in_channels - config.out_channels},
            settings={name: config[name] for name in ("in_channels", "target_size", "image_embed_dim")},
        )


class RealRotaryProcessor(HunyuanVideo15AttnProcessor2_0):  # type: ignore[misc]
    """Joint attention of a video and its texts.

    `attention_mask` [B, T] is added to the products with the texts' keys; `image_rotary_emb` are cosines and sines of
    the video, each [S, 1, D / 2].
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Attention of video [B, S, width] and texts [B, T, width]."""
        names, added = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
        query, key, value = (getattr(attn, name)(hidden_states).unflatten(2, (attn.heads, -1)) for name in names)
        texts = (getattr(attn, name)(encoder_hidden_states).unflatten(2, (attn.heads, -1)) for name in added)
        text_query, text_key, text_value = texts
        query, key = (
            rotate_pairs(norm(x).float(), *image_rotary_emb).type_as(x)
            for norm, x in ((attn.norm_q, query), (attn.norm_k, key))
        )
        pairs = (
            (query, attn.norm_added_q(text_query)),
            (key, attn.norm_added_k(text_key)),
            (value, text_value),
        )
        query, key, value = (torch.cat(pair, dim=1).transpose(1, 2) for pair in pairs)
        cells = hidden_states.shape[1]
        mask = functional.pad(attention_mask, (cells, 0))[:, None, None]  # the video is seen
        mixed = functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
        return attn.to_out[0](mixed[:, :cells]), attn.to_add_out(mixed[:, cells:])


class MaskedProcessor:
    """Attention of a text over itself; `attention_mask` [B, T] is added to the products with the keys."""

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: None, attention_mask: Tensor
    ) -> Tensor:
        """Attention of [B, T, width]."""
        query, key, value = (
            layer(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attention_mask[:, None, None])
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class HunyuanVideo15Trace(nn.Module):
    """HunyuanVideo15Transformer3DModel on one video size, without an image: constant rotations, no convolution.

    Diffusers sorts the tokens of the texts, those that there are before those that there are not. Texts have no
    positions, so in any order the video sees the same; here all stay where they are, and a mask hides what is none.
    """

    rotations: Tensor
    places: Tensor

    def __init__(
        self, transformer: HunyuanVideo15Transformer3DModel, latent_shape: tuple[int, ...], length: int
    ) -> None:
        """Wrap a transformer.

        Args:
            transformer: its attention gets processors that take a mask to be added.
            latent_shape: (channels, frames, rows, columns).
            length: of the longest prompt.
        """
        super().__init__()
        self.transformer, grid = transformer, latent_shape[1:]
        for block in transformer.transformer_blocks:
            block.attn.set_processor(RealRotaryProcessor())
        for block in transformer.context_embedder.token_refiner.refiner_blocks:
            block.attn.set_processor(MaskedProcessor())
        # Every angle twice; one is enough.
        tables = torch.stack([x[:, None, ::2] for x in transformer.rope(torch.empty(1, *latent_shape))])
        self.register_buffer(_ROTATIONS, tables.unflatten(1, grid).contiguous(), persistent=False)
        self.register_buffer("places", torch.arange(1.0, max(length, _GLYPH_TOKENS) + 1), persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_2: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        """Predicted velocity, shape of `hidden_states`; `timestep` is a fraction of the 1,000 of the training."""
        texts = (encoder_hidden_states, encoder_hidden_states_2)
        return self._predict(self.rotations, hidden_states, texts, timestep)

    def _predict(self, rotations: Tensor, latent: Tensor, texts: tuple[Tensor, Tensor], timestep: Tensor) -> Tensor:
        """The same with the rotations of its cells [2, frames, rows, columns, 1, D / 2], which say the size."""
        model, channels, time = self.transformer, latent.shape[1], timestep * TRAIN_TIMESTEPS
        # A patch is one cell, so its embedding is a linear layer; the channels of an image's latents are zero.
        embedding = model.x_embedder.proj
        cells = latent.flatten(2).transpose(1, 2)
        video = functional.linear(cells, embedding.weight[:, :channels].flatten(1), embedding.bias)
        embedder = model.time_embed
        modulation = embedder.timestep_embedder(embedder.time_proj(time).type_as(video))
        both, mask = self._embed_texts(texts, time)
        turned = tuple(rotations.flatten(1, 3))
        for block in model.transformer_blocks:
            video, both = block(video, both, modulation, mask, turned)
        video = model.proj_out(model.norm_out(video, modulation))
        return video.transpose(1, 2).unflatten(2, rotations.shape[1:4])  # type: ignore[no-any-return]

    def _embed_texts(self, texts: tuple[Tensor, Tensor], time: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of both texts [B, T, width], and the mask that hides those that are none [B, T]."""
        model, refiner = self.transformer, self.transformer.context_embedder
        places = [self.places[: text.shape[1]] for text in texts]
        lengths = [count_tokens(text, numbers) for text, numbers in zip(texts, places, strict=True)]
        masks = [
            attention_mask(count, numbers).type_as(texts[0]) for count, numbers in zip(lengths, places, strict=True)
        ]
        mean = (texts[0].float().sum(1) / lengths[0].clamp(min=1)[:, None]).type_as(texts[0])
        modulation, prompt = refiner.time_text_embed(time, mean), refiner.proj_in(texts[0])
        for block in refiner.token_refiner.refiner_blocks:
            prompt = block(prompt, modulation, masks[0])
        glyphs, (of_prompt, of_glyphs, _) = model.context_embedder_2(texts[1]), model.cond_type_embed.weight
        return torch.cat([glyphs + of_glyphs, prompt + of_prompt], dim=1), torch.cat([masks[1], masks[0]], dim=1)


class HunyuanVideo15AnySizeTrace(HunyuanVideo15Trace):
    """The same for videos of any size: their rotations are an input."""

    def forward(  # type: ignore[override]
        self,
        rotations: Tensor,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_2: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        """Predicted velocity; `rotations` [2, frames, rows, columns, 1, D / 2] of the cells."""
        return self._predict(rotations, hidden_states, (encoder_hidden_states, encoder_hidden_states_2), timestep)


class HunyuanVideo15Family(Family):
    """HunyuanVideo15Pipeline: text to video, guided by its object for classifier-free guidance."""

    adapter, pipeline = HunyuanVideo15Adapter, "HunyuanVideo15Pipeline"
    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    settings_parts = (_GUIDER,)
    canvas = Canvas(480, 848, 121)
    patch = 1
    token_multiple = 32  # so that bundles also take prompts that are a little longer
    second_multiple = 64
    # Tokens and mask of the prompt, then of the glyphs.
    text_outputs: ClassVar[Mapping[str, int]] = {_TEXT: 0, _GLYPHS: 2}
    text_masks: ClassVar[Mapping[str, int]] = {_TEXT: 1, _GLYPHS: 3}
    scheduler_options: ClassVar[Mapping[str, Mapping[str, JsonValue]]] = {EULER: {"use_dynamic_shifting": False}}
    transformer_options: ClassVar[Mapping[str, JsonValue]] = {
        "patch_size": 1,
        "patch_size_t": 1,
        "use_meanflow": False,
    }

    def defaults(self, config: Mapping[str, JsonValue]) -> tuple[int, float]:
        """Of the pipeline's call, and of the guider that the authors give it."""
        return 50, 6.0

    def pipeline_defaults(self, config: Mapping[str, JsonValue], folder: Path) -> tuple[int, float]:
        """With the scale of the pipeline's own guider, which guides nothing where it is not enabled."""
        guider = _read_guider(folder)
        return self.defaults(config)[0], float(guider["guidance_scale"]) if guider["enabled"] else 1.0

    def require_supported(self, config: Mapping[str, JsonValue], file: Path, folder: Path) -> None:
        """Also refuse a guider of another kind, or one that guides in another way."""
        super().require_supported(config, file, folder)
        _read_guider(folder)

    def pipeline_canvas(self, config: Mapping[str, JsonValue]) -> Canvas:
        """The pipeline's own for the size that the transformer was trained at."""
        processor, target = HunyuanVideo15ImageProcessor(), config.get("target_size", 640)
        height, width = processor.calculate_default_height_width(9, 16, target)
        return replace(self.canvas, height=height, width=width)

    def widths(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Of a token of the prompt, and of as many glyphs as there may be."""
        return config["text_embed_dim"], _GLYPH_TOKENS * config["text_embed_2_dim"]

    def vae_scale(self, folder: Path) -> VaeScale:
        """Of HunyuanVideo's VAE."""
        config = folder / "vae" / "config.json"
        values = read_json_model(config, JsonObject, AGAIN).root
        pixels, frames = (values.get(f"{kind}_compression_ratio") for kind in ("spatial", "temporal"))
        if not isinstance(pixels, int) or not isinstance(frames, int):
            raise DamagedFileError(f"'{config}': compression ratios {pixels} and {frames}, expected integers; {AGAIN}")
        return VaeScale(pixels, frames)

    def _image_channels(self, latent: int, folder: Path) -> int:
        """Latents and mask of an image, which are zero here."""
        return latent + 1

    def _encoding_call(self) -> TextCall:
        """The pipeline's `encode_prompt` takes no number of tokens."""
        return super()._encoding_call().model_copy(update={"arguments": {}})


def _read_guider(folder: Path) -> Any:
    """Read the settings of a pipeline's guider.

    Raises:
        MismatchError: it is another kind of guidance than the loop's, or has an option that is not followed.
        DamagedFileError: its scale is no number.
        MissingFileError: it has none.
    """
    file = folder / _GUIDER / "guider_config.json"
    known: dict[str, JsonValue] = {"guidance_scale": 7.5, "enabled": True}  # unless the file says otherwise
    followed = {"_class_name": "ClassifierFreeGuidance", "guidance_rescale": 0.0, "use_original_formulation": False}
    followed |= {"start": 0.0, "stop": 1.0}
    config = {**known, **followed, **read_json_model(file, JsonObject, AGAIN).root}
    for option, value in config.items():
        if option in followed and value != followed[option]:
            what = "a guider" if option == "_class_name" else f"{option} ="
            raise MismatchError(
                f"'{file}': {what} {value!r} is not followed, expected {followed[option]!r}; save the pipeline with "
                "such a guider"
            )
        if option not in {*known, *followed} and not option.startswith("_"):
            raise MismatchError(
                f"'{file}': ClassifierFreeGuidance of the installed diffusers has no option '{option}'; take it out, "
                "or install the diffusers that the pipeline was saved with"
            )
    if isinstance(config["guidance_scale"], bool) or not isinstance(config["guidance_scale"], float | int):
        raise DamagedFileError(f"'{file}': guidance_scale is {config['guidance_scale']!r}, expected a number; {AGAIN}")
    return config
