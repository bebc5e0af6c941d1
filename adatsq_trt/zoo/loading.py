"""Load a model of the zoo: a folder in diffusers' layout, with a text encoder or a class embedding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin
from pydantic import JsonValue, RootModel
from torch import nn

from adatsq_trt.errors import DamagedFileError
from adatsq_trt.files import read_json_model, read_tensors, sha256
from adatsq_trt.image import ImageShape, PixelScale
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.declared import Rounding
from adatsq_trt.models.families import families, family_of_transformer
from adatsq_trt.models.prompted import PromptedAdapter
from adatsq_trt.models.prompts import ClassEncoder, PromptEncoder, TextEncoder
from adatsq_trt.models.stored import EmptyOnMeta
from adatsq_trt.zoo import TextEncoderConfig, ZooIndex, find_model

INDEX = Path("model_index.json")
TRANSFORMER_WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"
TRANSFORMER_CONFIG = Path("transformer") / "config.json"
SCHEDULER_CONFIG = Path("scheduler") / "scheduler_config.json"
CLASS_EMBEDDING = Path("class_embedding") / "model.safetensors"
TEXT_ENCODER = Path("text_encoder") / "model.safetensors"
TEXT_ENCODER_CONFIG = Path("text_encoder") / "config.json"
_TRAINING_RECORD = "training.json"
_ADVICE = "install the package again"


class _Config(RootModel[dict[str, JsonValue]]):
    """Any JSON object: what is in it is diffusers' business."""


@dataclass(frozen=True)
class LoadedModel:
    """A model and what a run needs to know of it.

    Attributes:
        name: as the user wrote it.
        adapter: the model.
        weights_sha256: hash of the transformer's weight file.
        model_sha256: hash of all its configurations and weights.
        default_steps: denoising steps when none are asked for.
        default_guidance: guidance scale when none is asked for.
        scale: from its images to pixels.
        vae: folder of the VAE that decodes its latents, if there is one.
        rounding: of its weights to the type that graphs hold; to float32 as long as they are as the files have them.
    """

    name: str
    adapter: ModelAdapter
    weights_sha256: str
    model_sha256: str
    default_steps: int
    default_guidance: float
    scale: PixelScale
    vae: Path | None = None
    rounding: Rounding = Rounding(torch.float32)  # noqa: RUF009  (frozen)


def load_model(name: str) -> LoadedModel:
    """Load a zoo model in float32.

    Raises:
        UnknownNameError: no such model.
        MissingFileError: one of its files is not there.
        DamagedFileError: one of its files is truncated or altered.
    """
    folder = find_model(name)
    index = read_json_model(folder / INDEX, ZooIndex, _ADVICE)
    kind = _adapter(folder / INDEX, index)
    transformer = _transformer(folder, kind)
    encoder = _encoder(folder, index, transformer.config[kind.text_width])
    read_json_model(folder / SCHEDULER_CONFIG, _Config, _ADVICE)
    with _refusing(folder / SCHEDULER_CONFIG):
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        image = ImageShape(
            index.image_size // index.patch_size,
            transformer.config.in_channels // index.patch_size**2,
            index.patch_size,
            frames=index.frames,
        )
        adapter = kind(transformer, encoder, scheduler, image, index.guidance_distilled)
        adapter.schedule(index.default_steps)  # some settings are first looked at here
    with _refusing(folder / TRANSFORMER_CONFIG), torch.no_grad():  # and some in a prediction
        adapter.velocity(torch.zeros(1, *adapter.latent_shape), 1.0, adapter.encode([0]), index.default_guidance)
    return LoadedModel(
        name,
        adapter,
        sha256(folder / TRANSFORMER_WEIGHTS),
        model_sha256(folder),
        index.default_steps,
        index.default_guidance,
        PixelScale(index.patch_size),
    )


def model_sha256(folder: Path) -> str:
    """Hash over the names and contents of a model's JSON and safetensors files, but for the record of its training."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        if path.suffix in (".json", ".safetensors") and name != _TRAINING_RECORD:
            digest.update(f"{name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def _adapter(file: Path, index: ZooIndex) -> type[PromptedAdapter]:
    family = family_of_transformer(index.transformer[1])
    if family is None:
        known = ", ".join(family.transformer for family in families())
        raise DamagedFileError(
            f"'{file}' names the transformer '{index.transformer[1]}', expected one of {known}; {_ADVICE}"
        )
    return family.adapter


def _transformer(folder: Path, kind: type[PromptedAdapter]) -> ModelMixin:
    """The transformer, frozen, in float32: diffusers' class with the tensors of its file."""
    weights, config = folder / TRANSFORMER_WEIGHTS, folder / TRANSFORMER_CONFIG
    tensors = read_tensors(weights, _ADVICE)
    settings = read_json_model(config, _Config, _ADVICE).root
    with _refusing(config):
        with EmptyOnMeta():
            transformer: ModelMixin = kind.model_class.from_config(settings)
        given = {name: tensor.float() for name, tensor in tensors.items()}
        found = transformer.load_state_dict(given, strict=False, assign=True)
    odd = sorted({*found.missing_keys, *found.unexpected_keys})
    if odd:
        raise DamagedFileError(f"'{weights}' and '{config}' do not go together: '{odd[0]}' is in one only; {_ADVICE}")
    return transformer.eval().requires_grad_(False)


def _encoder(folder: Path, index: ZooIndex, width: int) -> PromptEncoder:
    encoder = (
        _class_encoder(folder / CLASS_EMBEDDING, width) if index.text_encoder is None else _text_encoder(folder, width)
    )
    return encoder.requires_grad_(False)


def _text_encoder(folder: Path, width: int) -> TextEncoder:
    config = read_json_model(folder / TEXT_ENCODER_CONFIG, TextEncoderConfig, _ADVICE)
    tensors = read_tensors(folder / TEXT_ENCODER, _ADVICE)
    with _refusing(folder / TEXT_ENCODER):
        encoder = TextEncoder(config.words, config.prompts, config.text_tokens, width)
        encoder.load_state_dict(tensors)
    with _refusing(folder / TEXT_ENCODER_CONFIG):
        encoder.word_indices(config.prompts)
    return encoder


def _class_encoder(file: Path, width: int) -> ClassEncoder:
    tensors = read_tensors(file, _ADVICE)
    shape = tuple(tensors["weight"].shape) if "weight" in tensors else None
    if shape is None or len(shape) != 2 or shape[1] != width:
        got = f"'weight' of shape {shape}" if shape else f"no tensor 'weight' but {sorted(tensors)}"
        raise DamagedFileError(f"'{file}' holds {got}, expected 'weight' of shape (classes + 1, {width}); {_ADVICE}")
    return ClassEncoder(nn.Embedding.from_pretrained(tensors["weight"].float()))


@contextmanager
def _refusing(file: Path) -> Iterator[None]:
    """Say which file it was; what diffusers raises on altered settings depends on the setting."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DamagedFileError(f"'{file}' does not describe this model ({reason}); {_ADVICE}") from error
