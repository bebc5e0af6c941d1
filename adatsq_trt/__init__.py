"""Timestep-aware mixed precision for diffusion transformers, down to TensorRT engines.

    import adatsq_trt

    bundle = adatsq_trt.build("digits-flux", target="sm120", steps=20)
    pipe.transformer = bundle.transformer()

Everything in `__all__` is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adatsq_trt.api import build as build
    from adatsq_trt.api import calibrate as calibrate
    from adatsq_trt.api import check as check
    from adatsq_trt.api import export_onnx as export_onnx
    from adatsq_trt.api import load as load
    from adatsq_trt.api import quantize as quantize
    from adatsq_trt.api import search_policy as search_policy
    from adatsq_trt.config import BuildConfig as BuildConfig
    from adatsq_trt.errors import AdatsqError as AdatsqError
    from adatsq_trt.errors import BudgetError as BudgetError
    from adatsq_trt.errors import CancelledError as CancelledError
    from adatsq_trt.errors import DamagedFileError as DamagedFileError
    from adatsq_trt.errors import DependencyError as DependencyError
    from adatsq_trt.errors import MismatchError as MismatchError
    from adatsq_trt.errors import MissingFileError as MissingFileError
    from adatsq_trt.errors import OutputError as OutputError
    from adatsq_trt.errors import UnknownNameError as UnknownNameError
    from adatsq_trt.errors import UnsupportedFormatError as UnsupportedFormatError
    from adatsq_trt.errors import UserError as UserError
    from adatsq_trt.models.families import register_family as register_family
    from adatsq_trt.models.family import Canvas as Canvas
    from adatsq_trt.models.family import Family as Family
    from adatsq_trt.models.prompted import PromptedAdapter as PromptedAdapter
    from adatsq_trt.policy import Policy as Policy
    from adatsq_trt.progress import Progress as Progress
    from adatsq_trt.results import Bundle as Bundle
    from adatsq_trt.results import Calibration as Calibration
    from adatsq_trt.results import ExportedGraphs as ExportedGraphs
    from adatsq_trt.results import QuantizedWeights as QuantizedWeights
    from adatsq_trt.results import SearchedPolicy as SearchedPolicy
    from adatsq_trt.schedule import make_schedule as make_schedule
    from adatsq_trt.transformer_call import TransformerCall as TransformerCall
    from adatsq_trt.transformer_call import forward_arguments as forward_arguments

__version__ = "0.3.0"

_HOMES = {
    "adatsq_trt.api": ("build", "calibrate", "check", "export_onnx", "load", "quantize", "search_policy"),
    "adatsq_trt.config": ("BuildConfig",),
    "adatsq_trt.errors": (
        "AdatsqError",
        "BudgetError",
        "CancelledError",
        "DamagedFileError",
        "DependencyError",
        "MismatchError",
        "MissingFileError",
        "OutputError",
        "UnknownNameError",
        "UnsupportedFormatError",
        "UserError",
    ),
    "adatsq_trt.models.families": ("register_family",),
    "adatsq_trt.models.family": ("Canvas", "Family"),
    "adatsq_trt.models.prompted": ("PromptedAdapter",),
    "adatsq_trt.policy": ("Policy",),
    "adatsq_trt.progress": ("Progress",),
    "adatsq_trt.results": ("Bundle", "Calibration", "ExportedGraphs", "QuantizedWeights", "SearchedPolicy"),
    "adatsq_trt.schedule": ("make_schedule",),
    "adatsq_trt.transformer_call": ("TransformerCall", "forward_arguments"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'adatsq_trt' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
