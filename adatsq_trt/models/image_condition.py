"""An image beside the prompt: how a pipeline makes tensors of it that its transformer is given at every step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from adatsq_trt.image import ImageShape

if TYPE_CHECKING:
    from adatsq_trt.models.family import Canvas, VaeScale


IMAGE_LATENTS = "image_latents"  # graph input that continues the latents


class ImageCondition(ABC):
    """The image condition of a family.

    Attributes:
        masked: whether a mask goes with the image: white where the picture is to be drawn anew.
        mixed: whether the pipeline begins with a part of the image where the first noise level is below 1.
        encoders: folders of what the pipeline encodes images with beside its VAE → their classes of transformers.
    """

    masked: bool = False
    mixed: bool = False
    encoders: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def channels(self, latent: int, scale: VaeScale) -> int:
        """Count the channels of the transformer's input that the image has beside the noise's.

        Args:
            latent: channels of the noise, as the transformer counts them.
            scale: pixels of a cell of the VAE's latent.
        """

    def parts(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """Those of `encoders` that the pipeline uses, from its transformer's configuration."""
        return self.encoders

    @abstractmethod
    def shapes(self, config: Mapping[str, Any], image: ImageShape, folder: Path) -> dict[str, tuple[int, ...]]:
        """Graph input → its shape for one sample.

        Args:
            config: of the transformer.
            image: layout of the latent.
            folder: of the pipeline.
        """

    @abstractmethod
    def encode(self, pipe: Any, image: Image.Image, mask: Image.Image | None, canvas: Canvas) -> dict[str, Tensor]:
        """Make the graph's inputs of an image, with the pipeline's own methods, VAE and image processor.

        Args:
            pipe: the pipeline; neither its transformer nor its text encoders are used.
            image: in RGB, of any size.
            mask: for a family that is `masked`; None otherwise.
            canvas: size that is drawn.

        Returns:
            A tensor for each of `shapes`.
        """


class ImageTokens(ImageCondition):
    """An image of the picture's size, whose latents are as many tokens more."""

    def channels(self, latent: int, scale: VaeScale) -> int:
        """None: it has tokens of its own."""
        return 0

    def shapes(self, config: Mapping[str, Any], image: ImageShape, folder: Path) -> dict[str, tuple[int, ...]]:
        """As many tokens as the picture."""
        rows, columns = image.grid
        return {IMAGE_LATENTS: (rows * columns, config["in_channels"])}


class ReadImage(ImageCondition):
    """An image that the text encoder sees too: a prompt is encoded with its image, and so is the negative prompt."""

    @abstractmethod
    def encode_text(self, pipe: Any, prompt: str, image: Image.Image) -> Tensor:
        """Encode a prompt with its image, with the pipeline's own text encoder and processor.

        Args:
            pipe: the pipeline; neither its transformer nor its VAE is used.
            prompt: text.
            image: in RGB, of any size.

        Returns:
            [tokens, width], in the encoder's type.
        """

    @abstractmethod
    def seen_tokens(self, canvas: Canvas) -> int:
        """About how many tokens of an encoded prompt are the image's, before any is encoded."""

    @abstractmethod
    def require_canvas(self, canvas: Canvas) -> None:
        """Refuse a size of the picture that the image cannot go with.

        Raises:
            UserError: says which size can be drawn.
        """

    @abstractmethod
    def require_size(self, name: str, size: tuple[int, int], canvas: Canvas) -> None:
        """Refuse an image whose size the pipeline treats otherwise than `encode`.

        Args:
            name: of the image, as messages begin.
            size: its width and height, in pixels.
            canvas: size that is drawn.

        Raises:
            UserError: says how to change the image.
        """


def first_draw() -> torch.Generator:
    """A generator, for VAEs whose latents are drawn: the same for every image."""
    return torch.Generator().manual_seed(0)
