"""`--shapes`: samples and sizes in pixels, which become optimization profiles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adatsq_trt.config import MOST_PIXELS, BuildConfig
from adatsq_trt.errors import UserError

if TYPE_CHECKING:
    from adatsq_trt.zoo.loading import LoadedModel

Shape = tuple[int, ...]
OPTION = "--shapes"
_MOST_SAMPLES = 4096


def parse_size(text: str, option: str) -> Shape:
    """HEIGHTxWIDTH or FRAMESxHEIGHTxWIDTH, in pixels.

    Raises:
        UserError: it is written otherwise.
    """
    return _numbers(text, option, (2, 3), "HEIGHTxWIDTH, or FRAMESxHEIGHTxWIDTH for videos")


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """SAMPLESxHEIGHTxWIDTH or SAMPLESxFRAMESxHEIGHTxWIDTH, with commas between.

    Raises:
        UserError: it is written otherwise, or a number is too large.
    """
    expected = "SAMPLESxHEIGHTxWIDTH, or SAMPLESxFRAMESxHEIGHTxWIDTH for videos, such as 1x1024x1024,4x512x512"
    shapes = tuple(_numbers(part, OPTION, (3, 4), expected) for part in text.split(","))
    for samples, *size in shapes:
        if samples > _MOST_SAMPLES or max(size) > MOST_PIXELS:
            raise UserError(
                f"{OPTION} {written((samples, *size))}: expected at most {_MOST_SAMPLES} samples and {MOST_PIXELS} "
                "pixels along a side; choose smaller numbers"
            )
    return shapes


def _numbers(text: str, option: str, lengths: tuple[int, int], expected: str) -> Shape:
    parts = text.strip().split("x")
    if len(parts) not in lengths or not all(re.fullmatch("[1-9][0-9]{0,8}", part, re.ASCII) for part in parts):
        raise UserError(f"{option} '{text}': expected {expected}")
    return tuple(map(int, parts))


def written(numbers: Sequence[int]) -> str:
    """As it is asked for."""
    return "x".join(map(str, numbers))


def resolve_shapes(shapes: Sequence[Shape], model: LoadedModel) -> tuple[Shape, ...]:
    """Order the requested shapes without repetitions: the model's own size first, and by samples within each size.

    Args:
        shapes: from `parse_shapes`.
        model: of the run, at the size that its policy is searched at.

    Raises:
        UserError: a size that does not fit the model; none is the model's own; a model whose graph has one size.
    """
    if not shapes:
        return ()
    own = model.scale.size(model.adapter.image)
    sizes = list(dict.fromkeys(shape[1:] for shape in shapes))
    for size in sizes if sizes != [own] else []:
        _require_size(size, own, model)
    if own not in sizes:
        raise UserError(
            f"{OPTION} {','.join(map(written, shapes))}: expected the size at which the policy is searched among "
            f"them; add 1x{written(own)}"
        )
    order = [own, *(size for size in sizes if size != own)]
    return tuple(sorted(set(shapes), key=lambda shape: (order.index(shape[1:]), shape[0])))


def _require_size(size: Shape, own: Shape, model: LoadedModel) -> None:
    """Refuse a size that is no whole number of the model's tokens, before anything of that size is made."""
    scale, adapter = model.scale, model.adapter
    if len(size) != len(own):
        kind = "pictures, expected HEIGHTxWIDTH" if len(own) == 2 else "videos, expected FRAMESxHEIGHTxWIDTH"
        raise UserError(
            f"{OPTION}: size {written(size)}: model '{model.name}' draws {kind} after the number of samples"
        )
    from adatsq_trt.engines.manifest import MAX_LATENT_ELEMENTS

    multiple = scale.pixels * adapter.patch_cells
    image = scale.resized(adapter.image, size)
    if any(side % multiple for side in size[-2:]) or scale.size(image) != size:
        frames = f" and frames that are 1 more than a multiple of {scale.frames}" if len(size) == 3 else ""
        raise UserError(
            f"{OPTION}: size {written(size)}: expected sides that are multiples of {multiple} pixels{frames} for model "
            f"'{model.name}'; choose another size"
        )
    if image.elements > MAX_LATENT_ELEMENTS:
        raise UserError(
            f"{OPTION}: size {written(size)}: a latent has {image.elements} elements, the most is "
            f"{MAX_LATENT_ELEMENTS}; choose a smaller size"
        )
    adapter.resized(image).any_size()


def at_first(config: BuildConfig) -> BuildConfig:
    """A checkpoint for which no --height, --width or --frames is given is opened in the first of the shapes."""
    if config.shapes is None or config.height or config.width or config.frames:
        return config
    *frames, height, width = parse_shapes(config.shapes)[0][1:]
    return replace(config, height=height, width=width, frames=frames[0] if frames else None)
