"""Progress of anything that takes longer than two seconds, and log messages beside it, on standard error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from adatsq_trt.progress import Progress, Reporter

CONSOLE = Console(stderr=True)


class LogHandler(logging.Handler):
    """Log messages as single lines, whatever the width, that do not tear a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message above the bars."""
        style = "yellow" if record.levelno >= logging.WARNING else None
        CONSOLE.print(self.format(record), style=style, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def bars() -> Iterator[Callable[[Progress], None]]:
    """Show tasks as bars with time left on a terminal, as one closing line elsewhere; gives what is to be called."""
    with ExitStack() as stack:
        shown = _Bars(stack)
        yield shown.show


@contextmanager
def progress(task: str, total: int) -> Iterator[Callable[[], None]]:
    """Show one task; gives the function that says that a unit of work is done."""
    with bars() as show, Reporter(show)(task, total) as advance:
        yield advance


class _Bars:
    """The bar of the task that goes on, or none."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._task: tuple[str, RichProgress, TaskID] | None = None

    def show(self, progress: Progress) -> None:
        """Begin, move or end the bar."""
        if self._task is None or self._task[0] != progress.task:
            self._stack.close()
            bar = self._stack.enter_context(_bar())
            self._task = progress.task, bar, bar.add_task(progress.task, total=progress.total)
        _, bar, task = self._task
        bar.update(task, completed=progress.done)
        if progress.ended:
            self._stack.close()
            self._task = None


def _bar() -> RichProgress:
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return RichProgress(*columns, console=CONSOLE, refresh_per_second=4)
