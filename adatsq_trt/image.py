"""Shape of a decoded latent: patches of pixels, or of a VAE's own latent, put together to an image or a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np


@dataclass(frozen=True)
class ImageShape:
    """Shape of the image or video that a latent decodes to.

    Attributes:
        patches: from top to bottom.
        channels: of the image, or of the VAE's latent.
        patch_size: height and width of a patch in pixels, or in cells of the VAE's latent.
        columns: patches from left to right; as many as from top to bottom unless given.
        frames: of a video, or of its latent; None for an image.
        vae: whether the patches make up not the image but the latent that a VAE decodes.
    """

    patches: int
    channels: int
    patch_size: int = 2
    columns: int | None = None
    frames: int | None = None
    vae: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Patches from top to bottom and from left to right."""
        return self.patches, self.columns or self.patches

    @property
    def elements(self) -> int:
        """Numbers in one image or video, and in its latent."""
        return prod((self.frames or 1, *self.grid, self.channels, self.patch_size**2))

    def resized(self, rows: int, columns: int, frames: int | None = None) -> ImageShape:
        """The same kind of image with other numbers of patches and, of a video, frames."""
        return replace(self, patches=rows, columns=columns, frames=frames)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Put patches together, from [-1, 1] to [0, 1]; what a VAE decodes stays as it is.

        Args:
            latents: float32: of images as tokens [B, patches, channels], as Flux packs them, or as planes [B, channels,
                rows, columns]; of videos [B, channels, frames, rows, columns]. The channels of a latent are those of
                the image, each with the pixels of its patch row by row.

        Returns:
            float32 [B, height, width, channels], of videos [B, frames, height, width, channels].
        """
        side, (rows, columns) = self.patch_size, self.grid
        planes = np.moveaxis(latents, -1, 1) if latents.ndim == 3 else latents
        grid = planes.reshape(len(latents), self.channels, side, side, self.frames or 1, rows, columns)
        pixels = grid.transpose(0, 4, 5, 2, 6, 3, 1).reshape(-1, rows * side, columns * side, self.channels)
        images: np.ndarray = pixels if self.vae else np.clip(pixels / 2 + 0.5, 0, 1)
        return images if self.frames is None else images.reshape(len(latents), self.frames, *images.shape[1:])


@dataclass(frozen=True)
class PixelScale:
    """Scale of an `ImageShape`: pixels of a patch, and video frames of a latent's frame.

    Attributes:
        pixels: along a side of a patch.
        frames: of the video, for each frame of its latent but the first.
    """

    pixels: int
    frames: int = 1

    def size(self, image: ImageShape) -> tuple[int, ...]:
        """Height and width in pixels; of a video frames, height and width."""
        sides = tuple(self.pixels * patches for patches in image.grid)
        return sides if image.frames is None else ((image.frames - 1) * self.frames + 1, *sides)

    def resized(self, image: ImageShape, size: Sequence[int]) -> ImageShape:
        """The same kind of image in another size, which is a whole number of patches and frames."""
        *frames, height, width = size
        count = (frames[0] - 1) // self.frames + 1 if frames else None
        return image.resized(height // self.pixels, width // self.pixels, count)
