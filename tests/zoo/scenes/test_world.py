"""Scenes: what satisfies a prompt, how it is painted, and that no digit is in two splits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adatsq_trt.zoo.scenes.prompts import COLOURS, Prompt, Thing
from adatsq_trt.zoo.scenes.world import CELL_SIZE, DIGIT_ROWS, Scene, satisfies
from examples.zoo.scenes.painting import RGB, SPLITS, Painter, draw_prompt, draw_scene, load_split

RED3, BLUE3, BLUE7 = Thing(3, "red"), Thing(3, "blue"), Thing(7, "blue")
LEFT = Prompt(Thing(3), 1, Thing(7), "left of")


@pytest.mark.parametrize(
    ("scene", "prompt", "expected"),
    [
        ((None, RED3, None, None), Prompt(Thing(3)), True),
        ((None, RED3, None, None), Prompt(RED3), True),
        ((None, BLUE3, None, None), Prompt(RED3), False),
        ((None, BLUE7, None, None), Prompt(Thing(3)), False),
        ((RED3, None, None, BLUE7), Prompt(Thing(3)), False),  # something else is there
        ((None,) * 4, Prompt(Thing(3)), False),
        ((RED3, RED3, None, RED3), Prompt(Thing(3), 3), True),
        ((RED3, RED3, None, None), Prompt(Thing(3), 3), False),
        ((RED3, RED3, RED3, RED3), Prompt(Thing(3), 3), False),
        ((RED3, RED3, None, BLUE7), Prompt(Thing(3), 3), False),
        ((BLUE7, None, None, RED3), Prompt(Thing(3), 1, Thing(7)), True),
        ((BLUE3, None, None, RED3), Prompt(Thing(3), 1, Thing(7)), False),
        ((BLUE7, None, BLUE7, RED3), Prompt(Thing(3), 1, Thing(7)), False),
        ((Thing(7, "red"), None, None, BLUE3), Prompt(RED3, 1, BLUE7), False),  # the colours changed places
        ((RED3, BLUE7, None, None), LEFT, True),
        ((RED3, None, None, BLUE7), LEFT, True),  # left and above
        ((RED3, None, BLUE7, None), LEFT, False),
        ((BLUE7, RED3, None, None), LEFT, False),
    ],
)
def test_a_scene_shows_what_a_prompt_says_and_nothing_else(scene: Scene, prompt: Prompt, expected: bool) -> None:
    assert satisfies(scene, prompt) is expected


@pytest.mark.parametrize(("relation", "first", "second"), [("right of", 3, 2), ("above", 1, 2), ("below", 2, 0)])
def test_relations(relation: str, first: int, second: int) -> None:
    scene: list[Thing | None] = [None] * 4
    scene[first], scene[second] = RED3, BLUE7
    assert satisfies(scene, Prompt(Thing(3), 1, Thing(7), relation))
    assert not satisfies(scene, Prompt(Thing(7), 1, Thing(3), relation))


@given(st.integers(0, 2**32))
def test_drawn_scenes_satisfy_their_prompts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompt = draw_prompt(rng)
    scene = draw_scene(prompt, rng)
    assert satisfies(scene, prompt)
    assert all(thing.colour == "white" for thing in scene if thing and prompt.thing.colour is None)


def test_no_digit_is_in_two_splits() -> None:
    splits = [load_split(name) for name in SPLITS]
    assert sum(len(split.labels) for split in splits) == 1797
    pictures = [{image.tobytes() for image in split.images} for split in splits]
    # scikit-learn's pictures are all different.
    assert len(set.union(*pictures)) == 1797
    assert all(set(split.labels.tolist()) == set(range(10)) for split in splits)


def test_squeezing_keeps_the_ink_and_leaves_the_last_row_black() -> None:
    images = load_split("held out").images
    assert images.shape[1:] == (CELL_SIZE, CELL_SIZE)
    assert not images[:, DIGIT_ROWS:].any()
    assert images[:, :DIGIT_ROWS].max() == 1
    assert images[:, 0].any()
    assert images[:, DIGIT_ROWS - 1].any()


def test_a_painted_cell_is_a_digit_of_the_split_in_its_colour() -> None:
    digits = load_split("held out")
    image = Painter(digits).paint((None, None, RED3, None), np.random.default_rng(0))
    cell = image[CELL_SIZE:, :CELL_SIZE]
    grey = cell.max(2)
    np.testing.assert_array_equal(cell, grey[..., None] * RGB[COLOURS.index("red")])
    assert any(np.array_equal(grey, known) for known in digits.images[digits.labels == 3])
    image[CELL_SIZE:, :CELL_SIZE] = 0
    assert not image.any()
