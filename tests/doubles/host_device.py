"""A double of a GPU's memory and stream: host memory stands for device memory, and every allocation is known.

Tensors are of tests/workers/pretend_device.py, so that an operation that mixes them with the processor's fails.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.workers.pretend_device import PretendTensor, pretend_device

ALIGNMENT = 256
STREAM = 0x57


class HostDevice:
    """What the runtime takes for a GPU.

    Attributes:
        device: the pretended one.
        stream: its handle.
        synchronizations: how often it was waited for.
    """

    def __init__(self) -> None:
        self.device, self.stream = pretend_device(), STREAM
        self.synchronizations = 0
        self._allocations: list[tuple[int, int, weakref.ref[np.ndarray]]] = []

    @contextmanager
    def work(self) -> Iterator[None]:
        yield

    def synchronize(self) -> None:
        self.synchronizations += 1

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory that knows when it is gone; filled with nonsense, as a GPU's is."""
        size = int(np.prod(shape, dtype=np.int64)) * torch.empty((), dtype=dtype).element_size()
        block = np.full(size + ALIGNMENT, 0xA5, np.uint8)
        start = -block.ctypes.data % ALIGNMENT
        content = torch.from_numpy(block[start : start + size]).view(dtype).view(shape)
        self._allocations.append((block.ctypes.data + start, size, weakref.ref(block)))
        return PretendTensor(content)

    def require(self, address: int, size: int, name: str) -> None:
        """Make sure that so many bytes at an address are allocated now."""
        for begin, length, block in self._allocations:
            if begin <= address and address + size <= begin + length and block() is not None:
                return
        raise AssertionError(f"'{name}': {size} bytes at {address:#x} are not in memory that is allocated")


class Transfers(TorchDispatchMode):
    """Counts the bytes that cross the border between the processor and the pretended device.

    Attributes:
        to_device: bytes.
        to_host: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.to_device = self.to_host = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        before = isinstance(tensors[0], PretendTensor) if tensors else False
        result = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten.copy_.default and isinstance(args[1], torch.Tensor):
            self._count(isinstance(args[1], PretendTensor), isinstance(args[0], PretendTensor), args[1])
        elif operation is torch.ops.aten._to_copy.default:
            self._count(before, isinstance(result, PretendTensor), result)
        elif operation is torch.ops.aten._local_scalar_dense.default and before:
            self.to_host += tensors[0].element_size()
        return result

    def _count(self, from_device: bool, to_device: bool, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if from_device and not to_device:
            self.to_host += size
        elif to_device and not from_device:
            self.to_device += size
