"""A model's weights in its declared type: rounded once, so that what is measured is what graphs hold.

Graphs hold all weights that are not quantized in one type (`base_type`). A checkpoint in float32, or in the other
16-bit type, has numbers between those of that type; a model that computed with them would be another than the one that
is exported. Weights that will be quantized are rounded too: full precision then means one model, the reference graph,
whichever layers a policy quantizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adatsq_trt.base_type import keeps_float32
from adatsq_trt.errors import MismatchError
from adatsq_trt.models.stored import MappedLinear


@dataclass(frozen=True)
class Rounding:
    """Changes that rounding made to a model.

    Attributes:
        dtype: the declared type.
        originals: parameters that changed, each with the numbers that it had, float32.
        stored: layers whose stored weights are rounded whenever they are read.
    """

    dtype: torch.dtype
    originals: tuple[tuple[nn.Parameter, Tensor], ...] = ()
    stored: tuple[MappedLinear, ...] = ()

    @property
    def changes_nothing(self) -> bool:
        """Whether the type is known to hold all weights as they were."""
        return not self.originals and not self.stored

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Inside the block the model has the checkpoint's own numbers."""
        rounded = [parameter.data for parameter, _ in self.originals]
        try:
            for parameter, original in self.originals:
                parameter.data = original
            for layer in self.stored:
                layer.declared = None
            yield
        finally:
            for (parameter, _), values in zip(self.originals, rounded, strict=True):
                parameter.data = values
            for layer in self.stored:
                layer.declared = self.dtype


@torch.no_grad()
def declare_type(module: nn.Module, dtype: torch.dtype) -> Rounding:
    """Round a model's weights, in place, to the numbers of a type; they stay float32.

    Buffers, and the weights that diffusers keeps in float32, are left alone, as in the graphs.

    Args:
        module: a trace module with float32 parameters; layers may be stored.
        dtype: bfloat16, float16 or float32.

    Raises:
        MismatchError: a weight is too large for the type.
    """
    originals, stored = list[tuple[nn.Parameter, Tensor]](), list[MappedLinear]()
    for name, parameter in module.named_parameters():
        if keeps_float32(module, name):
            continue
        rounded = parameter.detach().to(dtype).to(parameter.dtype)
        if not torch.equal(rounded, parameter):
            originals.append((parameter, parameter.detach()))
            _require_finite(rounded, parameter, name, dtype)
            parameter.data = rounded
    for path, layer in module.named_modules():
        if isinstance(layer, MappedLinear) and not keeps_float32(module, f"{path}.weight") and layer.differs(dtype):
            stored.append(layer)
            if dtype is torch.float16:  # a copy of each weight: only where the type is narrower than those of files
                _require_finite(layer.weight.to(dtype), layer.weight, f"{path}.weight", dtype)
            layer.declared = dtype
    return Rounding(dtype, tuple(originals), tuple(stored))


def _require_finite(rounded: Tensor, weight: Tensor, name: str, dtype: torch.dtype) -> None:
    if bool((weight.isfinite() & ~rounded.isfinite()).any()):  # weights that are NaN already are named elsewhere
        raise MismatchError(
            f"'{name}' reaches {float(weight.abs().max()):.4g}, and the graphs would hold it in "
            f"{str(dtype).removeprefix('torch.')}, which ends at {torch.finfo(dtype).max:.4g}; name bf16 instead of "
            "fp16 in --formats"
        )
