"""The world of scenes: pictures of 16x16 RGB, a grid of 2x2 cells, in each cell nothing or a coloured digit."""

from __future__ import annotations

from collections.abc import Sequence

from adatsq_trt.zoo.scenes.prompts import Prompt, Thing

IMAGE_SIZE, CELL_SIZE, CELLS = 16, 8, 4
# One row less than the digits have: it stays black, which tells the model where a cell ends.
DIGIT_ROWS = 7

Scene = tuple[Thing | None, ...]  # what is in each cell, row by row


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
