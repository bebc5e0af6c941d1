"""Z-Image: diffusers' ZImagePipeline and its ZImageTransformer2DModel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZSingleStreamAttnProcessor
from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn import functional

from adatsq_trt.errors import MismatchError
from adatsq_trt.models.adapter import AnySize, open_axes
from adatsq_trt.models.family import Family
from adatsq_trt.models.masked import attention_mask, count_tokens
from adatsq_trt.models.prompted import PromptedAdapter
from adatsq_trt.models.rotary import require_positions, rotate_pairs
from adatsq_trt.schedule import Schedule, Steps, make_schedule
from adatsq_trt.transformer_call import TransformerCall, forward_arguments


class ZImageAdapter(PromptedAdapter):
    """A Z-Image with a closed set of prompts.

    Latents are [channels, rows, columns]. Captions are tensors of one length, a multiple of 32, in which rows of zeros
    follow a caption's own tokens. As in diffusers, the learned pad token fills a caption up to the next multiple of 32;
    nothing looks at rows beyond that, and the image's positions follow each caption's own end. A guidance scale
    here is one more than the pipeline's.
    """

    model_class = ZImageTransformer2DModel
    text_width = "cap_feat_dim"
    transformer: ZImageTransformer2DModel
    quantizable = re.compile(
        r"(noise_refiner|context_refiner|layers)\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])"
    )
    block_lists = ("noise_refiner", "context_refiner", "layers")
    float32_inputs = ("timestep",)

    def find_latent_shape(self) -> tuple[int, ...]:
        """(channels, rows, columns)."""
        return (self.transformer.config.in_channels, *self.image.grid)

    def make_trace(self) -> nn.Module:
        """The transformer on batches of one shape."""
        return ZImageTrace(self.transformer, self.latent_shape, self._caption_length)

    @property
    def _caption_length(self) -> int:
        return int(-(-self.encoder.text_tokens // SEQ_MULTI_OF) * SEQ_MULTI_OF)

    @property
    def patch_cells(self) -> int:
        """A token's side."""
        (patch,) = self.transformer.config.all_patch_size
        return int(patch)

    def any_size(self) -> AnySize:
        """Rows and columns of tokens, with their rotations, are left open.

        Raises:
            MismatchError: the tokens of this size are no multiple of 32, so that there would be pad tokens, whose
                number differs between sizes.
        """
        height, width = (cells // self.patch_cells for cells in self.latent_shape[1:])
        tokens = height * width
        if tokens % SEQ_MULTI_OF:
            raise MismatchError(
                f"an image of {tokens} tokens: with several sizes Z-Image takes multiples of {SEQ_MULTI_OF} tokens, "
                f"each {self.patch_cells} x {self.patch_cells} cells of the latent; choose other --shapes"
            )
        rows, columns = open_axes(rows=height, columns=width)
        module, side = ZImageAnySizeTrace(self.transformer, self.latent_shape, self._caption_length), self.patch_cells
        axes = {"rotations": {1: rows, 2: columns}, "hidden_states": {2: side * rows, 3: side * columns}}
        return AnySize(module, {"rotations": module.image_rotations}, axes)

    def condition(self, tokens: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        """Caption features; rows of zeros stand for no token, up to a multiple of 32 rows."""
        return {"encoder_hidden_states": functional.pad(tokens, (0, 0, 0, -tokens.shape[1] % SEQ_MULTI_OF))}

    def schedule(self, steps: Steps) -> Schedule:
        """Z-Image's sigmas for this image size."""
        _, rows, columns = self.latent_shape
        return make_schedule(self.scheduler, steps, (rows // 2) * (columns // 2))

    def pipeline_call(self) -> TransformerCall:
        """Latents of one frame and captions come in lists; time runs the other way, and so does the prediction."""
        return TransformerCall(
            arguments=forward_arguments(ZImageTransformer2DModel),
            inputs={"hidden_states": "x", "encoder_hidden_states": "cap_feats"},
            time="t",
            time_range=(0.0, 1.0),
            listed=True,
            unit_axis=1,
            negated=True,
            settings={"in_channels": self.transformer.config.in_channels},
        )


class RealRotaryProcessor(ZSingleStreamAttnProcessor):  # type: ignore[misc]
    """Z-Image's attention with real numbers.

    `freqs_cis` are cosines and sines, each [S, 1, D / 2] or [B, S, 1, D / 2]; `attention_mask` [B, S] is added to the
    products with the keys.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Self-attention [B, S, width] → the same shape; complex frequencies are diffusers' business."""
        if not isinstance(freqs_cis, tuple):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)  # type: ignore[no-any-return]
        projections = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in projections)
        if attn.norm_q is not None and attn.norm_k is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key = (rotate_pairs(x.float(), *freqs_cis).type_as(x) for x in (query, key))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mask = None if attention_mask is None else attention_mask[:, None, None]
        mixed = functional.scaled_dot_product_attention(query, key, value, mask)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class ZImageTrace(nn.Module):
    """ZImageTransformer2DModel on one image size: batches instead of lists, real instead of complex numbers.

    Captions of several lengths share a batch: zeros in the condition say where each ends. Where all have 32 tokens with
    their padding, nothing depends on a caption's length, and there is no attention mask.
    """

    image_rotations: Tensor
    pad_rotations: Tensor
    caption_rotations: Tensor
    plane_rotations: Tensor
    places: Tensor

    def __init__(self, transformer: ZImageTransformer2DModel, latent_shape: tuple[int, ...], length: int) -> None:
        """Wrap a transformer.

        Args:
            transformer: with one patch size; its attention gets a processor that also takes real rotations.
            latent_shape: (channels, rows, columns).
            length: of the longest caption with its padding, a multiple of 32.

        Raises:
            MismatchError: the caption or the image is longer than the transformer's tables of positions.
        """
        super().__init__()
        (self.patch,) = transformer.config.all_patch_size
        self.transformer, self.channels = transformer, latent_shape[0]
        grid = (latent_shape[1] // self.patch, latent_shape[2] // self.patch)
        longest, *most = transformer.config.axes_lens
        if length + 2 > longest:
            raise MismatchError(
                f"captions of {length} tokens: the model's table of positions has room for {longest - 2}; shorten the "
                "longest of the prompts (--prompts FILE)"
            )
        require_positions(grid, most)
        self.padding = -(grid[0] * grid[1]) % SEQ_MULTI_OF
        for module in transformer.modules():
            if isinstance(module, Attention):
                module.set_processor(RealRotaryProcessor())
        # As diffusers counts: captions from 1, then the image as one plane; pad tokens of the image are at the origin.
        zero, places = torch.zeros(1, dtype=torch.int64), torch.arange(1, length + 1)
        image = torch.cartesian_prod(zero + length + 1, *map(torch.arange, grid))
        planes = torch.cartesian_prod(torch.arange(1, length + 2, SEQ_MULTI_OF), zero, zero)
        # What a caption's length decides is the first axis of the image's positions.
        own, self.one_length = transformer.config.axes_dims[0] // 2, length == SEQ_MULTI_OF
        rotations = self._rotations(image).unflatten(1, grid)
        buffers = {
            "image_rotations": rotations if self.one_length else rotations[..., own:],
            "plane_rotations": self._rotations(planes)[..., :own].transpose(0, 1)[:, :, None],
            "pad_rotations": self._rotations(zero.expand(self.padding, 3)),
            "caption_rotations": self._rotations(torch.cartesian_prod(places, zero, zero)),
            "places": places.float(),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.contiguous(), persistent=False)

    def _rotations(self, ids: Tensor) -> Tensor:
        """Cosines and sines of positions [S, 3]: float32 [2, S, 1, attention head's width / 2]."""
        rotations = self.transformer.rope_embedder(ids)
        return torch.stack([rotations.real, rotations.imag])[:, :, None]

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """Predicted velocity, shape of `hidden_states`; Z-Image itself predicts its opposite, at 1 - timestep."""
        return self._predict(self.image_rotations, hidden_states, encoder_hidden_states, timestep)

    def _predict(self, rotations: Tensor, latent: Tensor, condition: Tensor, timestep: Tensor) -> Tensor:
        """The same with the rotations of the image [2, rows, columns, 1, ...], which say its size."""
        model, key = self.transformer, f"{self.patch}-1"
        modulation = model.t_embedder((1 - timestep) * model.t_scale).type_as(latent)
        rows, columns = rotations.shape[1:3]
        image = model.all_x_embedder[key](self._patchify(latent, rows, columns))
        if self.padding:
            padding = model.x_pad_token.expand(image.shape[0], self.padding, -1)
            image = torch.cat([image, padding], dim=1)
        tokens = count_tokens(condition, self.places)
        own = self._image_rotations(rotations.flatten(1, 2), tokens)
        for block in model.noise_refiner:
            image = block(image, None, own, modulation)
        caption = model.cap_embedder(condition)
        caption = torch.where((self.places <= tokens[:, None])[..., None], caption, model.cap_pad_token)
        mask = None if self.one_length else self._mask(tokens).type_as(caption)
        for block in model.context_refiner:
            caption = block(caption, mask, tuple(self.caption_rotations))
        unified = torch.cat([image, caption], dim=1)
        both = tuple(map(self._followed_by_caption, own, self.caption_rotations))
        mask = None if mask is None else functional.pad(mask, (image.shape[1], 0))
        for block in model.layers:
            unified = block(unified, mask, both, modulation)
        latent_tokens = unified[:, : rows * columns]
        return -self._unpatchify(model.all_final_layer[key](latent_tokens, c=modulation), rows, columns)

    def _image_rotations(self, rotations: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the image's and its pad tokens, [S, 1, D / 2], or [B, S, 1, D / 2] for several lengths.

        Args:
            rotations: of rows and columns, [2, tokens of the image, 1, ...]; for one length of all axes.
            tokens: of each caption, [B]; the plane of the image follows its padding.
        """
        if self.one_length:
            cosines, sines = torch.cat([rotations, self.pad_rotations], dim=1)
            return cosines, sines
        planes = self.plane_rotations.index_select(0, torch.ceil(tokens / SEQ_MULTI_OF).long())
        count, batch = rotations.shape[1], planes.shape[0]
        image = torch.cat(
            [planes.expand(-1, -1, count, -1, -1), rotations.expand(batch, -1, -1, -1, -1)],
            dim=-1,
        )
        whole = torch.cat([image, self.pad_rotations.expand(batch, -1, -1, -1, -1)], dim=2)
        return whole[:, 0], whole[:, 1]

    def _mask(self, tokens: Tensor) -> Tensor:
        """The mask of a caption's keys, [B, T]; its padding is seen."""
        return attention_mask(torch.ceil(tokens / SEQ_MULTI_OF) * SEQ_MULTI_OF, self.places)

    @staticmethod
    def _followed_by_caption(image: Tensor, caption: Tensor) -> Tensor:
        """The image's cosines or sines, then the caption's [T, 1, D / 2]."""
        own = caption if image.ndim == caption.ndim else caption.expand(image.shape[0], -1, -1, -1)
        return torch.cat([image, own], dim=-3)

    def _patchify(self, latent: Tensor, rows: int, columns: int) -> Tensor:
        """[B, C, H, W] → [B, tokens, p² C]."""
        side = self.patch
        grid = latent.reshape(-1, self.channels, rows, side, columns, side)
        return grid.permute(0, 2, 4, 3, 5, 1).reshape(-1, rows * columns, side * side * self.channels)

    def _unpatchify(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """The inverse."""
        side = self.patch
        grid = tokens.reshape(-1, rows, columns, side, side, self.channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.channels, rows * side, columns * side)


class ZImageAnySizeTrace(ZImageTrace):
    """The same for images of any size whose tokens need no padding: their rotations are an input."""

    def forward(  # type: ignore[override]
        self, rotations: Tensor, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor
    ) -> Tensor:
        """Predicted velocity; `rotations` [2, rows, columns, 1, ...] of the image's tokens, as `image_rotations`."""
        return self._predict(rotations, hidden_states, encoder_hidden_states, timestep)


class ZImageFamily(Family):
    """ZImagePipeline. Its own scale of guidance is one less than ours: it adds s (v - v0) to v."""

    adapter, pipeline = ZImageAdapter, "ZImagePipeline"
    text_options: ClassVar[Mapping[str, JsonValue]] = {"do_classifier_free_guidance": False}
    token_multiple = SEQ_MULTI_OF
    unused_weights = ("norm_final.weight",)  # its authors' code has it and does not call it
    transformer_options: ClassVar[Mapping[str, JsonValue]] = {
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "siglip_feat_dim": None,
    }

    def defaults(self, config: Mapping[str, JsonValue]) -> tuple[int, float]:
        """Of Z-Image; Z-Image-Turbo, which has the same configuration, wants 9 steps and a scale of 1."""
        return 50, 6.0

    def lora_key(self, layer: str, part: str) -> str:
        """The one spelling of which the converter splits attention.qkv."""
        if not layer.startswith("diffusion_model."):
            return super().lora_key(layer, part)
        layer = layer.replace(".final_layer.", ".all_final_layer.2-1.").replace(".x_embedder", ".all_x_embedder.2-1")
        return f"{layer}.lora.{part}.weight"
