"""A double of a GPU's memory and stream: host memory stands for device memory, and every allocation is known.

Its tensors lie apart from the processor's: an operation that mixes the two fails. PyTorch is told that they are on the
"meta" device, the only other one that a build for processors admits; each holds its content beside that.
"""

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

ALIGNMENT = 256
STREAM = 0x57
DEVICE = torch.device("meta")
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class DeviceTensor(Tensor):
    """A tensor there.

    Attributes:
        content: of the processor.
    """

    content: Tensor

    @staticmethod
    def __new__(cls, content: Tensor) -> "DeviceTensor":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            content.size(),
            strides=content.stride(),
            storage_offset=content.storage_offset(),
            dtype=content.dtype,
            device=DEVICE,
        )
        tensor.content = content
        return tensor

    def data_ptr(self) -> int:
        """Where the content lies: a wrapper has no memory of its own."""
        return self.content.data_ptr()

    def tolist(self) -> Any:
        """Through the processor, as on a GPU; PyTorch refuses it of wrappers."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        settings = dict(kwargs or {})
        strangers = [
            leaf
            for leaf in tree_leaves((args, settings))
            if isinstance(leaf, Tensor) and not isinstance(leaf, DeviceTensor) and leaf.dim()
        ]
        if strangers and operation not in _COPIES:
            raise RuntimeError(f"{operation}: expected all tensors to be on one device, found two")
        device = settings.get("device")
        own_args, own_settings = tree_map_only(DeviceTensor, lambda tensor: tensor.content, (args, settings))
        if device is not None:
            own_settings["device"] = torch.device("cpu")
        result = operation(*own_args, **own_settings)
        if device is not None and torch.device(device).type == "cpu":
            return result
        if operation is torch.ops.aten.copy_.default:
            return args[0]
        wrapped = tree_map_only(Tensor, DeviceTensor, result)
        return return_and_correct_aliasing(operation, args, settings, wrapped)


class OnDevice(TorchDispatchMode):
    """Inside of it, what PyTorch is told to make or bring there becomes a tensor there, and not one without content."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        settings = dict(kwargs or {})
        device = settings.get("device")
        if device is None or torch.device(device) != DEVICE or any(_is_there(leaf) for leaf in tree_leaves(args)):
            return operation(*args, **settings)
        return tree_map_only(Tensor, DeviceTensor, operation(*args, **{**settings, "device": torch.device("cpu")}))


def _is_there(leaf: Any) -> bool:
    return isinstance(leaf, DeviceTensor)


class HostDevice:
    """What the runtime takes for a GPU.

    Attributes:
        device: PyTorch's name of the device.
        stream: its handle.
        synchronizations: how often it was waited for.
    """

    def __init__(self) -> None:
        self.device, self.stream = DEVICE, STREAM
        self.synchronizations = 0
        self._allocations: list[tuple[int, int, weakref.ref[np.ndarray]]] = []

    @contextmanager
    def work(self) -> Iterator[None]:
        yield

    def synchronize(self) -> None:
        self.synchronizations += 1

    def timed(self, enqueue: Callable[[], object]) -> float:
        began = time.perf_counter()
        enqueue()
        return 1e3 * (time.perf_counter() - began)

    def used_bytes(self) -> int:
        return sum(size for _, size, block in self._allocations if block() is not None)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory that knows when it is gone; filled with nonsense, as a GPU's is."""
        size = int(np.prod(shape, dtype=np.int64)) * torch.empty((), dtype=dtype).element_size()
        block = np.full(size + ALIGNMENT, 0xA5, np.uint8)
        start = -block.ctypes.data % ALIGNMENT
        content = torch.from_numpy(block[start : start + size]).view(dtype).view(shape)
        self._allocations.append((block.ctypes.data + start, size, weakref.ref(block)))
        return DeviceTensor(content)

    def require(self, address: int, size: int, name: str) -> None:
        """Make sure that so many bytes at an address are allocated now."""
        for begin, length, block in self._allocations:
            if begin <= address and address + size <= begin + length and block() is not None:
                return
        raise AssertionError(f"'{name}': {size} bytes at {address:#x} are not in memory that is allocated")


class Transfers(TorchDispatchMode):
    """Counts the bytes that cross the border between the processor and the device.

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
        before = isinstance(tensors[0], DeviceTensor) if tensors else False
        result = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten.copy_.default and isinstance(args[1], torch.Tensor):
            self._count(isinstance(args[1], DeviceTensor), isinstance(args[0], DeviceTensor), args[1])
        elif operation is torch.ops.aten._to_copy.default:
            self._count(before, isinstance(result, DeviceTensor), result)
        elif operation is torch.ops.aten._local_scalar_dense.default and before:
            self.to_host += tensors[0].element_size()
        return result

    def _count(self, from_device: bool, to_device: bool, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if from_device and not to_device:
            self.to_host += size
        elif to_device and not from_device:
            self.to_device += size
