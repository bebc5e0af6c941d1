"""Where units of work are computed: in this process, or by the workers of a Ray cluster (`cluster`).

A unit is a function of the package, what all units have in common, and an item. It is computed by the same operations
wherever it runs, and results come back in the order of the items, so whatever is made of them is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
CommonT = TypeVar("CommonT")
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Shared(Generic[T]):
    """A value that workers can read, however many units need it.

    Attributes:
        content: the value, or where it lies: only who shared it looks at this.
    """

    content: Any


class Executor(Protocol):
    """Who computes units of work."""

    def share(self, value: T) -> Shared[T]:
        """Make a value readable by all workers: it is sent once, not with every unit."""

    def map(
        self,
        function: Callable[[CommonT, ItemT], ResultT],
        common: Shared[CommonT],
        items: Iterable[ItemT] | Iterable[Shared[ItemT]],
    ) -> Iterator[ResultT]:
        """Compute a unit for each item.

        Args:
            function: at the top of a module, so that other processes find it; it must not depend on earlier units.
            common: its first argument.
            items: its second argument, one for each unit; taken as they are needed.

        Returns:
            The results, in the order of the items.
        """


class InProcess:
    """One unit after another, in this process."""

    def share(self, value: T) -> Shared[T]:
        """The value itself."""
        return Shared(value)

    def map(
        self,
        function: Callable[[CommonT, ItemT], ResultT],
        common: Shared[CommonT],
        items: Iterable[ItemT] | Iterable[Shared[ItemT]],
    ) -> Iterator[ResultT]:
        """Compute each unit when its result is asked for."""
        for item in items:
            yield function(common.content, item.content if isinstance(item, Shared) else item)
