"""Progress as a callback: whoever calls the library decides how it is shown, and can end the work from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import TypeAlias

from adatsq_trt.errors import CancelledError


@dataclass(frozen=True)
class Progress:
    """How far a task is.

    Attributes:
        task: its name.
        done: units of work that are finished.
        total: units of work in all; those that an earlier run has finished may never be counted.
        ended: whether this is the last that is told of the task.
    """

    task: str
    done: int
    total: int
    ended: bool = False


Callback: TypeAlias = Callable[[Progress], None]


class Reporter:
    """Tells a callback how tasks go on, and raises where the work is to end.

    An exception of the callback ends the work too; what is finished stays in the run directory.
    """

    def __init__(self, callback: Callback | None = None, cancel: Event | None = None) -> None:
        """Report to a callback.

        Args:
            callback: called at the beginning of a task, after each unit of work and at the end; None for silence.
            cancel: ends the work at the next unit once it is set.
        """
        self._callback, self._cancel = callback, cancel

    @contextmanager
    def __call__(self, task: str, total: int) -> Iterator[Callable[[], None]]:
        """Report a task; gives the function that says that a unit of work is done.

        Raises:
            CancelledError: the event is set.
        """
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            self._tell(Progress(task, done, total))

        self._tell(Progress(task, 0, total))
        yield advance
        if self._callback is not None:
            self._callback(Progress(task, done, total, ended=True))

    def _tell(self, progress: Progress) -> None:
        if self._cancel is not None and self._cancel.is_set():
            raise CancelledError(f"cancelled in '{progress.task}'; the same call goes on where this one stopped")
        if self._callback is not None:
            self._callback(progress)
