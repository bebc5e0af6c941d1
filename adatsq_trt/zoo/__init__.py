"""Small trained models that ship with the package, and how they were trained."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field

from adatsq_trt.errors import UnknownNameError

ZOO_FOLDER = Path(__file__).parent / "weights"


def zoo_models() -> dict[str, Path]:
    """Name → folder of every model that ships with the package."""
    return {path.parent.name: path.parent for path in sorted(ZOO_FOLDER.glob("*/model_index.json"))}


def find_model(name: str) -> Path:
    """Folder of a zoo model.

    Raises:
        UnknownNameError: no such model.
    """
    models = zoo_models()
    if name not in models:
        raise UnknownNameError("model", name, models)
    return models[name]


class ZooIndex(BaseModel):
    """What is read of a zoo model's `model_index.json`.

    Attributes:
        transformer: library and class of the transformer.
        image_size: height and width in pixels, even.
        default_steps: denoising steps when none are asked for.
        default_guidance: classifier-free guidance scale when none is asked for.
    """

    transformer: tuple[str, str]
    image_size: int = Field(ge=2, multiple_of=2)
    default_steps: int = Field(ge=1)
    default_guidance: float = Field(allow_inf_nan=False)
