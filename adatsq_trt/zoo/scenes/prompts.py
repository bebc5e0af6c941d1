"""The closed language of the world of scenes: what a prompt says, its words, and the columns of GenEval.

    a 3, three 5, a 3 and a 7, a 3 left of a 7, and with colours:
    a red 3, three green 5, a red 3 and a blue 7, a red 3 left of a blue 7

There are four relations, six colours and numbers up to four.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "white")
WHITE = COLOURS[-1]  # of digits that a prompt gives no colour
COUNTS = {"a": 1, "two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
DIGITS = 10
# GenEval's columns (Ghosh et al. 2023, table 1).
COLUMNS = ("single object", "two objects", "counting", "colours", "position", "colour attribute")


@dataclass(frozen=True)
class Thing:
    """A digit as a prompt names it.

    Attributes:
        digit: 0 to 9.
        colour: one of `COLOURS`, or None when the prompt does not say.
    """

    digit: int
    colour: str | None = None

    def __str__(self) -> str:
        """Its words: "red 3"."""
        return f"{self.colour} {self.digit}" if self.colour else str(self.digit)


@dataclass(frozen=True)
class Prompt:
    """Prompt for a picture: the digits that it shall show, and nothing else.

    Attributes:
        thing: the digit, or the first of two.
        count: how many of it; 1 when there is another thing.
        other: the second digit.
        relation: place of the first, seen from the second; one of `RELATIONS`, or None when the prompt says "and".
    """

    thing: Thing
    count: int = 1
    other: Thing | None = None
    relation: str | None = None

    def __str__(self) -> str:
        """The sentence."""
        if self.other is not None:
            return f"a {self.thing} {self.relation or 'and'} a {self.other}"
        return f"{_COUNT_WORDS[self.count]} {self.thing}"

    @property
    def column(self) -> str | None:
        """The column that scores such prompts; None for those that only training uses."""
        coloured = self.thing.colour is not None
        if self.other is None:
            names = ("single object", "colours") if self.count == 1 else ("counting", None)
        else:
            names = ("position", None) if self.relation else ("two objects", "colour attribute")
        return names[coloured]


_COUNT_WORDS = {count: word for word, count in COUNTS.items()}


def all_prompts(column: str) -> Iterator[Prompt]:
    """Every prompt of a column, in a fixed order; two things differ in digit and in colour."""
    coloured = column in ("colours", "colour attribute")
    things = [Thing(*pair) for pair in itertools.product(range(DIGITS), COLOURS[:-1] if coloured else (None,))]
    if column in ("single object", "colours"):
        yield from map(Prompt, things)
    elif column == "counting":
        yield from (Prompt(thing, count) for thing in things for count in (2, 3, 4))
    else:
        relations = RELATIONS if column == "position" else (None,)
        for first, second, relation in itertools.product(things, things, relations):
            if first.digit != second.digit and (not coloured or first.colour != second.colour):
                yield Prompt(first, 1, second, relation)


WORDS = ("", *COUNTS, *COLOURS[:-1], *map(str, range(DIGITS)), "and", "left", "right", "of", "above", "below")
LONGEST = 8  # words of "a red 3 left of a blue 7"


def evaluation_prompts(count: int) -> list[Prompt]:
    """Prompts that a model is scored with: the columns in turn, each column's prompts in a fixed shuffled order."""
    rng = random.Random(0)
    columns = [list(all_prompts(column)) for column in COLUMNS]
    for column in columns:
        rng.shuffle(column)
    endless = [itertools.cycle(column) for column in columns]
    return [next(endless[i % len(endless)]) for i in range(count)]
