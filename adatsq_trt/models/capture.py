"""Hooks that see what flows through the linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass
class Capture:
    """Inputs and output gradients of the layers in one call of the model.

    Attributes:
        inputs: module path → the layer's input [rows, K] as it was, detached.
        output_gradients: module path → gradient with respect to the layer's output, after a backward pass.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    output_gradients: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def captured(layers: Mapping[str, nn.Linear]) -> Iterator[Capture]:
    """Record inputs, and output gradients when a backward pass follows, of every call inside the block."""
    capture = Capture()

    def watch(name: str, layer: nn.Linear):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            capture.inputs[name] = inputs[0].detach()
            if output.requires_grad:
                output.register_hook(lambda gradient: capture.output_gradients.__setitem__(name, gradient))

        return layer.register_forward_hook(hook)

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        yield capture
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observed_inputs(layers: Mapping[str, nn.Linear], observe: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand every layer's input to a function, by the layer's name; nothing is kept.

    Args:
        layers: by name.
        observe: takes a name and an input [..., K], detached.
    """

    def watch(name: str, layer: nn.Linear) -> RemovableHandle:
        return layer.register_forward_pre_hook(lambda _module, inputs: observe(name, inputs[0].detach()))

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def captured_outputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record the output of every layer, by name, of a call inside the block."""
    outputs: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module) -> RemovableHandle:
        return layer.register_forward_hook(lambda _module, _inputs, output: outputs.__setitem__(name, output.detach()))

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
