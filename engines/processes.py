"""Work in other processes, for libraries that hold Python's lock while they compute."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh Python processes: Ctrl-C is their parent's business, and after an error they begin nothing more.

    Args:
        count: how many work at a time.
    """
    pool = ProcessPoolExecutor(count, get_context("spawn"), _leave_interrupts_to_the_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
