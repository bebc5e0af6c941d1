"""Inputs of plans beside rows: weights, LoRAs, positions, scales and the assignment, kept on the device."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from adatsq_trt.engines.backends.execution_context import ALIGNMENT_BYTES, EngineContext
from adatsq_trt.engines.bundle import PLAN_FOLDER, REBUILD, BundleFiles
from adatsq_trt.engines.plan_weights import STORE_NAME
from adatsq_trt.errors import DamagedFileError

if TYPE_CHECKING:
    import torch

Size = tuple[int, ...] | None


class Memory(Protocol):
    """Where a device's tensors come from."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory on the device."""


class PlanControls:
    """Weights once per bundle or expert, LoRAs once per bundle, positions once per size, scales as one tensor.

    In layout `plugin` the shape of an input selects the assignment, of which nobody reads the content.
    """

    def __init__(self, files: BundleFiles, memory: Memory) -> None:
        """Bring scales to the device, and slots for LoRAs, empty; weights come with the contexts that take them.

        Args:
            files: the bundle.
            memory: of the device.

        Raises:
            DamagedFileError: as `BundleFiles.scales`.
        """
        self._files, self._memory = files, memory
        self._weights: dict[str, torch.Tensor] = {}
        self._positions: dict[Size, dict[str, torch.Tensor]] = {}
        self._steps = _StepTable(files, memory)
        self._selector = self._make_selector()
        self._loras = self._make_slots()

    def load_weights(self, contexts: Sequence[EngineContext] | None = None) -> None:
        """Bring weights to the device: all of the bundle's store, or those that some contexts take.

        Raises:
            DamagedFileError: as `load_store`.
        """
        if self._files.manifest.layout == "shared":
            store = self._files.file(f"{PLAN_FOLDER}/{STORE_NAME}")
            names = None if contexts is None else {name for context in contexts for name in context.inputs}
            self._weights = load_store(store, self._memory, names)

    def drop_weights(self) -> None:
        """Give the weights' memory back."""
        self._weights = {}

    def bind_weights(self, context: EngineContext) -> None:
        """Bind a context's weights and slots for LoRAs, once and for all steps."""
        for name, tensor in (*self._weights.items(), *self._loras.items()):
            if name in context.inputs:
                context.bind(name, tensor.data_ptr())

    def set_loras(self, matrices: Mapping[str, np.ndarray]) -> None:
        """Fill the slots for LoRAs, in place: what is bound stays bound."""
        import torch

        for name, tensor in self._loras.items():
            tensor.copy_(torch.from_numpy(matrices[name]))

    def bind_step(self, context: EngineContext, step: int, size: Size) -> None:
        """Bind positions, scales and the assignment of a step."""
        for name, tensor in self._positions_of(context, step, size).items():
            context.set_shape(name, tensor.shape)
            context.bind(name, tensor.data_ptr())
        self._steps.bind(context, step)
        if self._selector is not None:
            name, tensor = self._selector
            context.set_shape(name, (1, self._files.policy.step_assignments[step] + 1))
            context.bind(name, tensor.data_ptr())

    def _make_slots(self) -> dict[str, torch.Tensor]:
        import torch

        slots, base = self._files.manifest.lora_slots, getattr(torch, self._files.manifest.base_type)
        shapes = {} if slots is None else slots.shapes
        return {name: self._memory.empty(shape, base).zero_() for name, shape in shapes.items()}

    def _make_selector(self) -> tuple[str, torch.Tensor] | None:
        import torch

        inputs = (graph.selector_input for graph in self._files.index.graphs)
        signature = next(filter(None, inputs), None)
        if signature is None:
            return None
        return signature.name, self._memory.empty((1, len(self._files.policy.assignments)), torch.int32).zero_()

    def _positions_of(self, context: EngineContext, step: int, size: Size) -> dict[str, torch.Tensor]:
        import torch

        if size not in self._positions:
            stored = self._files.positions(self._files.cpu_graph(step), size)
            tensors = {}
            for name, value in stored.items():
                tensors[name] = self._memory.empty(value.shape, context.dtype(name))
                tensors[name].copy_(torch.from_numpy(value))
            self._positions[size] = tensors
        return self._positions[size]

    def clear(self) -> None:
        """Give the memory back."""
        self._weights, self._loras, self._positions, self._selector = {}, {}, {}, None
        self._steps.clear()


class _StepTable:
    """Scalar inputs of all steps: one row for each step, in which every scalar begins at an aligned address.

    A scale that no chosen branch of a step reads is 1.
    """

    def __init__(self, files: BundleFiles, memory: Memory) -> None:
        self._files, self._memory = files, memory
        self._tables: dict[torch.dtype, torch.Tensor] = {}
        names = {s.name for graph in files.index.graphs for s in graph.scale_inputs.values()}
        self._columns = {name: column for column, name in enumerate(sorted(names))}
        # Read by the library on the processor where branches depend on it.
        self._assignments = _aligned(np.asarray(files.policy.step_assignments, np.int32)[:, None])
        self._device_assignments: torch.Tensor | None = None

    def bind(self, context: EngineContext, step: int) -> None:
        for name in context.inputs:
            if name in self._columns:
                context.bind(name, self._table(context.dtype(name))[step, self._columns[name]].data_ptr())
            elif name == self._assignment_input:
                context.bind(name, self._assignment(context.on_host(name))[step, 0].data_ptr())

    @property
    def _assignment_input(self) -> str | None:
        inputs = (graph.assignment_input for graph in self._files.index.graphs)
        return next((signature.name for signature in inputs if signature is not None), None)

    def _table(self, dtype: torch.dtype) -> torch.Tensor:
        """[steps, scalars, slot] on the device; the first of a slot is the scalar."""
        if dtype not in self._tables:
            steps = self._files.policy.steps
            values = np.ones((steps, len(self._columns)), np.float32)
            for step in range(steps):
                for name, scale in self._files.scales(step).items():
                    values[step, self._columns[name]] = scale
            self._tables[dtype] = self._on_device(_aligned(values, dtype))
        return self._tables[dtype]

    def _assignment(self, on_host: bool) -> torch.Tensor:
        if on_host:
            return self._assignments
        if self._device_assignments is None:
            self._device_assignments = self._on_device(self._assignments)
        return self._device_assignments

    def _on_device(self, table: torch.Tensor) -> torch.Tensor:
        there = self._memory.empty(tuple(table.shape), table.dtype)
        return there.copy_(table)

    def clear(self) -> None:
        self._tables, self._device_assignments = {}, None


def _aligned(values: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Scalars [steps, scalars] as [steps, scalars, slot], a slot being as wide as addresses are aligned."""
    import torch

    scalars = torch.from_numpy(values).to(dtype or torch.int32)
    slots = torch.zeros(*scalars.shape, ALIGNMENT_BYTES // scalars.element_size(), dtype=scalars.dtype)
    slots[..., 0] = scalars
    return slots


def load_store(path: Path, memory: Memory, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """The store in device memory: as one block that keeps the file's alignment, or some of its weights by themselves.

    Args:
        path: of the store.
        memory: of the device, which aligns what it gives.
        names: of the weights; None for all. Others may be among them.

    Returns:
        Name → its bytes, uint8.

    Raises:
        DamagedFileError: truncated or not safetensors.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            pass  # the library has held the header to the file: what it says can be relied upon
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"'{path}' is not a complete safetensors file ({error}); {REBUILD}") from error

    content = np.memmap(path, np.uint8, "c")  # PyTorch warns of arrays that it cannot write to
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    host = torch.from_numpy(np.asarray(content[start:]))
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    if names is not None:
        wanted = {name: host[slice(*place)] for name, place in places.items() if name in names}
        return {name: memory.empty(tuple(part.shape), torch.uint8).copy_(part) for name, part in wanted.items()}
    block = memory.empty(tuple(host.shape), torch.uint8)
    block.copy_(host)
    return {name: block[begin:end] for name, (begin, end) in places.items()}
