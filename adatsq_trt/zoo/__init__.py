"""Small trained models that ship with the package, and how they were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from adatsq_trt.errors import UnknownNameError
from adatsq_trt.files import read_json_model

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


class ModelRow(BaseModel):
    """One model of the zoo.

    Attributes:
        name: as commands take it.
        architecture: diffusers class of the transformer.
        image_size: height and width in pixels.
        frames: of a video; None for images.
        weight_bytes: size of all its safetensors.
        default_steps: denoising steps when none are asked for.
        default_guidance: guidance scale when none is asked for.
        folder: its folder, in diffusers' layout.
    """

    name: str
    architecture: str
    image_size: int
    frames: int | None
    weight_bytes: int
    default_steps: int
    default_guidance: float
    folder: str


def list_models() -> list[ModelRow]:
    """All models of the zoo.

    Raises:
        DamagedFileError: a model's index is truncated or altered.
    """
    return [_row(name, folder) for name, folder in zoo_models().items()]


def _row(name: str, folder: Path) -> ModelRow:
    index = read_json_model(folder / "model_index.json", ZooIndex)
    return ModelRow(
        name=name,
        architecture=index.transformer[1],
        image_size=index.image_size,
        frames=index.frames,
        weight_bytes=sum(path.stat().st_size for path in folder.rglob("*.safetensors")),
        default_steps=index.default_steps,
        default_guidance=index.default_guidance,
        folder=str(folder),
    )
