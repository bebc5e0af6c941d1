"""Which tensors of a file a converted tensor was made of, so that none is lost in a converter without a word."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


class _Traced(Tensor):
    """A tensor that knows its sources, as does all that is computed from it."""

    names: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils._pytree import tree_leaves

        result = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        names = sources(tree_leaves((args, kwargs)))
        for leaf in tree_leaves(result):
            if isinstance(leaf, cls):
                leaf.names = names
        return result


def trace(value: Tensor, name: str) -> Tensor:
    """The same tensor, whose source is its name in the file."""
    traced = value.as_subclass(_Traced)
    traced.names = frozenset({name})
    return traced


def sources(values: Iterable[Any]) -> frozenset[str]:
    """Names of all that some values were made of; what is not traced has none."""
    return frozenset[str]().union(*(value.names for value in values if isinstance(value, _Traced)))
