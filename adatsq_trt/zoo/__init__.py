"""Small trained models that ship with the package, and how they were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
    """The fields of a zoo model's `model_index.json` that are read.

    Attributes:
        transformer: library and class of the transformer.
        text_encoder: module and class of the text encoder; without one there is a class embedding.
        image_size: height and width in pixels, a multiple of the patch size.
        patch_size: height and width in pixels of a place of the latent.
        frames: of a video; None for images.
        guidance_distilled: the model needs no second branch for guidance.
        default_steps: denoising steps when none are asked for.
        default_guidance: guidance scale when none is asked for.
    """

    transformer: tuple[str, str]
    text_encoder: tuple[str, str] | None = None
    image_size: int = Field(ge=2)
    patch_size: int = Field(default=2, ge=1)
    frames: int | None = Field(default=None, ge=1)
    guidance_distilled: bool = False
    default_steps: int = Field(ge=1)
    default_guidance: float = Field(allow_inf_nan=False)

    @model_validator(mode="after")
    def _whole_patches(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        return self


class TextEncoderConfig(BaseModel):
    """`config.json` of a zoo model's text encoder.

    Attributes:
        words: the vocabulary; word 0 is the empty one.
        prompts: sentences that a bundle can be asked for.
        text_tokens: most words of a sentence.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    words: tuple[str, ...]
    prompts: tuple[str, ...] = Field(min_length=1)
    text_tokens: int = Field(ge=1)
