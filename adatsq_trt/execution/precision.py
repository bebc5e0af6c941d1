"""Units of work in bfloat16: on an H200 a call of Flux-dev takes a seventh of the time that it takes in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from adatsq_trt.execution import CommonT, Executor, ItemT, ResultT, Shared, T


class Bfloat16:
    """Workers whose units compute under PyTorch's autocast; what needs float32 inside of a unit asks for it."""

    def __init__(self, executor: Executor, device: str) -> None:
        """Compute with these.

        Args:
            executor: who computes.
            device: PyTorch's name of the kind of device that they compute on.
        """
        self._executor, self._device = executor, device

    def share(self, value: T) -> Shared[T]:
        """As the workers do it."""
        return self._executor.share(value)

    def map(
        self,
        function: Callable[[CommonT, ItemT], ResultT],
        common: Shared[CommonT],
        items: Iterable[ItemT] | Iterable[Shared[ItemT]],
    ) -> Iterator[ResultT]:
        """As the workers do it."""
        return self._executor.map(partial(_compute, function, self._device), common, items)


def _compute(function: Callable[[CommonT, ItemT], ResultT], device: str, common: CommonT, item: ItemT) -> ResultT:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # Not cuDNN's attention, PyTorch's first choice in bfloat16: backwards through Flux it fails (decision 0031). This
    # holds for the process, so threads, which are for the processor, leave it alone.
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    attention = sdpa_kernel(kernels, set_priority=True) if device == "cuda" else nullcontext()
    with torch.autocast(device, torch.bfloat16), attention:
        return function(common, item)


@contextmanager
def exact(device: str) -> Iterator[None]:
    """No bfloat16 here; on a GPU matrix products may round their factors to TensorFloat-32, ten bits of mantissa.

    Small differences of large numbers, such as what rounding changes of a layer's output, need more than bfloat16's
    seven bits. Outside of autocast nothing changes.

    Args:
        device: PyTorch's name of the kind of device.
    """
    import torch

    if not torch.is_autocast_enabled(device):
        yield
        return
    before = torch.get_float32_matmul_precision()
    try:
        if device == "cuda":
            torch.set_float32_matmul_precision("high")
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
