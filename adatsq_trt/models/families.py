"""The families of models that are known: a file each, and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from adatsq_trt.errors import MismatchError
from adatsq_trt.models.chroma import ChromaFamily
from adatsq_trt.models.family import Family
from adatsq_trt.models.flux import FluxFamily
from adatsq_trt.models.flux_2 import Flux2Family, Flux2KleinFamily
from adatsq_trt.models.flux_images import FluxFillFamily, FluxKontextFamily
from adatsq_trt.models.hunyuan_video_15 import HunyuanVideo15Family
from adatsq_trt.models.ltx import LTXFamily
from adatsq_trt.models.qwen_image import QwenImageFamily
from adatsq_trt.models.qwen_image_edit import QwenImageEditFamily, QwenImageEditPlusFamily
from adatsq_trt.models.stable_diffusion_3 import StableDiffusion3Family
from adatsq_trt.models.wan import WanFamily
from adatsq_trt.models.wan_images import WanImageFamily
from adatsq_trt.models.z_image import ZImageFamily
from adatsq_trt.schedule import EULER

_FAMILIES: list[Family] = [
    FluxFamily(),
    ZImageFamily(),
    WanFamily(),
    QwenImageFamily(),
    StableDiffusion3Family(),
    HunyuanVideo15Family(),
    FluxKontextFamily(),
    FluxFillFamily(),
    WanImageFamily(),
    QwenImageEditFamily(),
    QwenImageEditPlusFamily(),
    Flux2Family(),
    Flux2KleinFamily(),
    ChromaFamily(),
    LTXFamily(),
]


def register_family(family: Family) -> None:
    """Make a family known to this process; it takes the place of one with the same pipeline.

    Args:
        family: its pipeline, and the adapter of its transformer.

    Raises:
        MismatchError: not a family, or one whose options of schedulers do not name the class.
    """
    if not isinstance(family, Family):
        raise MismatchError(
            f"got {family!r}, expected an object of a class that derives from Family; see docs/adapters.md"
        )
    for scheduler, options in family.scheduler_options.items():
        if not isinstance(options, Mapping):
            raise MismatchError(
                f"{type(family).__name__}.scheduler_options: got '{scheduler}' → {options!r}, expected a class of "
                f"schedulers and its options, such as '{EULER}' → {{'use_dynamic_shifting': False}}"
            )
    _FAMILIES[:] = [*(known for known in _FAMILIES if known.pipeline != family.pipeline), family]


def families() -> tuple[Family, ...]:
    """All that are known."""
    return tuple(_FAMILIES)


def known_families() -> str:
    """All that are known, as messages name them: pipelines with their transformers."""
    return ", ".join(f"{family.pipeline} ({family.transformer})" for family in _FAMILIES)


def family_of_pipeline(name: object) -> Family | None:
    """The family with a pipeline of this class name."""
    return next((family for family in _FAMILIES if family.pipeline == name), None)


def family_of_transformer(name: object) -> Family | None:
    """The first family with a transformer of this class name."""
    return next((family for family in _FAMILIES if family.transformer == name), None)
