"""Clips of the world: 8 frames of 16x16 RGB, one coloured digit that moves across, a pixel a frame.

    a red 3 moving left

Prompts name the digit, its colour and one of four directions; where the digit crosses is free.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from adatsq_trt.zoo.scenes.prompts import COLOURS, DIGITS, Thing

FRAMES = 8
# (rows, columns) per frame.
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
CLIP_WORDS = ("", "a", *COLOURS[:-1], *map(str, range(DIGITS)), "moving", *DIRECTIONS)
LONGEST_CLIP = 5  # words of "a red 3 moving left"


@dataclass(frozen=True)
class ClipPrompt:
    """Prompt for a clip: the digit that it shall show, and nothing else, and where it moves.

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
