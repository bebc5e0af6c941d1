"""Errors, as exceptions that the command line turns into one sentence.

    AdatsqError                 exit code 1: a failure that is not the user's doing
    ├── CancelledError          the caller ended the work
    └── UserError               exit code 2: the user can mend it
        ├── UnknownNameError    a model, format, set or target that does not exist
        ├── UnsupportedFormatError  a format that the target cannot accelerate, or a layer that the format cannot hold
        ├── BudgetError         a budget that no policy can meet
        ├── MismatchError       a file made for another model, step count or setting
        ├── DamagedFileError    a file that is truncated, altered or of another schema version
        ├── MissingFileError    a file or folder that should be there
        ├── OutputError         a folder that cannot be written or is in use
        └── DependencyError     a library that is not installed

Every message says what, where, what was got and what was expected, and the next step.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class AdatsqError(Exception):
    """A failure of the tool or of a library below it."""

    exit_code = 1


class CancelledError(AdatsqError):
    """The caller ended the work; what was finished stays."""


class UserError(AdatsqError):
    """A mistake that the user can mend by following the message."""

    exit_code = 2


class UnknownNameError(UserError):
    """A name that is not in a closed vocabulary."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """Say which names exist and which one was probably meant."""
        names = list(known)
        close = get_close_matches(name, names, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ";"
        super().__init__(f"unknown {kind} '{name}'{hint} choose one of: {', '.join(names)}")


class UnsupportedFormatError(UserError):
    """A format that the target cannot accelerate, or that a layer's shape rules out."""


class BudgetError(UserError):
    """A budget below the cheapest policy."""


class MismatchError(UserError):
    """A file that belongs to another model, step count or setting."""


class DamagedFileError(UserError):
    """A file whose content is not what its name, size or hash promises."""


class MissingFileError(UserError):
    """A file or folder that the command needs and does not find."""


class OutputError(UserError):
    """A folder that cannot be written."""


class DependencyError(UserError):
    """A library that the command needs and that is not installed."""


def one_line(error: Exception, limit: int = 300) -> str:
    """Put the message of a library's exception on one line, not too long; its type where it has no message."""
    text = " ".join(str(error).split())
    return (text if len(text) <= limit else f"{text[:limit]} ...") or type(error).__name__
