"""Samples in a grid: contact sheets with one panel per model, and single panels that a page can lay over each other."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from adatsq_trt.files import write_bytes

COLUMNS = 10
# Longest side of a panel, and how long it shows each frame of videos.
_PANEL_PIXELS, _FRAME_MILLISECONDS = 2048, 125


def grid(images: np.ndarray, columns: int = COLUMNS) -> np.ndarray:
    """Arrange [B, H, W, C] in rows with a one-pixel white frame; grey images become RGB.

    Of videos [B, F, H, W, C] each is a strip of its frames.

    Returns:
        float32 [rows * (H + 1) + 1, columns * (W + 1) + 1, 3].
    """
    if images.ndim == 5:
        frames, images = images.shape[1], _strips(images)
        columns = max(1, columns // frames)
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.ones((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), dtype=np.float32)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1) + 1, (index % columns) * (width + 1) + 1
        sheet[top : top + height, left : left + width] = image if channels == 3 else np.repeat(image[..., :1], 3, -1)
    return sheet


def _strips(videos: np.ndarray) -> np.ndarray:
    """[B, F, H, W, C] → [B, H, F W, C]."""
    count, frames, height, width, channels = videos.shape
    return videos.transpose(0, 2, 1, 3, 4).reshape(count, height, frames * width, channels)


def write_contact_sheet(file: Path, panels: Mapping[str, np.ndarray], notes: Sequence[str]) -> None:
    """Write the panels one below the other as PNG, whole or not at all.

    Args:
        file: path of the picture.
        panels: title → images, float32 [B, H, W, C] in [0, 1], or videos [B, F, H, W, C].
        notes: one per panel, added to its title.

    Raises:
        OutputError: the folder cannot be written.
    """
    # Square at most: matplotlib draws no more than 2^16 pixels in one direction.
    sheets = {title: grid(images, max(COLUMNS, ceil(sqrt(len(images))))) for title, images in panels.items()}
    aspect = sum(sheet.shape[0] / sheet.shape[1] for sheet in sheets.values())
    figure = Figure(figsize=(8, 8 * aspect + 0.5 * len(sheets)), layout="constrained")
    FigureCanvasAgg(figure)
    for index, ((title, sheet), note) in enumerate(zip(sheets.items(), notes, strict=True)):
        axes = figure.add_subplot(len(sheets), 1, index + 1)
        axes.imshow(sheet, interpolation="nearest", vmin=0, vmax=1)
        axes.set_title(f"{title} ({note})" if note else title)
        axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_bytes(file, buffer.getvalue())


def write_panel(file: Path, images: np.ndarray) -> None:
    """Write the first samples, as many as a panel has room for, as lossless WebP: of videos an animated one.

    Args:
        file: path of the picture.
        images: float32 [B, H, W, C] in [0, 1], or videos [B, F, H, W, C].

    Raises:
        OutputError: the folder cannot be written.
    """
    clips = images[:, None] if images.ndim == 4 else images
    rows, columns = (max(1, _PANEL_PIXELS // (side + 1)) for side in clips.shape[2:4])
    columns = min(columns, COLUMNS)
    shown = clips[: rows * columns]
    frames = [_picture(grid(shown[:, frame], columns)) for frame in range(shown.shape[1])]
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "webp", lossless=True, save_all=True, append_images=frames[1:], duration=_FRAME_MILLISECONDS, loop=0
    )
    write_bytes(file, buffer.getvalue())


def _picture(sheet: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(sheet.clip(0, 1) * 255).astype(np.uint8))
