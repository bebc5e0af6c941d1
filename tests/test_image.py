"""Where every pixel of a latent goes."""

import numpy as np
import pytest

from adatsq_trt.image import ImageShape

SHAPES = {
    "tokens": (ImageShape(2, 3, 2, columns=4), (8, 12)),
    "planes": (ImageShape(2, 3, 2, columns=4), (12, 2, 4)),
    "video": (ImageShape(2, 3, 2, columns=4, frames=5), (12, 5, 2, 4)),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_pixel_comes_from_one_place_of_the_latent(kind: str) -> None:
    """Channel 2, the lower right pixel of the patch in row 1 and column 3."""
    shape, latent_shape = SHAPES[kind]
    assert shape.elements == np.prod(latent_shape)
    latent = np.full((2, *latent_shape), -1, np.float32)
    channel = 2 * 4 + 3
    place = {"tokens": (7, channel), "planes": (channel, 1, 3), "video": (channel, 4, 1, 3)}[kind]
    latent[(1, *place)] = 3  # beyond white
    images = shape.decode(latent)
    assert images.shape == ((2, 5, 4, 8, 3) if kind == "video" else (2, 4, 8, 3))
    assert images.sum() == images.max() == 1
    assert images[(1, *([4] if kind == "video" else []), 3, 7, 2)] == 1


def test_an_image_is_square_unless_its_columns_are_given() -> None:
    assert ImageShape(3, 1).grid == (3, 3)
    assert ImageShape(3, 1, columns=5).grid == (3, 5)
