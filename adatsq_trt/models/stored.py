"""Linear layers whose weights stay where they are stored, so that a model may be larger than memory.

Every call makes a float32 copy of the weight and drops it again. A backward pass makes its own: what autograd would
keep for it is the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Smaller weights are not worth the reading.
LEAST_NUMBERS = 1 << 20


@dataclass(frozen=True)
class LowRankChange:
    """Low-rank change that is added to a stored weight: factor · up · down.

    Attributes:
        up: float32 [N, rank].
        down: float32 [rank, K].
        factor: a number.
    """

    up: Tensor
    down: Tensor
    factor: float


class MappedLinear(nn.Linear):
    """A linear layer without a parameter for its weight.

    Attributes:
        changes: of the weight, added to every copy.
        declared: type that every copy is rounded to before it gets its own, or None.
        dtype: of the copies.
        held: a copy on another device, which all calls use, or None.
    """

    def __init__(self, tensors: Mapping[str, Tensor], name: str, bias: Tensor | None) -> None:
        """Find the weight.

        Args:
            tensors: looked up at every use.
            name: of the weight [N, K] among them, in any floating type.
            bias: float32 [N].
        """
        nn.Module.__init__(self)
        self._tensors, self._name = tensors, name
        self.out_features, self.in_features = self.stored.shape
        self.changes: list[LowRankChange] = []
        self.declared: torch.dtype | None = None
        self.dtype = torch.float32
        self.held: Tensor | None = None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]

    # Without a setter: `nn.Module` would look for a parameter of this name.
    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A copy [N, K] of the weight, or the one that is held."""
        return self._copy(self.dtype) if self.held is None else self.held

    def _copy(self, dtype: torch.dtype) -> Tensor:
        # Copied also where the type is right: products of tensors in other places in memory may round differently.
        if not self.changes:
            return self.stored.to(self.declared or self.stored.dtype).to(dtype, copy=True)
        weight = self.stored.to(torch.float32, copy=True)
        for change in self.changes:
            weight += change.up @ change.down * change.factor
        return weight.to(self.declared or dtype).to(dtype)

    def differs(self, dtype: torch.dtype) -> bool:
        """Whether the weight may have other numbers than those of a type."""
        return dtype is not torch.float32 and (bool(self.changes) or self.stored.dtype is not dtype)

    @property
    def stored(self) -> Tensor:
        """The weight [N, K] as it is stored, not to be changed."""
        return self._tensors[self._name].detach()

    def forward(self, input: Tensor) -> Tensor:
        """Y = x Wᵀ + b; x is [..., K], y is [..., N]."""
        if torch.is_grad_enabled() and input.requires_grad:
            return _Product.apply(input, self)  # type: ignore[no-any-return, no-untyped-call]
        return functional.linear(input, self.weight, self.bias)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Have copies on a device, in a type: one for all calls, or, on the processor, one for each."""
        self.dtype, self.held = dtype, None if device.type == "cpu" else self._copy(dtype).to(device)

    def plain(self) -> nn.Linear:
        """The same layer with its weight as a parameter: the stored tensor itself; of a changed one a copy."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        weight = self._copy(self.declared or torch.float32) if self.changes else self.stored
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return linear

    def in_memory(self) -> nn.Linear:
        """The same layer with a float32 weight in memory."""
        linear = self.plain()
        linear.weight = nn.Parameter(self._copy(torch.float32), requires_grad=False)
        return linear

    def __getstate__(self) -> dict[str, Any]:
        """Workers on other machines do not have the files; a copy, since a whole file would be sent with its tensor."""
        return {**self.__dict__, "_tensors": {self._name: self.stored.clone()}}


class _Product(torch.autograd.Function):
    """The product that keeps no weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: MappedLinear) -> Tensor:
        """As the layer's."""
        ctx.layer = layer
        return functional.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """∂L/∂x = ∂L/∂y W."""
        (gradient,) = gradients
        # As autograd does it for a layer in memory: a product of three dimensions would round differently.
        rows = gradient.reshape(-1, gradient.shape[-1]) @ ctx.layer.weight.to(gradient.dtype)
        return rows.view(*gradient.shape[:-1], -1), None


class EmptyOnMeta(TorchFunctionMode):
    """Modules that are made inside have their parameters on the meta device, and their buffers with values.

    Layers allocate weights with `torch.empty`, so this is all that is redirected; positions and the like are computed.
    Unlike accelerate's `init_empty_weights`, it concerns the modules of its own thread alone.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Redirect `torch.empty`."""
        if func is torch.empty:
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        return func(*args, **(kwargs or {}))


def stored_layers(root: nn.Module) -> Iterator[tuple[nn.Module, str, MappedLinear]]:
    """The layers of this kind, each with its parent and its name there."""
    for parent in list(root.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, MappedLinear):
                yield parent, name, module


def large_linears(root: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers, by module path, whose weights are worth leaving where they are."""
    return {
        path: module
        for path, module in root.named_modules()
        if isinstance(module, nn.Linear) and module.in_features * module.out_features >= LEAST_NUMBERS
    }


def fill(root: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module on the meta device its weights: large linear layers look theirs up, the rest is float32 in memory.

    Args:
        root: changed in place; buffers that are no part of its state are there already.
        tensors: of the module's state, by name, in any floating type.
    """
    large = large_linears(root)
    for path, linear in large.items():
        bias = None if linear.bias is None else _float32(tensors[f"{path}.bias"])
        _put(root, path, MappedLinear(tensors, f"{path}.weight", bias))
    for name in root.state_dict():
        loaded, (parent, last) = _float32(tensors[name]), _place(root, name)
        setattr(parent, last, nn.Parameter(loaded, False) if last in parent._parameters else loaded)


def named_weights(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters, and copies of what it has stored, by name."""
    yield from root.named_parameters()
    for path, module in root.named_modules():
        if isinstance(module, MappedLinear):
            yield f"{path}.weight", module.weight


def count_weights(root: nn.Module) -> int:
    """Numbers in a module's parameters, stored ones too."""
    stored = sum(layer.in_features * layer.out_features for _, _, layer in stored_layers(root))
    return stored + sum(parameter.numel() for parameter in root.parameters())


def _float32(value: Tensor) -> Tensor:
    """A copy in memory, no view of a file."""
    return value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, name = _place(root, path)
    setattr(parent, name, module)


def _place(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return root.get_submodule(parent), name
