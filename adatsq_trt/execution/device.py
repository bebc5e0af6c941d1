"""Units of work on another device of this machine, such as a GPU.

Whoever gives units out keeps the model there meanwhile; what else a unit is given goes there with it, and its result
comes back. Units compute where their tensors are, so they are the same functions as elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from adatsq_trt.errors import UserError
from adatsq_trt.execution import CommonT, ItemT, ResultT, Shared, T

if TYPE_CHECKING:
    import torch

AUTO, CPU, CUDA = "auto", "cpu", "cuda"


def parse_device(text: str) -> torch.device:
    """Read what follows `--device`.

    Args:
        text: "cpu", "cuda", "cuda:N", or "auto" for a CUDA GPU where PyTorch has one.

    Raises:
        UserError: not a device, or not one that PyTorch can use here.
    """
    kind, colon, number = text.partition(":")
    if kind not in (AUTO, CPU, CUDA) or (colon and (kind != CUDA or not number.isdecimal())):
        raise UserError(f"--device {text}: expected 'auto', 'cpu', 'cuda', or 'cuda:N' for the GPU of that number")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == CPU or (kind == AUTO and not count):
        return torch.device(CPU)
    if not count:
        raise UserError(
            f"--device {text}: PyTorch {torch.__version__} finds no CUDA GPU; run 'adatsq-trt doctor', which says why, "
            "or leave --device out to compute on the processor"
        )
    index = int(number) if colon else torch.cuda.current_device()
    if index >= count:
        raise UserError(f"--device {text}: the last GPU of this machine is cuda:{count - 1}; choose one that is there")
    return torch.device(CUDA, index)


class OnDevice:
    """One unit after another, on a device."""

    def __init__(self, device: torch.device) -> None:
        """Compute there; a model that units share has to be there.

        Args:
            device: not the processor, for which `InProcess` does without copies.
        """
        self.device = device

    def share(self, value: T) -> Shared[T]:
        """The value itself."""
        return Shared(value)

    def map(
        self,
        function: Callable[[CommonT, ItemT], ResultT],
        common: Shared[CommonT],
        items: Iterable[ItemT] | Iterable[Shared[ItemT]],
    ) -> Iterator[ResultT]:
        """Compute each unit when its result is asked for.

        Raises:
            UserError: the device's memory is too small.
        """
        import torch

        for item in items:
            # Kernels of our own are launched on the current GPU, wherever their tensors are.
            current = torch.cuda.device(self.device) if self.device.type == CUDA else nullcontext()
            with raise_on_oom(self.device), current:
                there = to_device(item.content if isinstance(item, Shared) else item, self.device)
                result = to_device(function(common.content, there), CPU)
            yield result


def free_bytes(gpu: torch.device) -> int:
    """Memory of a GPU that nothing uses, what PyTorch keeps for later included."""
    import torch

    kept = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    return torch.cuda.mem_get_info(gpu)[0] + kept


@contextmanager
def raise_on_oom(device: torch.device) -> Iterator[None]:
    """Say what to do when the memory of a device is too small.

    Raises:
        UserError: it is.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--device {device}: its memory is too small ({' '.join(str(error).split())[:160]}); use a smaller "
            "size, fewer --calibration-samples, --selection-samples and --held-out-samples, or --device cpu; the same "
            "command goes on where this one stopped"
        ) from error


def to_device(value: T, device: torch.device | str) -> T:
    """A value with its tensors on a device; what is there already is not copied.

    Args:
        value: tensors in tuples, lists, mappings (which become dictionaries) and dataclasses; other objects stay.
        device: target of the copies.
    """
    result: T = _Move(device)(value)
    return result


class _Move:
    """Copies values to a device; an object that is met in two places is copied once."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._done: dict[int, tuple[Any, Any]] = {}  # with the original, whose identity would else be given away

    def __call__(self, value: Any) -> Any:
        if id(value) not in self._done:
            self._done[id(value)] = value, self._copy(value)
        return self._done[id(value)][1]

    def _copy(self, value: Any) -> Any:
        import torch

        if isinstance(value, torch.Tensor):
            return value.to(self._device)
        if isinstance(value, tuple | list):
            return type(value)(self(member) for member in value)
        if isinstance(value, Mapping):
            return {key: self(member) for key, member in value.items()}
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{field.name: self(getattr(value, field.name)) for field in fields(value)})
        return value
