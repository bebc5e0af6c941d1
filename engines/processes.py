"""Work in other processes, for libraries that hold Python's lock while they compute."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh Python processes that end with this one, however it ends.

    Ctrl-C is this process's business. After an error no more work is begun.

    Args:
        count: how many work at a time.
    """
    pool = ProcessPoolExecutor(count, get_context("spawn"), _depend_on_the_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _depend_on_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = parent_process()
    assert parent is not None, "only children come here"
    parent.join()
    os._exit(1)
