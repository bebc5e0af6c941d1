"""Scores of clips, named and built after VBench (Huang et al. 2024), with the judge of scenes in its networks' places.

    subject consistency      the digit's features agree from frame to frame     (there: features of DINO)
    background consistency   what is not the digit stays the same               (there: features of CLIP)
    motion smoothness        frames lie half way between their neighbours       (there: interpolated frames)
    dynamic degree           share of clips in which something moves            (there: optical flow)
    imaging quality          confidence of the digit's classifier               (there: MUSIQ)
    overall consistency      share of clips that show what the prompt says      (there: ViCLIP)

All lie in [0, 1], higher is better. They are not VBench's: a perfect clip has 1 in all but imaging quality, and a still
one has 1 in smoothness and 0 in dynamic degree, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from adatsq_trt.zoo.scenes.clips import DIRECTIONS, FRAMES, ClipPrompt
from adatsq_trt.zoo.scenes.judge import NOTHING, Judge
from adatsq_trt.zoo.scenes.prompts import COLOURS
from adatsq_trt.zoo.scenes.world import CELL_SIZE, DIGIT_ROWS, IMAGE_SIZE

VIDEO_SCORES = (
    "subject consistency",
    "background consistency",
    "motion smoothness",
    "dynamic degree",
    "imaging quality",
    "overall consistency",
)
# Half of the way that a digit goes in a clip: less is not the motion that was asked for.
LEAST_WAY = (FRAMES - 1) / 2
# What is darker than the first is no part of a digit; a second digit outside of the window has at least the other.
_DARK, _SOMETHING = 0.25, 0.03


@dataclass(frozen=True)
class Track:
    """The digit of every frame.

    Attributes:
        crops: [B, F, 3, 8, 8]: the window around it, zero outside of the frame.
        corners: int64 [B, F, 2]: row and column of the window's top left corner.
        centres: float32 [B, F, 2]: centre of mass in pixels, row and column.
        outside: float32 [B, F]: mean brightness outside the window, of pixels that are not dark.
    """

    crops: Tensor
    corners: Tensor
    centres: Tensor
    outside: Tensor


def track(clips: Tensor) -> Track:
    """Find the digit: the window of 8 x 8 pixels that holds most, and of these the one that holds it as in training.

    Args:
        clips: [B, F, 16, 16, 3] in [0, 1].
    """
    frames = clips.flatten(0, 1).permute(0, 3, 1, 2)
    grey = frames.amax(1, keepdim=True)
    grey = torch.where(grey > _DARK, grey, 0)
    mass = functional.avg_pool2d(functional.pad(grey, [1] * 4), CELL_SIZE, 1) * CELL_SIZE**2
    # Digits fill the upper seven rows and lie in the middle of the columns, which decides between equal windows.
    rows = torch.arange(IMAGE_SIZE, dtype=torch.float32)
    centre = torch.stack([(grey.sum(3) * rows).sum((1, 2)), (grey.sum(2) * rows).sum((1, 2))], dim=1)
    centre = centre / grey.sum((1, 2, 3)).clamp(min=1e-6)[:, None]
    offsets = torch.arange(-1, IMAGE_SIZE - CELL_SIZE + 2)
    middle = offsets + torch.tensor([[(DIGIT_ROWS - 1) / 2], [(CELL_SIZE - 1) / 2]])
    apart = (middle[None] - centre[..., None]).square()
    score = mass[:, 0] - 0.02 * (apart[:, 0, :, None] + apart[:, 1, None, :])
    best = score.flatten(1).argmax(1)
    corners = torch.stack([offsets[best // len(offsets)], offsets[best % len(offsets)]], dim=1)
    crops = torch.stack([_window(frame, *corner.tolist()) for frame, corner in zip(frames, corners, strict=True)])
    outside = (grey.sum((1, 2, 3)) - mass[:, 0].flatten(1).gather(1, best[:, None])[:, 0]) / (
        IMAGE_SIZE**2 - CELL_SIZE**2
    )
    shape = clips.shape[:2]
    return Track(
        crops.unflatten(0, shape), corners.unflatten(0, shape), centre.unflatten(0, shape), outside.unflatten(0, shape)
    )


def _window(frame: Tensor, row: int, column: int) -> Tensor:
    """[3, 16, 16] → [3, 8, 8], which may begin one pixel outside of the frame."""
    padded = functional.pad(frame, [1] * 4)
    return padded[:, row + 1 : row + 1 + CELL_SIZE, column + 1 : column + 1 + CELL_SIZE]


@torch.no_grad()
def clip_scores(judge: Judge, clips: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
    """Every score of every clip.

    Args:
        judge: the judge of scenes.
        clips: [B, F, 16, 16, 3] in [0, 1].
        prompts: one for each clip.

    Returns:
        Score → float32 [B].
    """
    found = track(clips)
    crops, frames = found.crops.flatten(0, 1), clips.shape[1]
    logits, hues = (value.unflatten(0, (-1, frames)) for value in judge(crops))
    features = functional.normalize(judge.features(crops), dim=1).unflatten(0, (-1, frames))
    first, previous = features[:, :1], features[:, :-1]
    likeness = ((features[:, 1:] * first).sum(2) + (features[:, 1:] * previous).sum(2)) / 2
    bends = (found.centres[:, 2:] - 2 * found.centres[:, 1:-1] + found.centres[:, :-2]).norm(dim=2)
    way = found.centres[:, -1] - found.centres[:, 0]
    shown = logits.softmax(2)[..., :NOTHING].amax(2)
    return {
        "subject consistency": likeness.mean(1).clamp(min=0),
        "background consistency": 1
        - (found.outside[:, 1:] - found.outside[:, :-1]).abs().mean(1)
        - found.outside.mean(1),
        "motion smoothness": (1 - bends.mean(1)).clamp(min=0),
        "dynamic degree": (way.norm(dim=1) >= LEAST_WAY).float(),
        "imaging quality": shown.mean(1),
        "overall consistency": _as_asked(logits.mean(1), hues.mean(1), way, found.outside, prompts).float(),
    }


def _as_asked(logits: Tensor, hues: Tensor, way: Tensor, outside: Tensor, prompts: Sequence[ClipPrompt]) -> Tensor:
    """Whether digit, colour and direction are those of the prompt and nothing else is in the picture, bool [B]."""
    speeds = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)
    along = way @ speeds.T
    direction = torch.where(along.amax(1) >= LEAST_WAY, along.argmax(1), -1)
    names = list(DIRECTIONS)
    wanted = torch.tensor(
        [
            (prompt.thing.digit, COLOURS.index(str(prompt.thing.colour)), names.index(prompt.direction))
            for prompt in prompts
        ]
    )
    read = torch.stack([logits.argmax(1), hues.argmax(1), direction], dim=1)
    return (read == wanted).all(1) & (outside.amax(1) < _SOMETHING)


def mean_scores(scores: dict[str, Tensor]) -> dict[str, float]:
    """Means over the clips, and the mean of the six."""
    means = {name: float(scores[name].mean()) for name in VIDEO_SCORES}
    return {**means, "mean": sum(means.values()) / len(means)}
