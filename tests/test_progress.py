"""Progress as a callback, and how it ends work."""

from threading import Event

import pytest

from adatsq_trt.errors import CancelledError
from adatsq_trt.progress import Progress, Reporter


def test_a_task_is_told_from_its_beginning_to_its_end() -> None:
    seen: list[Progress] = []
    with Reporter(seen.append)("count", 2) as advance:
        advance()
        advance()
    assert [(p.task, p.done, p.total, p.ended) for p in seen] == [
        ("count", 0, 2, False),
        ("count", 1, 2, False),
        ("count", 2, 2, False),
        ("count", 2, 2, True),
    ]


def test_an_event_ends_the_work_at_the_next_unit() -> None:
    cancel, done = Event(), list[int]()
    with pytest.raises(CancelledError, match="cancelled in 'count'"):
        _count(Reporter(cancel=cancel), cancel, done)
    assert done == [1]


def _count(reporter: Reporter, cancel: Event, done: list[int]) -> None:
    """Three units of work, in the first of which somebody cancels."""
    with reporter("count", 3) as advance:
        for unit in (1, 2, 3):
            advance()
            done.append(unit)
            cancel.set()


def test_a_task_that_fails_is_not_called_ended() -> None:
    seen: list[Progress] = []
    with pytest.raises(ZeroDivisionError), Reporter(seen.append)("count", 1):
        raise ZeroDivisionError
    assert not any(p.ended for p in seen)


def test_nobody_need_listen() -> None:
    with Reporter()("count", 1) as advance:
        advance()
