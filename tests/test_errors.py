"""Exit codes and the message about unknown names."""

import inspect

import pytest

from adatsq_trt import errors
from adatsq_trt.errors import AdatsqError, UnknownNameError, UserError

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, AdatsqError)]


@pytest.mark.parametrize("kind", ALL)
def test_users_mistakes_exit_with_2_and_failures_with_1(kind: type[AdatsqError]) -> None:
    assert kind.exit_code == (2 if issubclass(kind, UserError) else 1)


def test_every_exception_is_drawn_in_the_docstring() -> None:
    assert [kind.__name__ for kind in ALL if kind.__name__ not in (errors.__doc__ or "")] == []


def test_unknown_name_proposes_a_close_one_and_lists_all() -> None:
    message = str(UnknownNameError("format", "nvpf4", ["nvfp4", "fp8"]))
    assert message == "unknown format 'nvpf4'; did you mean 'nvfp4'? choose one of: nvfp4, fp8"


def test_unknown_name_proposes_nothing_far_away() -> None:
    assert "mean" not in str(UnknownNameError("format", "xyz", ["nvfp4", "fp8"]))
