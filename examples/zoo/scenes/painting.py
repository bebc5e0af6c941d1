"""Training data of the models of scenes: prompts, scenes and clips, painted with scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from adatsq_trt.zoo.scenes.clips import DIRECTIONS, FRAMES, ClipPrompt
from adatsq_trt.zoo.scenes.prompts import COLOURS, DIGITS, RELATIONS, WHITE, Prompt, Thing
from adatsq_trt.zoo.scenes.world import CELL_SIZE, CELLS, DIGIT_ROWS, IMAGE_SIZE, Scene, satisfies

RGB = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)], dtype=np.float32)
# Form of a prompt and whether it names colours → how often it occurs in training: what is hard more often.
FORMS = {
    ("one", False): 0.06,
    ("one", True): 0.08,
    ("several", False): 0.16,
    ("several", True): 0.04,
    ("and", False): 0.2,
    ("and", True): 0.16,
    ("relation", False): 0.25,
    ("relation", True): 0.05,
}
# Digits by a fixed permutation: what the models see, what the judge learns from, what measures the judge.
SPLITS = {"generator": slice(0, 700), "judge": slice(700, 1500), "held out": slice(1500, 1797)}
_FREE = IMAGE_SIZE - CELL_SIZE  # pixels that a digit can move within the frame
_SLACK = _FREE - (FRAMES - 1)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Digits:
    """Grey pictures of digits.

    Attributes:
        images: float32 [N, 8, 8] in [0, 1]; the last row is black.
        labels: int64 [N].
    """

    images: Floats
    labels: NDArray[np.int64]


def load_split(name: str) -> Digits:
    """The digits of one of `SPLITS`, of scikit-learn's 1,797."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(labels))[SPLITS[name]]
    grey = (images[chosen] / 16).astype(np.float32).reshape(-1, CELL_SIZE, CELL_SIZE)
    return Digits(_squeeze_rows(grey), labels[chosen].astype(np.int64))


def _squeeze_rows(images: Floats) -> Floats:
    """Scale the height to `DIGIT_ROWS`: each new row is the mean of the rows that it covers."""
    edges = np.linspace(0, CELL_SIZE, DIGIT_ROWS + 1)
    rows = np.arange(CELL_SIZE)
    covered = np.minimum(edges[1:, None], rows + 1) - np.maximum(edges[:-1, None], rows)
    shares = np.zeros((CELL_SIZE, CELL_SIZE), dtype=np.float32)
    shares[:DIGIT_ROWS] = covered.clip(min=0) * DIGIT_ROWS / CELL_SIZE
    return shares @ images


def draw_prompt(rng: np.random.Generator) -> Prompt:
    """A training prompt."""
    form, coloured = list(FORMS)[rng.choice(len(FORMS), p=list(FORMS.values()))]
    digits = rng.choice(DIGITS, 2, replace=False).tolist()
    colours = rng.choice(COLOURS[:-1], 2, replace=False).tolist() if coloured else (None, None)
    first, second = map(Thing, digits, colours)
    if form in ("one", "several"):
        return Prompt(first, 1 if form == "one" else int(rng.integers(2, CELLS + 1)))
    return Prompt(first, 1, second, None if form == "and" else str(rng.choice(RELATIONS)))


def draw_scene(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A scene that the prompt describes, in random places; what has no colour in the prompt is white.

    Of two things without a relation the first comes first in reading order.
    """
    things = [prompt.thing] * prompt.count + ([prompt.other] if prompt.other else [])
    while True:
        cells: list[Thing | None] = [None] * CELLS
        places = rng.choice(CELLS, len(things), replace=False).tolist()
        for cell, thing in zip(places if prompt.relation else sorted(places), things, strict=True):
            cells[cell] = Thing(thing.digit, thing.colour or WHITE)
        if satisfies(cells, prompt):
            return tuple(cells)


class Painter:
    """Draws scenes with the digits of one split."""

    def __init__(self, digits: Digits) -> None:
        """Sort the digits by label."""
        self._images: Mapping[int, Floats] = {d: digits.images[digits.labels == d] for d in range(DIGITS)}

    def paint(self, scene: Scene, rng: np.random.Generator) -> Floats:
        """An image [16, 16, 3] in [0, 1] on black, each digit a handwriting of its own."""
        image = np.zeros((2, CELL_SIZE, 2, CELL_SIZE, 3), dtype=np.float32)
        for cell, thing in enumerate(scene):
            if thing is not None and thing.colour is not None:
                grey = rng.choice(self._images[thing.digit])
                image[cell // 2, :, cell % 2] = grey[..., None] * RGB[COLOURS.index(thing.colour)]
        return image.reshape(IMAGE_SIZE, IMAGE_SIZE, 3)


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
