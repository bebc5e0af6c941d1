"""The image that a bundle is shown beside the prompt, and who cannot be given one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from pathlib import Path

from torch import Tensor
from torch.nn import functional

from adatsq_trt.checkpoints.images import encode_images, load_image_pipeline, read_image
from adatsq_trt.checkpoints.loading import silence
from adatsq_trt.checkpoints.prompts import encode_prompts
from adatsq_trt.checkpoints.source import INDEX, Source
from adatsq_trt.engines.bundle import VAE_FOLDER, BundleFiles
from adatsq_trt.engines.runtime import Bundle, Conditioning
from adatsq_trt.engines.triton_server.repository import no_images_served
from adatsq_trt.errors import MismatchError, UserError
from adatsq_trt.files import read_json_model, sha256
from adatsq_trt.image_call import ImageCall
from adatsq_trt.models.families import family_of_pipeline
from adatsq_trt.models.family import AGAIN, Canvas, Family, JsonObject
from adatsq_trt.models.image_condition import ReadImage
from adatsq_trt.schedule import FIRST_EXPERT
from adatsq_trt.stages.models import pipeline_of


def shown_conditioning(bundle: Bundle, prompts: Sequence[int], image: Path | None, mask: Path | None) -> Conditioning:
    """The conditioning of prompts that a bundle holds, with an image of the user's where the model takes one.

    Args:
        bundle: it.
        prompts: their numbers, one for every sample.
        image: as for `shown_image`; prompts whose text encoder sees it are encoded with it.
        mask: likewise.

    Raises:
        UserError: as `shown_image`; a prompt that the bundle does not hold.
        DamagedFileError: as `shown_image`, or a text encoder that does not load.
        MismatchError: as `shown_image`; a prompt that has more tokens with this image than the bundle has room for.
    """
    files = bundle.files
    shown, call = shown_image(files, image, mask), files.manifest.image_call
    if call is None or image is None or not call.texts:
        return bundle.conditioning(prompts, shown)
    bundle.conditioning(prompts)  # which refuses what it does not hold, before text encoders are loaded
    chosen = sorted(set(prompts))
    texts = tuple(files.manifest.prompt_texts[number] for number in chosen)
    silence()
    picture = read_image(image)
    encoded = encode_prompts(
        _pipeline(files, call), texts, lambda: None, call.negative_prompt, lambda: repeat(picture, len(texts))
    )["tokens"].float()
    (name,) = call.texts
    length = next(int(signature.shape[1]) for signature in bundle.inputs if signature.name == name)
    if encoded.shape[1] > length:
        raise MismatchError(
            f"--image '{image}': prompts are {encoded.shape[1]} tokens with it, bundle '{files.folder}' was exported "
            f"for {length}; give a shorter prompt or an image of another size"
        )
    filled = functional.pad(encoded, (0, 0, 0, length - encoded.shape[1]))
    own = {**shown, name: filled[[chosen.index(number) for number in prompts]]}
    return bundle.conditioning(prompts, own, {name: filled[-1:]} if files.two_branches else None)


def _pipeline(files: BundleFiles, call: ImageCall) -> Source:
    """The pipeline that a bundle was built from, whose text encoder sees the image."""
    folder = _encoders(files, call)
    transformer = folder / FIRST_EXPERT
    return Source(call.pipeline, _family(files, call), folder, transformer, transformer / "config.json")


def shown_image(files: BundleFiles, image: Path | None, mask: Path | None) -> dict[str, Tensor]:
    """Encode an image with a bundle's own VAE, as `Bundle.conditioning` takes it.

    Args:
        files: the bundle, whose files are verified.
        image: any that Pillow reads; it is resized to the size that is drawn.
        mask: of the image, likewise: white where the picture is drawn anew.

    Returns:
        Graph input → [1, ...]; empty for a model of text alone.

    Raises:
        UserError: an image or a mask that the model does not take, or none where it takes one.
        DamagedFileError: a file is no image, or the VAE does not load.
        MismatchError: the family of the bundle's pipeline is not known here.
    """
    call = files.manifest.image_call
    for option, file, taken, what in (
        ("--image", image, call is not None, "an image beside the prompt"),
        ("--mask", mask, call is not None and call.masked, "a mask, which is white where the picture is drawn anew"),
    ):
        if file is not None and not taken:
            raise UserError(f"{option} '{file}': bundle '{files.folder}' takes none; leave it out")
        if file is None and taken:
            raise UserError(f"bundle '{files.folder}' takes {what}, and got none; pass {option} FILE")
    if call is None or image is None:
        return {}
    family = _family(files, call)
    condition = family.image_condition
    assert condition is not None, "as `_family`"
    *frames, height, width = files.manifest.pixels or ()
    canvas, picture = Canvas(height, width, *frames), (read_image(image), None if mask is None else read_image(mask))
    if isinstance(condition, ReadImage):
        condition.require_size(f"--image '{image}'", picture[0].size, canvas)
    encoders = condition.encoders if call.files else {}
    folder = _encoders(files, call) if encoders else files.folder
    pipe = load_image_pipeline(family, files.folder / VAE_FOLDER, folder, encoders)
    return encode_images(family, pipe, iter([picture]), canvas, lambda: None)


def _family(files: BundleFiles, call: ImageCall) -> Family:
    """The family of the pipeline that a bundle was built from, which makes the inputs that the bundle takes.

    Raises:
        MismatchError: there is none here.
    """
    family = family_of_pipeline(call.pipeline)
    if family is None or family.image_call(call.inputs, call.files, call.negative_prompt) != call:
        raise MismatchError(
            f"bundle '{files.folder}' was built from a {call.pipeline}, whose family here takes no such image; "
            "register the family that it was built with (docs/adapters.md)"
        )
    return family


def _encoders(files: BundleFiles, call: ImageCall) -> Path:
    """The pipeline that a bundle was built from, whose image encoder the bundle does not carry.

    Raises:
        MismatchError: it is not there any more, or has changed.
    """
    folder = pipeline_of(files.folder.parent)
    for name, expected in call.files.items():
        if folder is None or not (folder / name).is_file() or sha256(folder / name) != expected:
            raise MismatchError(
                f"bundle '{files.folder}' was built with the encoder '{name}' of a {call.pipeline}, which is not "
                f"where its run says ({folder or 'no folder'}); run it in the pipeline, or build it again"
            )
    assert folder is not None, "there are files"
    return folder


def require_servable(folder: Path) -> None:
    """Refuse, before a pipeline is built to be served, one that takes images.

    Raises:
        UserError: names the pipeline.
    """
    family = family_of_pipeline(read_json_model(folder / INDEX, JsonObject, AGAIN).root.get("_class_name"))
    if family is not None and family.image_condition is not None:  # what is unknown, the build refuses
        raise no_images_served(folder, family.pipeline)
