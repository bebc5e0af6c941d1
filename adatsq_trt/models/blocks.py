"""A model's graph of operations cut at its blocks, of which one at a time is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from adatsq_trt.models.adapter import ModelAdapter


@dataclass(frozen=True)
class BlockCall:
    """A call of a block whose own operations autograd has not seen.

    Attributes:
        block: module path.
        forward: the block's own function.
        arguments: of the call, positional and by name; tensors as the operations between the blocks made them.
        outputs: its tensors, in the order of `repeat`; leaves of autograd's graph.
    """

    block: str
    forward: Callable[..., Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    outputs: tuple[Tensor, ...]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Tensors among the arguments that have gradients, each once."""
        found = {id(x): x for x in pytree.tree_leaves(self.arguments) if isinstance(x, Tensor) and x.requires_grad}
        return tuple(found.values())

    def repeat(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Call the block again in a graph of its own: its inputs there, and its outputs."""
        own = {id(x): x.detach().requires_grad_() for x in self.inputs}
        args, kwargs = pytree.tree_map(lambda x: own.get(id(x), x), self.arguments)
        with torch.enable_grad():
            outputs = self.forward(*args, **kwargs)
        return tuple(own.values()), tuple(filter(_differentiable, pytree.tree_leaves(outputs)))


def _differentiable(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def cut_at_blocks(adapter: ModelAdapter) -> Iterator[list[BlockCall]]:
    """Inside the block, calls of the model's blocks are listed, and autograd sees only what lies between them."""
    calls: list[BlockCall] = []
    modules = {name: adapter.transformer.get_submodule(name) for name in adapter.blocks()}
    hooked = {name: module.forward for name, module in modules.items() if "forward" in vars(module)}

    def cut(block: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                values, structure = pytree.tree_flatten(forward(*args, **kwargs))
            values = [x.detach().requires_grad_() if _differentiable(x) else x for x in values]
            outputs = tuple(filter(_differentiable, values))
            calls.append(BlockCall(block, forward, (args, kwargs), outputs))
            return pytree.tree_unflatten(values, structure)

        return call

    try:
        for name, module in modules.items():
            module.forward = cut(name, module.forward)
        yield calls
    finally:
        for name, module in modules.items():
            del module.forward
            if name in hooked:
                module.forward = hooked[name]


class LeafGradients:
    """Gradients that arrive at the leaves of such a graph, a row for each vector that is sent backwards.

    Attributes:
        rows: how many there are.
    """

    def __init__(self, leaves: Sequence[Tensor], rows: int) -> None:
        """Nothing has arrived.

        Args:
            leaves: of the graph, in the order in which they were made.
            rows: how many vectors there are.
        """
        self.rows = rows
        self._leaves = list(leaves)
        self._sums: list[dict[int, Tensor]] = [{} for _ in range(rows)]

    def send(self, row: int, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Send gradients from tensors of the graph to the leaves that these were made from."""
        if not outputs:
            return
        sums = self._sums[row]
        # What has arrived is sent along, from the youngest operations there are, which autograd looks at first. So sums
        # are taken in the order, and have the bits, that they would have in one graph.
        before = [leaf for leaf in self._leaves if id(leaf) in sums]
        again = [leaf.view_as(leaf) for leaf in before]
        found = torch.autograd.grad(
            [*outputs, *again],
            self._leaves,
            [*gradients, *(sums[id(leaf)] for leaf in before)],
            retain_graph=True,
            allow_unused=True,
        )
        pairs = zip(self._leaves, found, strict=True)
        self._sums[row] = {id(leaf): gradient for leaf, gradient in pairs if gradient is not None}

    def reached(self, row: int, leaf: Tensor) -> bool:
        """Whether anything has arrived at a leaf."""
        return id(leaf) in self._sums[row]

    def of(self, row: int, leaf: Tensor) -> Tensor:
        """Return the gradient that has arrived at a leaf."""
        return self._sums[row][id(leaf)]

    def drop(self, leaves: Sequence[Tensor]) -> None:
        """Forget the latest leaves: nothing more is made from them."""
        del self._leaves[len(self._leaves) - len(leaves) :]
        for sums in self._sums:
            for leaf in leaves:
                sums.pop(id(leaf), None)
