"""What steers a small Flux: classes from a table, sentences through the text encoder."""

import pytest
import torch
from torch import nn

from adatsq_trt.errors import UserError
from adatsq_trt.models.prompts import ClassEncoder, TextEncoder


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TextEncoder(("", "a", "red", "blue", "3"), ("a red 3", "a 3"), 4, 32).eval()


@torch.no_grad()
def test_classes_are_rows_of_the_table() -> None:
    encoder = ClassEncoder(nn.Embedding(11, 16))
    tokens, pooled = encoder.encode([3, None])
    assert encoder.prompts == tuple("0123456789")
    assert torch.equal(pooled, encoder.embedding.weight[[3, 10]])
    assert torch.equal(tokens, pooled[:, None])


@torch.no_grad()
def test_sentences_are_read_word_by_word(encoder: TextEncoder) -> None:
    assert encoder.word_indices(["a red 3", ""]).tolist() == [[1, 2, 4, 0], [0, 0, 0, 0]]
    tokens, pooled = encoder.encode([0, 1, None])
    assert tokens.shape == (3, 4, 32)
    torch.testing.assert_close(pooled, tokens.mean(1))
    torch.testing.assert_close(tokens, encoder(encoder.word_indices(["a red 3", "a 3", ""]))[0])


@torch.no_grad()
def test_words_see_each_other_and_their_places(encoder: TextEncoder) -> None:
    red, blue, turned = encoder(encoder.word_indices(["a red 3", "a blue 3", "3 red a"]))[0]
    assert (red[2] - blue[2]).abs().max() > 1e-3  # the digit knows its colour
    assert (red[0] - turned[2]).abs().max() > 1e-3  # the same word elsewhere


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        ("a green 3", "unknown word 'green', expected words of: a red blue 3"),
        ("a 3 a 3 a", "got 5 words, .* at most 4"),
    ],
)
def test_other_sentences_are_refused(encoder: TextEncoder, sentence: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoder.word_indices([sentence])
