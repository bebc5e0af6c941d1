"""The one type of everything that a model's graphs do not quantize, and the weights that are exempt from it.

Weights are rounded to it once, when the model is loaded (`models.declared`); graphs then hold what was searched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Literal

from adatsq_trt.errors import UnsupportedFormatError
from adatsq_trt.formats import target_named

if TYPE_CHECKING:
    from torch import nn

BaseName = Literal["bfloat16", "float16", "float32"]


def base_type(targets: Iterable[str], formats: Collection[str], simulate: bool) -> BaseName:
    """float32 for the processor alone; else float16 where that is a candidate format, and bfloat16.

    All targets share it, and so does the processor beside a GPU: they share the weights.

    Args:
        targets: names of the targets.
        formats: names of the candidate formats.
        simulate: whether the targets are left out.
    """
    if not simulate and all(target_named(name).compute_capability is None for name in targets):
        return "float32"
    return "float16" if "fp16" in formats else "bfloat16"


def require_one_type(formats: Iterable[str]) -> None:
    """Refuse candidates that cannot share a graph's type.

    Raises:
        UnsupportedFormatError: bfloat16 and float16 are both among them.
    """
    names = {"bf16", "fp16"}
    if names <= set(formats):
        raise UnsupportedFormatError(
            "--formats with both bf16 and fp16: a model has one 16-bit type for all that is not quantized, and its "
            "weights are rounded to that; leave one of them out"
        )


def keeps_float32(module: nn.Module, parameter: str) -> bool:
    """Whether diffusers keeps a parameter in float32 when it loads the model in 16 bits.

    Args:
        module: a trace module, whose children are diffusers' models; or several as its children.
        parameter: its path in there.
    """
    models = [model for child in module.children() for model in (child, *child.children())]
    kept = [name for model in models for name in getattr(model, "_keep_in_fp32_modules", None) or ()]
    return any(part in kept for part in parameter.split("."))
