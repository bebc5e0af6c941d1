"""Qwen-Image with an image to edit: diffusers' QwenImageEditPipeline, and QwenImageEditPlusPipeline with one image.

The image's tokens follow the picture's, at positions of their own, and the text encoder sees the image too. The
pipelines make about a megapixel of any image and, unless told otherwise, draw a picture of that size, as here.
"""

from __future__ import annotations

from importlib import util
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from adatsq_trt.errors import DependencyError, UserError
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.family import Canvas
from adatsq_trt.models.image_condition import IMAGE_LATENTS, ImageTokens, ReadImage, first_draw
from adatsq_trt.models.qwen_image import QwenImageAdapter, QwenImageFamily, QwenImageTrace
from adatsq_trt.transformer_call import TransformerCall

_SQUARE = (1024, 1024)
_AREA = 1024 * 1024  # pixels of the image whose latents the transformer is given, about
_SEEN_PIXELS = 28  # along a side of what becomes a token of the text encoder
_VIDEOS = "video_processor"


class QwenImageEditAdapter(QwenImageAdapter):
    """A Qwen-Image that is shown an image, whose tokens follow the picture's."""

    any_size = ModelAdapter.any_size  # which refuses other sizes

    def make_trace(self) -> nn.Module:
        """The transformer with constant rotations of both."""
        return QwenImageEditTrace(self.transformer, self.image.grid, self.encoder.text_tokens)

    def pipeline_call(self) -> TransformerCall:
        """The image's latents follow the picture's."""
        call = super().pipeline_call()
        own = dict.fromkeys(self.image_inputs, "hidden_states")
        return TransformerCall(
            **{**call.model_dump(), "inputs": {**call.inputs, **own}, "joined": {"hidden_states": 1}}
        )


class QwenImageEditTrace(QwenImageTrace):
    """QwenImageTransformer2DModel whose latents are continued by those of an image of the same size."""

    images: ClassVar[int] = 2

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, image_latents: Tensor, timestep: Tensor
    ) -> Tensor:
        """Predicted velocity of the picture alone, shape of `hidden_states`."""
        both = torch.cat([hidden_states, image_latents], dim=1)
        rotations = (self.rotations, self.text_rotations)
        return self._predict(rotations, both, encoder_hidden_states, timestep)[:, : hidden_states.shape[1]]


class EditCondition(ImageTokens, ReadImage):
    """The image's latents, as tokens, and the image itself for the text encoder."""

    def encode(self, pipe: Any, image: Image.Image, mask: Image.Image | None, canvas: Canvas) -> dict[str, Tensor]:
        """As the pipeline's call does with an image of the canvas's shape."""
        size, vae = (canvas.height, canvas.width), pipe.vae
        pixels = pipe.image_processor.preprocess(pipe.image_processor.resize(image, *size), *size).unsqueeze(2)
        channels = vae.config.z_dim
        _, latents = pipe.prepare_latents(pixels, 1, channels, *size, vae.dtype, vae.device, first_draw())
        return {IMAGE_LATENTS: latents[0]}

    def encode_text(self, pipe: Any, prompt: str, image: Image.Image) -> Tensor:
        """As the pipeline's call does."""
        return self._encode_seen(pipe, prompt, _resized(pipe, image, _AREA))

    def _encode_seen(self, pipe: Any, prompt: str, seen: Any) -> Tensor:
        """The tokens of a prompt, all of which there are, with what the processor is given of the image."""
        tokens, _ = pipe.encode_prompt(prompt, image=seen, device=pipe.text_encoder.device)
        return tokens[0]  # type: ignore[no-any-return]

    def seen_tokens(self, canvas: Canvas) -> int:
        """One for each square of Qwen2.5-VL's, of an image as large as the picture."""
        return -(-canvas.height // _SEEN_PIXELS) * -(-canvas.width // _SEEN_PIXELS)

    def require_canvas(self, canvas: Canvas) -> None:
        """Refuse a picture of another size than the image that it goes with."""
        asked = size = (canvas.width, canvas.height)
        while (fitting := _size_of(size, _AREA)) != size:
            size = fitting if min(fitting) else _SQUARE
        if size != asked:
            width, height = size
            raise UserError(
                f"--height {canvas.height} --width {canvas.width}: the pipeline makes about a megapixel of its image, "
                f"and the picture is as large here; pass --height {height} --width {width}"
            )

    def require_size(self, name: str, size: tuple[int, int], canvas: Canvas) -> None:
        """Refuse an image that the pipeline would make another size of."""
        made = _size_of(size, _AREA)
        if made != (canvas.width, canvas.height):
            width, height = size
            raise UserError(
                f"{name}: the pipeline makes {made[1]}x{made[0]} pixels of an image of {height}x{width}, expected "
                f"{canvas.height}x{canvas.width}, the picture's size; crop it to the shape of "
                f"{canvas.height}x{canvas.width}"
            )


class EditPlusCondition(EditCondition):
    """The same, of which the text encoder sees a smaller one, as the first of the pictures in its list."""

    def encode_text(self, pipe: Any, prompt: str, image: Image.Image) -> Tensor:
        """As the pipeline's call does with one image."""
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE

        return self._encode_seen(pipe, prompt, [_resized(pipe, image, CONDITION_IMAGE_SIZE)])

    def seen_tokens(self, canvas: Canvas) -> int:
        """The same of the smaller image."""
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE

        width, height = _size_of((canvas.width, canvas.height), CONDITION_IMAGE_SIZE)
        return super().seen_tokens(Canvas(height, width))


def _size_of(size: tuple[int, int], area: int) -> tuple[int, int]:
    """Width and height that the pipelines make of an image's, for about so many pixels."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions

    width, height, _ = calculate_dimensions(area, size[0] / size[1])
    return width, height


def _resized(pipe: Any, image: Image.Image, area: int) -> Image.Image:
    width, height = _size_of(image.size, area)
    return pipe.image_processor.resize(image, height, width)  # type: ignore[no-any-return]


class QwenImageEditFamily(QwenImageFamily):
    """QwenImageEditPipeline."""

    adapter, pipeline = QwenImageEditAdapter, "QwenImageEditPipeline"
    encoders = ("text_encoder", "tokenizer", "processor")
    image_condition: ClassVar[ReadImage] = EditCondition()

    def require_libraries(self) -> None:
        """Refuse to load a processor whose part for videos, which no picture needs, lacks its library."""
        from transformers import Qwen2VLProcessor

        parts = Qwen2VLProcessor.get_attributes()  # type: ignore[no-untyped-call]
        if _VIDEOS in parts and util.find_spec("torchvision") is None:
            raise DependencyError(
                f"the processor of {self.pipeline} does not load without the library torchvision; install the build of "
                "it that goes with your PyTorch (pip install torchvision)"
            )


class QwenImageEditPlusFamily(QwenImageEditFamily):
    """QwenImageEditPlusPipeline with one image."""

    pipeline = "QwenImageEditPlusPipeline"
    image_condition: ClassVar[ReadImage] = EditPlusCondition()
