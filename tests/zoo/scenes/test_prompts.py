"""The language: what a prompt says and which column scores it."""

import pytest

from adatsq_trt.models.prompts import TextEncoder
from adatsq_trt.zoo.scenes.prompts import COLUMNS, LONGEST, WORDS, Prompt, Thing, all_prompts, evaluation_prompts

RED, BLUE = Thing(3, "red"), Thing(7, "blue")


@pytest.mark.parametrize(
    ("prompt", "text", "column"),
    [
        (Prompt(Thing(3)), "a 3", "single object"),
        (Prompt(RED), "a red 3", "colours"),
        (Prompt(Thing(5), 3), "three 5", "counting"),
        (Prompt(Thing(5, "green"), 3), "three green 5", None),
        (Prompt(Thing(3), 1, Thing(7)), "a 3 and a 7", "two objects"),
        (Prompt(RED, 1, BLUE), "a red 3 and a blue 7", "colour attribute"),
        (Prompt(Thing(3), 1, Thing(7), "above"), "a 3 above a 7", "position"),
        (Prompt(RED, 1, BLUE, "left of"), "a red 3 left of a blue 7", None),
    ],
)
def test_a_prompt_is_a_sentence_of_one_column(prompt: Prompt, text: str, column: str | None) -> None:
    assert str(prompt) == text
    assert prompt.column == column


def test_columns_hold_all_their_prompts_once() -> None:
    numbers = []
    for column in COLUMNS:
        prompts = list(all_prompts(column))
        assert {prompt.column for prompt in prompts} == {column}
        assert len(set(map(str, prompts))) == len(prompts)
        numbers.append(len(prompts))
    assert numbers == [10, 10 * 9, 10 * 3, 10 * 6, 10 * 9 * 4, 10 * 9 * 6 * 5]


def test_every_sentence_is_in_the_vocabulary() -> None:
    encoder = TextEncoder(WORDS, [], LONGEST, 16)
    sentences = [str(prompt) for column in COLUMNS for prompt in all_prompts(column)]
    indices = encoder.word_indices([*sentences, "a red 3 left of a blue 7"])
    assert indices.shape == (len(sentences) + 1, LONGEST)
    assert len({tuple(row) for row in indices.tolist()}) == len(indices)
    assert set(indices.flatten().tolist()) == set(range(len(WORDS)))


def test_evaluation_takes_the_columns_in_turn() -> None:
    prompts = evaluation_prompts(120)
    assert [prompt.column for prompt in prompts] == list(COLUMNS) * 20
    assert prompts[:30] == evaluation_prompts(30)
    # Ten single digits come twice, everything else of these once.
    assert len(set(map(str, prompts))) == 110
