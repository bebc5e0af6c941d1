"""`--shapes` and sizes: what is read, and what no model can have."""

from dataclasses import replace

import pytest

from adatsq_trt.config import BuildConfig
from adatsq_trt.errors import UserError
from adatsq_trt.image import PixelScale
from adatsq_trt.stages.shapes import at_first, parse_shapes, parse_size, resolve_shapes, written
from tests.stages.tiny_run import make_model


def test_what_is_written_is_read_again() -> None:
    for numbers in ((1, 1024, 512), (2, 9, 64, 32)):
        assert parse_shapes(written(numbers)) == (numbers,)
    assert parse_shapes("1x8x8, 4x16x8") == ((1, 8, 8), (4, 16, 8))
    assert parse_size("9x64x32", "--size") == (9, 64, 32)


@pytest.mark.parametrize("text", ["", "8", "8x", "0x8x8", "1x8x8x8x8", "1x8x-8", "1x8x8,", "1x٣x8", "1x1e9x8"])
def test_other_writing_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected SAMPLESxHEIGHTxWIDTH"):
        parse_shapes(text)


@pytest.mark.parametrize("text", ["4097x8x8", "1x100000000x8"])
def test_numbers_that_nothing_could_hold_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="choose smaller numbers"):
        parse_shapes(text)


def test_the_own_size_comes_first_and_repetitions_go() -> None:
    model = make_model()
    height, width = model.scale.size(model.adapter.image)
    own, other = (height, width), (2 * height, width)
    asked = [(4, *other), (2, *own), (1, *other), (1, *own), (2, *own)]
    assert resolve_shapes(asked, model) == ((1, *own), (2, *own), (1, *other), (4, *other))
    assert resolve_shapes([], model) == ()


def test_sizes_that_do_not_suit_the_model_are_refused() -> None:
    model = replace(make_model(), scale=PixelScale(2))
    height, width = model.scale.size(model.adapter.image)
    with pytest.raises(UserError, match=f"add 1x{height}x{width}"):
        resolve_shapes([(1, 2 * height, width)], model)
    with pytest.raises(UserError, match="draws pictures, expected HEIGHTxWIDTH"):
        resolve_shapes([(1, height, width), (1, 5, height, width)], model)
    with pytest.raises(UserError, match="expected sides that are multiples of"):
        resolve_shapes([(1, height, width), (1, height + 1, width)], model)
    with pytest.raises(UserError, match="choose a smaller size"):
        resolve_shapes([(1, height, width), (1, 1 << 14, 1 << 14)], model)


def test_a_checkpoint_is_opened_in_the_first_shape_unless_it_has_a_size() -> None:
    opened = at_first(BuildConfig(shapes="1x9x64x32,4x9x32x32"))
    assert (opened.frames, opened.height, opened.width) == (9, 64, 32)
    opened = at_first(BuildConfig(shapes="2x64x32"))
    assert (opened.frames, opened.height, opened.width) == (None, 64, 32)
    for config in (BuildConfig(shapes="1x64x32", height=8), BuildConfig(height=8)):
        assert at_first(config) == config
