"""A GPU as the runtime of plans uses it: where tensors lie, its one stream, and waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adatsq_trt.errors import DependencyError

if TYPE_CHECKING:
    import torch


def gpu_is_here() -> bool:
    """Whether there is an NVIDIA driver with a GPU; PyTorch may still not see it."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return bool(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return False


def gpu_name() -> str:
    """Name of this machine's GPU and version of its driver: kernels compiled for one are of no use to another.

    Raises:
        DependencyError: PyTorch sees no GPU.
    """
    gpu_capability()
    import pynvml
    import torch

    pynvml.nvmlInit()
    return f"{torch.cuda.get_device_name()}, driver {pynvml.nvmlSystemGetDriverVersion()}"


def gpu_capability() -> int:
    """Compute capability of this machine's GPU, such as 120.

    Raises:
        DependencyError: PyTorch sees no GPU.
    """
    try:
        import torch
    except ImportError as error:
        raise DependencyError("PyTorch is not installed; run: pip install torch, in a CUDA build") from error
    if not torch.cuda.is_available():
        raise DependencyError(
            "plans and CUDA run on a GPU only and PyTorch sees none; use them where a GPU, its driver and a CUDA build "
            "of PyTorch are, or use backend 'onnxruntime'"
        )
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


class CudaDevice:
    """The current GPU with a stream of its own: whole graphs cannot be captured on the default stream.

    Attributes:
        device: as PyTorch calls it.
    """

    def __init__(self) -> None:
        """Make the stream."""
        import torch

        self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self.device)

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream.cuda_stream)

    @contextmanager
    def work(self) -> Iterator[None]:
        """Enqueue on the stream: after what the caller has enqueued, and before what it enqueues next."""
        import torch

        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)

    def synchronize(self) -> None:
        """Wait for all that is enqueued; raises what went wrong there."""
        self._stream.synchronize()

    def timed(self, enqueue: Callable[[], object]) -> float:
        """Milliseconds that the stream takes for what is enqueued, by its own events; waits for the end."""
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with self.work():
            start.record(self._stream)
            enqueue()
            end.record(self._stream)
        end.synchronize()
        return float(start.elapsed_time(end))

    def used_bytes(self) -> int:
        """Memory of the card that is in use, by whatever process."""
        import torch

        free, total = torch.cuda.mem_get_info(self.device)
        return int(total - free)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory there; PyTorch's allocator aligns it to 512 bytes."""
        import torch

        return torch.empty(shape, dtype=dtype, device=self.device)
