"""How much flows through a model in one call, told from shapes alone."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.schedule import Schedule

# A backward pass keeps what lies between the innermost modules too.
_KEPT = 2


@dataclass(frozen=True)
class Flow:
    """Bytes of float32 that one sample sends through the model in a call, both branches of guidance together.

    Attributes:
        largest_bytes: the largest output of an innermost module.
        outputs_bytes: the outputs of all innermost modules, which a backward pass keeps.
        layers_bytes: the outputs of the quantizable layers, which have gradients of the same size.
        blocks_bytes: the outputs of the blocks.
        block_bytes: the outputs of the block that has most.
        block_outputs_bytes: as `outputs_bytes`, of the largest block.
        block_layers_bytes: as `layers_bytes`, of the largest block.
    """

    largest_bytes: int
    outputs_bytes: int
    layers_bytes: int
    blocks_bytes: int
    block_bytes: int
    block_outputs_bytes: int
    block_layers_bytes: int

    def backward_bytes(self, projections: int) -> int:
        """Estimate the bytes that a backward pass through the whole model keeps of a sample."""
        return _KEPT * self.outputs_bytes + (1 + projections) * self.layers_bytes

    def block_backward_bytes(self, projections: int) -> int:
        """The same, where it goes block by block; gradients arrive at outputs, leave inputs, and are added up."""
        block = _KEPT * self.block_outputs_bytes + (1 + projections) * self.block_layers_bytes
        return self.blocks_bytes + block + 3 * projections * self.block_bytes


def measure_flow(adapter: ModelAdapter, schedule: Schedule, guidance: float) -> Flow:
    """Send shapes through the model; computes nothing.

    Args:
        adapter: the model; weights may be on the meta device. Of two experts, which are alike, the first is measured.
        schedule: of the denoising loop.
        guidance: its scale.
    """
    adapter = adapter.of_expert(schedule.expert(0))
    module, inputs = _shapes(adapter, schedule, guidance)
    prefix, blocks = _prefix(adapter), adapter.blocks()
    sizes = _output_bytes(module, {f"{prefix}{block}" for block in blocks}, inputs)
    own = {name.removeprefix(prefix): size for name, size in sizes.items()}
    inner = {name: size for name, size in own.items() if name not in blocks}
    layers = {name: own[name] for name in adapter.quantizable_layers()}
    return Flow(
        max(inner.values()),
        sum(inner.values()),
        sum(layers.values()),
        sum(own[block] for block in blocks),
        max((own[block] for block in blocks), default=0),
        max((_inside(inner, block) for block in blocks), default=0),
        max((_inside(layers, block) for block in blocks), default=0),
    )


@torch.no_grad()
def count_operations(adapter: ModelAdapter, schedule: Schedule, guidance: float) -> float:
    """Count the additions and multiplications of matrix products and attention in a call of one sample.

    Args:
        adapter: as of `measure_flow`.
        schedule: of the denoising loop.
        guidance: its scale.
    """
    module, inputs = _shapes(adapter.of_expert(schedule.expert(0)), schedule, guidance)
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return float(counter.get_total_flops())


def _shapes(adapter: ModelAdapter, schedule: Schedule, guidance: float) -> tuple[nn.Module, list[Tensor]]:
    """Make a model without numbers, and the inputs of a call of one sample."""
    latent = torch.zeros(1, *adapter.latent_shape)
    inputs = adapter.guided_inputs(latent, schedule.model_time(0), adapter.encode([0]), guidance)
    return copy.deepcopy(adapter.trace_module()).to("meta"), [value.to("meta") for value in inputs.values()]


def _prefix(adapter: ModelAdapter) -> str:
    """Find the prefix that the trace module puts before the module paths of the transformer."""
    names = [name for name, module in adapter.trace_module().named_modules() if module is adapter.transformer]
    return f"{names[0]}." if names and names[0] else ""


def _inside(sizes: Mapping[str, int], block: str) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(f"{block}."))


@torch.no_grad()
def _output_bytes(module: nn.Module, blocks: Collection[str], inputs: Sequence[Tensor]) -> dict[str, int]:
    """Bytes, in float32, of what every innermost module and every block gives."""
    sizes: dict[str, int] = {}

    def watch(name: str, inner: nn.Module) -> None:
        inner.register_forward_hook(lambda _m, _i, output: sizes.__setitem__(name, 4 * _numbers(output)))

    for name, inner in module.named_modules():
        if name in blocks or not list(inner.children()):
            watch(name, inner)
    module(*inputs)
    return sizes


def _numbers(output: object) -> int:
    """Of a tensor, or of some: rotations come in pairs."""
    if isinstance(output, Tensor):
        return output.numel()
    return sum(map(_numbers, output)) if isinstance(output, tuple | list) else 0
