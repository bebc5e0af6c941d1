"""Units of work of small models: several at a time, each in a thread with a single processor.

An operation on a small tensor is over before a second processor has joined in, so two units at a time on one processor
each are done sooner than one after the other on two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from threading import Lock
from typing import Any

from adatsq_trt.execution import CommonT, ItemT, ResultT, Shared, T

# What the first of the blocks that are open found, for the last to restore: two builds may be in threads of their own.
_inside: list[int] = []
_LOCK = Lock()


class Threads:
    """As many units at a time as there are threads, each with a copy of its own of what is shared."""

    def __init__(self, count: int, pool: ThreadPoolExecutor) -> None:
        """Work with a pool.

        Args:
            count: of its threads.
            pool: its threads compute with one processor.
        """
        self._count, self._pool = count, pool

    def share(self, value: T) -> Shared[T]:
        """A deep copy for each thread: units may change what they are given, such as a model's formats."""
        copies: SimpleQueue[T] = SimpleQueue()
        for _ in range(self._count):
            copies.put(copy.deepcopy(value))
        return Shared(copies)

    def map(
        self,
        function: Callable[[CommonT, ItemT], ResultT],
        common: Shared[CommonT],
        items: Iterable[ItemT] | Iterable[Shared[ItemT]],
    ) -> Iterator[ResultT]:
        """Begin all units at once; results come in the order of the items."""
        return self._pool.map(partial(_compute, function, common), items)


def _compute(function: Callable[..., ResultT], common: Shared[Any], item: Any) -> ResultT:
    with _lent(common) as own:
        if not isinstance(item, Shared):
            return function(own, item)
        with _lent(item) as value:
            return function(own, value)


@contextmanager
def _lent(shared: Shared[T]) -> Iterator[T]:
    value = shared.content.get()
    try:
        yield value
    finally:
        shared.content.put(value)


@contextmanager
def threads(count: int) -> Iterator[Threads]:
    """Threads for the length of a block; after an error they begin nothing more.

    Args:
        count: how many.
    """
    import torch

    pool = ThreadPoolExecutor(count, "unit", torch.set_num_threads, (1,))
    with _LOCK:
        _inside.append(torch.get_num_threads())
    try:
        yield Threads(count, pool)
    finally:
        pool.shutdown(cancel_futures=True)
        with _LOCK:
            before = _inside[0]
            _inside.pop()
            if not _inside:
                torch.set_num_threads(before)  # MKL has one setting for all threads of a process
