"""Progress of anything that takes longer than two seconds, and log messages beside it, on standard error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

CONSOLE = Console(stderr=True)


class LogHandler(logging.Handler):
    """Log messages as single lines, whatever the width, that do not tear a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message above the bars."""
        style = "yellow" if record.levelno >= logging.WARNING else None
        CONSOLE.print(self.format(record), style=style, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar with time left on a terminal, one closing line elsewhere; gives the function that advances it.

    Args:
        label: what is being done.
        total: units of work.
    """
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=CONSOLE, refresh_per_second=4) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)
