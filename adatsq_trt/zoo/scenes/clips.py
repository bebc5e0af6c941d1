"""Clips of the world: 8 frames of 16x16 RGB, one coloured digit that moves across, a pixel a frame.

    a red 3 moving left

Prompts name the digit, its colour and one of four directions; where the digit crosses is free.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np

from adatsq_trt.zoo.scenes.prompts import COLOURS, DIGITS, Thing
from adatsq_trt.zoo.scenes.world import CELL_SIZE, IMAGE_SIZE, RGB, Digits, Floats

FRAMES = 8
# (rows, columns) per frame.
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
CLIP_WORDS = ("", "a", *COLOURS[:-1], *map(str, range(DIGITS)), "moving", *DIRECTIONS)
LONGEST_CLIP = 5  # words of "a red 3 moving left"
_FREE = IMAGE_SIZE - CELL_SIZE  # pixels that a digit can move within the frame
_SLACK = _FREE - (FRAMES - 1)


@dataclass(frozen=True)
class ClipPrompt:
    """What a clip shall show, and nothing else shall be in it.

    Attributes:
        thing: the digit with its colour.
        direction: one of `DIRECTIONS`.
    """

    thing: Thing
    direction: str

    def __str__(self) -> str:
        """The sentence."""
        return f"a {self.thing} moving {self.direction}"


def clip_prompts() -> list[ClipPrompt]:
    """All 240 prompts in a fixed shuffled order; a model is scored with the first ones."""
    things = [Thing(*pair) for pair in itertools.product(range(DIGITS), COLOURS[:-1])]
    prompts = [ClipPrompt(*pair) for pair in itertools.product(things, DIRECTIONS)]
    random.Random(0).shuffle(prompts)
    return prompts


def paint_clip(prompt: ClipPrompt, digits: Digits, rng: np.random.Generator) -> Floats:
    """A clip [8, 16, 16, 3] in [0, 1] on black, with one of the digit's handwritings."""
    grey = rng.choice(digits.images[digits.labels == prompt.thing.digit])
    assert prompt.thing.colour is not None
    picture = grey[..., None] * RGB[COLOURS.index(prompt.thing.colour)]
    clip = np.zeros((FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    for frame, (row, column) in zip(clip, _path(prompt.direction, rng), strict=True):
        frame[row : row + CELL_SIZE, column : column + CELL_SIZE] = picture
    return clip


def _path(direction: str, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Top left corners of the digit, frame by frame; along the motion it starts at the border or a pixel from it."""
    places = []
    for speed in DIRECTIONS[direction]:
        late = int(rng.integers(0, _SLACK + 1))
        starts = {0: int(rng.integers(0, _FREE + 1)), 1: late, -1: _FREE - late}
        places.append([starts[speed] + speed * frame for frame in range(FRAMES)])
    return list(zip(*places, strict=True))
