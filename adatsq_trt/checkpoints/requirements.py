"""Requirements of a checkpoint that can be told before its weights are loaded, and the size that is drawn."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from adatsq_trt.checkpoints.images import ImageSet, image_size
from adatsq_trt.checkpoints.lora import Lora
from adatsq_trt.checkpoints.source import Source
from adatsq_trt.errors import MismatchError, UserError
from adatsq_trt.files import read_json_model
from adatsq_trt.models.family import AGAIN, Canvas, Family, JsonObject
from adatsq_trt.models.image_condition import ReadImage
from adatsq_trt.schedule import FIRST_EXPERT, SECOND_EXPERT
from adatsq_trt.settings import PipelineSettings

log = logging.getLogger(__name__)


def require_configs(source: Source) -> None:
    """Refuse transformers that are quantized already, and experts that differ in more than their weights.

    Raises:
        MismatchError: names the file and what it says.
    """
    first, *others = (read_json_model(file, JsonObject, AGAIN).root for file in source.configs)
    for file, config in zip(source.configs, (first, *others), strict=True):
        quantized = config.get("quantization_config")
        if quantized is not None:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise MismatchError(
                f"'{file}' is of a model that is quantized already ({method}); give the checkpoint in 16 or 32 bits"
            )
    for other in others:
        _require_alike(source, first, other)


def _require_alike(source: Source, first: Mapping[str, JsonValue], other: Mapping[str, JsonValue]) -> None:
    for option in sorted({*first, *other}):
        if not option.startswith("_") and first.get(option) != other.get(option):
            raise MismatchError(
                f"'{source.folder}': {option} is {first.get(option)!r} in '{FIRST_EXPERT}' and "
                f"{other.get(option)!r} in '{SECOND_EXPERT}', expected two transformers that differ in their "
                f"weights alone; {source.family.instead}"
            )


def require_named(source: Source, loras: Sequence[Lora]) -> None:
    """Refuse a LoRA that does not say which of two transformers it changes, as its file does not, or that need not.

    Raises:
        UserError: names the file.
    """
    several = source.boundary_ratio is not None
    for lora in loras:
        if several and not lora.expert:
            raise UserError(
                f"--lora '{lora.file}': '{source.name}' has two transformers, and the file does not say which of them "
                f"it is for; write {FIRST_EXPERT}={lora.file} or {SECOND_EXPERT}={lora.file}"
            )
        if lora.expert and not several:
            raise UserError(
                f"--lora '{lora}': '{source.name}' has one transformer; write {lora.file}:{lora.scale:g} without a name"
            )


def require_prompts(family: Family, settings: PipelineSettings) -> None:
    """Refuse encodings of a text where they are not all that the transformer is given of it.

    Raises:
        UserError: encodings for a family whose pipeline makes masks.
    """
    if family.text_mask and settings.encodings is not None:
        raise UserError(
            f"--encodings '{settings.encodings}': a {family.pipeline} gives its transformer a mask of its own beside "
            "the tokens, which such a file cannot hold; give the prompts instead (--prompts)"
        )


def require_images(family: Family, settings: PipelineSettings, images: ImageSet, canvas: Canvas) -> None:
    """Refuse images that the pipeline does not take, and say which are not drawn.

    Raises:
        UserError: a folder of images for a model of text alone, images of another size than the pipeline draws, or
            encodings of prompts without their images.
    """
    prompts, condition = len(settings.prompts), family.image_condition
    if condition is None:
        if settings.images is not None:
            raise UserError(
                f"--images '{settings.images}': a {family.pipeline} takes no image beside the prompt; leave it out"
            )
        return
    if isinstance(condition, ReadImage):
        if settings.encodings is not None:
            raise UserError(
                f"--encodings '{settings.encodings}': the text encoder of a {family.pipeline} sees the image that goes "
                "with each prompt; leave it out, and pass --prompts and --images"
            )
        condition.require_canvas(canvas)
        for file, _ in images.files[:prompts]:
            condition.require_size(f"--images: '{file}'", image_size(file), canvas)
    if len(images.files) > prompts:
        log.warning(
            "--images: the first %d of %d images are drawn, one with each prompt; more with --prompts",
            prompts,
            len(images.files),
        )


def fitting_canvas(settings: PipelineSettings, source: Source) -> Canvas:
    """Return the size that was asked for, or the pipeline's.

    Raises:
        UserError: it does not fit the transformer's tokens or the VAE's cells.
    """
    family, scale = source.family, source.family.vae_scale(source.folder)
    multiple = family.patch * scale.pixels
    usual = family.pipeline_canvas(read_json_model(source.config, JsonObject, AGAIN).root)
    height, width = settings.height or usual.height, settings.width or usual.width
    for option, value in (("--height", height), ("--width", width)):
        if value % multiple:
            raise UserError(
                f"{option} {value}: expected a multiple of {multiple} pixels for '{source.name}'; pass "
                f"{option} {max(value // multiple, 1) * multiple}"
            )
    frames = settings.frames or usual.frames
    if scale.frames is None and frames is not None:
        raise UserError(f"--frames {frames}: '{source.name}' draws pictures; leave --frames out")
    if scale.frames is not None and frames is not None and frames % scale.frames != 1 % scale.frames:
        raise UserError(
            f"--frames {frames}: expected 1 more than a multiple of {scale.frames} for '{source.name}'; pass --frames "
            f"{max(frames // scale.frames, 1) * scale.frames + 1}"
        )
    return Canvas(height, width, frames)
