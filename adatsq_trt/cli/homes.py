"""`~` in paths: a shell expands it only where a word begins, so not in `--output=~/run` or in quotes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adatsq_trt.errors import MissingFileError

# Texts that may be a path: other parameters with paths are annotated as such.
PLACES = frozenset({"model", "base", "lora", "gpu"})


def expanding_homes(command: Callable[..., object]) -> Callable[..., object]:
    """The same command with `~` and `~user` expanded in each of its paths."""

    @functools.wraps(command)
    def expanding(*args: Any, **given: Any) -> object:
        return command(*args, **{name: _expanded(value, name in PLACES) for name, value in given.items()})

    return expanding


def _expanded(value: Any, place: bool) -> Any:
    """A parameter's value.

    Args:
        value: of any type.
        place: whether a text is a path.

    Raises:
        MissingFileError: a user who has no home here.
    """
    if isinstance(value, list | tuple):
        return type(value)(_expanded(one, place) for one in value)
    if not isinstance(value, Path) and not (place and isinstance(value, str)):
        return value
    text = os.path.expanduser(value)  # of a text too, whose last part may be no path, as in FILE:SCALE
    if text.startswith("~"):
        raise MissingFileError(
            f"'{value}': there is no such home directory; write the path out, or ./~ for such a name"
        )
    return Path(text) if isinstance(value, Path) else text
