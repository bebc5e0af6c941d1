"""What a field of a file from elsewhere may hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from adatsq_trt.fields import Dimension, ModulePath, Name

NAMES = ["digits-flux", "owner/model", "2.13.0+cpu", "2.9.0a0+145a3a7bda.nv25.10", "FluxTransformer2DModel"]
NO_NAMES = ["", "..", "../x", "a/../b", "a/b/c", "/etc", "a\n", "a b", "a;b", "$x", 'a"', "ü", "-rf", "x" * 101, "a/"]
NO_PATHS = ["", ".", "a..b", ".a", "a.", "a/b", "../a", "a\n", "a b", 'a"']


@pytest.mark.parametrize("text", NAMES)
def test_names(text: str) -> None:
    assert TypeAdapter(Name).validate_python(text) == text


@pytest.mark.parametrize(
    ("kind", "text"),
    [*((Name, text) for text in NO_NAMES), *((ModulePath, text) for text in NO_PATHS), (Dimension, "1 ]")],
)
def test_what_is_none(kind: object, text: str) -> None:
    with pytest.raises(ValidationError, match="expected"):
        TypeAdapter(kind).validate_python(text)


@given(st.text(max_size=6))
def test_nothing_that_other_formats_read_as_more_than_text(text: str) -> None:
    for kind in (Name, ModulePath):
        try:
            TypeAdapter(kind).validate_python(text)
        except ValidationError:
            continue
        assert not set(text) & set(" \t\r\n\"'`$;&|<>(){}[]\\:,*?~#\0")
        assert ".." not in text.split("/")


@pytest.mark.parametrize("size", [0, -1])
def test_dimensions_are_positive(size: int) -> None:
    assert TypeAdapter(Dimension).validate_python(4) == 4
    with pytest.raises(ValidationError):
        TypeAdapter(Dimension).validate_python(size)
