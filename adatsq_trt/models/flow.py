"""How much flows through a model in one call, told from shapes alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.schedule import Schedule


@dataclass(frozen=True)
class Flow:
    """Bytes of float32 that one sample sends through the model in a call, both branches of guidance together.

    Attributes:
        largest_bytes: the largest output of an innermost module.
        outputs_bytes: the outputs of all innermost modules, which a backward pass keeps.
        layers_bytes: the outputs of the quantizable layers, which have gradients of the same size.
    """

    largest_bytes: int
    outputs_bytes: int
    layers_bytes: int


def measure_flow(adapter: ModelAdapter, schedule: Schedule, guidance: float) -> Flow:
    """Send shapes through the model; computes nothing.

    Args:
        adapter: the model; weights may be on the meta device.
        schedule: of the denoising loop.
        guidance: its scale.
    """
    conditioning = adapter.encode([0])
    latent = torch.zeros(1, *adapter.latent_shape)
    inputs = adapter.guided_inputs(latent, schedule.model_time(0), conditioning, guidance)
    module = copy.deepcopy(adapter.trace_module()).to("meta")
    sizes = _output_sizes(module, {name: value.to("meta") for name, value in inputs.items()})
    layers = sum(4 * size for name, size in sizes.items() if _is_layer(name, adapter))
    return Flow(4 * max(sizes.values()), 4 * sum(sizes.values()), layers)


def _is_layer(name: str, adapter: ModelAdapter) -> bool:
    """Whether a module of the trace is quantizable; the trace module has a prefix of its own."""
    return any(name == layer or name.endswith(f".{layer}") for layer in adapter.quantizable_layers())


@torch.no_grad()
def _output_sizes(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Numbers in the output of every innermost module."""
    sizes: dict[str, int] = {}

    def watch(name: str, inner: nn.Module) -> None:
        inner.register_forward_hook(lambda _m, _i, output: sizes.__setitem__(name, _numbers(output)))

    for name, inner in module.named_modules():
        if not list(inner.children()):
            watch(name, inner)
    module(*inputs.values())
    return sizes


def _numbers(output: object) -> int:
    """Of a tensor, or of some: rotations come in pairs."""
    if isinstance(output, Tensor):
        return output.numel()
    return sum(map(_numbers, output)) if isinstance(output, tuple | list) else 0
