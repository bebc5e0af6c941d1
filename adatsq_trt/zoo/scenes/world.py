"""Pictures of the world of scenes: 16x16 RGB, a grid of 2x2 cells, in each cell nothing or a coloured digit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from adatsq_trt.zoo.scenes.prompts import COLOURS, DIGITS, RELATIONS, WHITE, Prompt, Thing

IMAGE_SIZE, CELL_SIZE, CELLS = 16, 8, 4
# One row less than the digits have: it stays black, which tells the model where a cell ends.
DIGIT_ROWS = 7
RGB = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)], dtype=np.float32)
FORMS = {"one": 0.2, "several": 0.2, "and": 0.3, "relation": 0.3}  # how often each occurs in training
# Digits by a fixed permutation: what the models see, what the judge learns from, what measures the judge.
SPLITS = {"generator": slice(0, 700), "judge": slice(700, 1500), "held out": slice(1500, 1797)}

Floats = NDArray[np.float32]
Scene = tuple[Thing | None, ...]  # what is in each cell, row by row


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
    """A training prompt, with colours in half of all cases."""
    form, coloured = rng.choice(list(FORMS), p=list(FORMS.values())), rng.random() < 0.5
    digits = rng.choice(DIGITS, 2, replace=False).tolist()
    colours = rng.choice(COLOURS[:-1], 2, replace=False).tolist() if coloured else (None, None)
    first, second = map(Thing, digits, colours)
    if form in ("one", "several"):
        return Prompt(first, 1 if form == "one" else int(rng.integers(2, CELLS + 1)))
    return Prompt(first, 1, second, None if form == "and" else str(rng.choice(RELATIONS)))


def draw_scene(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A scene that the prompt describes, in random places; what has no colour in the prompt is white."""
    things = [prompt.thing] * prompt.count + ([prompt.other] if prompt.other else [])
    while True:
        cells: list[Thing | None] = [None] * CELLS
        for cell, thing in zip(rng.choice(CELLS, len(things), replace=False), things, strict=True):
            cells[cell] = Thing(thing.digit, thing.colour or WHITE)
        if satisfies(cells, prompt):
            return tuple(cells)


def satisfies(scene: Sequence[Thing | None], prompt: Prompt) -> bool:
    """Whether a scene shows what the prompt says, and nothing else."""
    shown = [(cell, thing) for cell, thing in enumerate(scene) if thing is not None]
    if prompt.other is None:
        return len(shown) == prompt.count and all(_is(thing, prompt.thing) for _, thing in shown)
    return len(shown) == 2 and any(
        _is(a, prompt.thing) and _is(b, prompt.other) and _placed(cell, other_cell, prompt.relation)
        for (cell, a), (other_cell, b) in (shown, shown[::-1])
    )


def _is(shown: Thing, said: Thing) -> bool:
    return shown.digit == said.digit and said.colour in (None, shown.colour)


def _placed(first: int, second: int, relation: str | None) -> bool:
    (row, column), (other_row, other_column) = divmod(first, 2), divmod(second, 2)
    holds = {
        "left of": column < other_column,
        "right of": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }
    return relation is None or holds[relation]


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
