"""Requests to the loop model, and the sentences for those that cannot be met."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from io import BytesIO
from typing import Any, Literal, get_args

import numpy as np

from adatsq_trt.engines.generation import GUIDANCE_INPUT
from adatsq_trt.engines.runtime import Bundle, Conditioning
from adatsq_trt.engines.triton_server.batching import Generation
from adatsq_trt.engines.triton_server.parameters import cut, read_parameters
from adatsq_trt.engines.triton_server.pipeline import Pipeline
from adatsq_trt.errors import AdatsqError, UnknownNameError, UserError

# Models are used with scales up to about 30.
MAX_GUIDANCE = 100.0
INPUTS = ("prompt", "seed", "guidance", "guidance_2", "steps", "quantized", "progress", "preview")
PARAMETERS = ("output", "text", "negative")
OutputName = Literal["png", "image", "latents"]


@dataclass(frozen=True)
class Request:
    """Generation that a client asks for, and the messages that it wants to hear.

    Attributes:
        generation: its start.
        output: content of the last message.
        progress: send a message after every step.
        preview: let these messages carry the output of the latents so far.
    """

    generation: Generation
    output: OutputName
    progress: bool
    preview: bool


def read_request(
    tensors: Mapping[str, np.ndarray],
    parameters: str,
    bundle: Bundle,
    max_samples: int,
    pipeline: Pipeline | None = None,
) -> Request:
    """Turn a request's tensors into the start of a generation.

    Args:
        tensors: `seed` and `prompt`, int64 [samples], and any of the optional inputs, [1], that config.pbtxt lists.
        parameters: JSON object that comes with the request: `output`, `text`, `negative`, and the server's own entries.
        bundle: the one that generates.
        max_samples: most samples of one request.
        pipeline: its encoders understand any `text`; without it, `text` is that of a prompt of the bundle.

    Raises:
        UserError: says which input or parameter is wrong or unknown.
    """
    asked = read_parameters(parameters, PARAMETERS, INPUTS)
    sizes = {name: value.size for name, value in tensors.items()}
    for name in sorted(set(tensors) - {"prompt", "seed"}):
        if sizes[name] != 1:
            raise UserError(f"{name}: got {sizes[name]} values, expected one for all samples of the request")
    if "seed" not in sizes:  # the server lets some requests through that lack an input
        raise UserError("the request has no seed; give one, 0 or more, for each sample")
    if sizes.get("prompt", sizes["seed"]) != sizes["seed"] or not 0 < sizes["seed"] <= max_samples:
        count = f"{sizes['prompt']} prompts and " if "prompt" in sizes else ""
        raise UserError(f"got {count}{sizes['seed']} seeds, expected one seed for every prompt, 1 to {max_samples}")
    seeds = tensors["seed"].ravel().tolist()
    prompts = tensors["prompt"].ravel().tolist() if "prompt" in tensors else None
    if min(seeds) < 0:
        raise UserError(f"seed: got {min(seeds)}, expected 0 to {np.iinfo(np.int64).max}")
    guidance, guidance_2 = _scales(tensors, bundle)
    bundle.require_steps(int(_only(tensors, "steps", bundle.policy.steps)))
    outputs = _outputs(bundle, pipeline)
    output = asked.get("output", outputs[0])
    if output not in outputs:
        raise UnknownNameError("output", cut(str(output)), outputs)
    progress, preview = (bool(_only(tensors, name, False)) for name in ("progress", "preview"))
    if preview and not progress:
        raise UserError("preview: there are messages to carry it with progress only; ask for progress too")
    conditioning = _conditioning(prompts, asked.get("text"), len(seeds), bundle, pipeline)
    if "negative" in asked:
        conditioning = _led_away(conditioning, asked["negative"], len(seeds), bundle, pipeline)
    return Request(
        Generation(
            bundle.schedule.begin(bundle.noise(seeds)),
            conditioning,
            guidance,
            quantized=bool(_only(tensors, "quantized", True)),
            guidance_2=guidance_2,
        ),
        output=output,
        progress=progress,
        preview=preview,
    )


def _scales(tensors: Mapping[str, np.ndarray], bundle: Bundle) -> tuple[float, float | None]:
    """The scales of guidance of both transformers, the bundle's own unless asked for; None for that of the first.

    As in the pipeline of two, the second has the scale of the first where only this is given.
    """
    manifest = bundle.manifest
    if "guidance_2" in tensors and not manifest.schedule.experts:
        raise UserError("guidance_2: the bundle has one transformer; leave it out, and give guidance")
    second = manifest.guidance_2 if "guidance" not in tensors else None
    if "guidance_2" in tensors:
        second = _guidance("guidance_2", tensors, manifest.second_guidance, bundle)
    return _guidance("guidance", tensors, manifest.guidance, bundle), second


def _guidance(name: str, tensors: Mapping[str, np.ndarray], own: float, bundle: Bundle) -> float:
    """A scale of guidance, the bundle's own unless asked for."""
    if name not in tensors:
        return own
    guidance = float(_only(tensors, name, own))
    if np.isclose(guidance, own):  # whatever it was built with
        return guidance
    if not 0 <= guidance <= MAX_GUIDANCE:  # nor is NaN
        raise UserError(
            f"{name}: got {guidance:g}, expected 0 to {MAX_GUIDANCE:g}; leave it out for the bundle's own, {own:g}"
        )
    embedded = any(signature.name == GUIDANCE_INPUT for signature in bundle.inputs)
    if not (embedded or bundle.conditioning([0]).unconditional):
        raise UserError(f"{name}: got {guidance:g}, the bundle was built without guidance; leave it out")
    return guidance


def _conditioning(
    prompts: list[int] | None, text: object, samples: int, bundle: Bundle, pipeline: Pipeline | None
) -> Conditioning:
    """Encode the prompts or the text for the denoiser."""
    if text is None and prompts is not None:
        return bundle.conditioning(prompts)
    stored = f"'prompt', 0 to {bundle.manifest.prompts - 1}"
    if text is None or prompts is not None:
        raise UserError(f"got {'both' if text is not None else 'neither'}, expected the parameter 'text' or {stored}")
    return _encode("text", text, samples, bundle, pipeline, f"ask with {stored}")


def _encode(
    name: str, text: object, samples: int, bundle: Bundle, pipeline: Pipeline | None, instead: str
) -> Conditioning:
    """Encode a text for the denoiser, or look it up among the bundle's prompts.

    Args:
        name: of the parameter.
        text: its value.
        samples: how many.
        bundle: the one that generates.
        pipeline: its text encoders, if they are there.
        instead: advice where they are not, and no prompt of the bundle has this text.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{name}: got {cut(repr(text))}, expected words")
    if pipeline is not None:
        return pipeline.conditioning(text, samples, name)
    texts = bundle.manifest.prompt_texts
    if text not in texts:
        near = get_close_matches(text, texts) or texts[:3]
        known = f", such as {', '.join(map(repr, near))}; give one of them, or" if near else ";"
        raise UserError(f"{name} {cut(text)!r}: not one of the bundle's {len(texts)} texts{known} {instead}")
    return bundle.conditioning([texts.index(text)] * samples)


def _led_away(
    conditioning: Conditioning, negative: object, samples: int, bundle: Bundle, pipeline: Pipeline | None
) -> Conditioning:
    """The same with another prompt than the bundle's in the second branch of guidance.

    Raises:
        UserError: there is no such branch, or the text is none that `text` might be.
    """
    if conditioning.unconditional is None:
        raise UserError("negative: the bundle was built without a second branch of guidance; leave it out")
    instead = "leave it out, or serve the bundle with --pipeline"
    other = _encode("negative", negative, samples, bundle, pipeline, instead)
    return Conditioning(conditioning.conditional, other.conditional)


def _outputs(bundle: Bundle, pipeline: Pipeline | None) -> tuple[OutputName, ...]:
    """List the outputs that a request may ask for, the default first; a PNG has 1, 3 or 4 channels."""
    names: tuple[OutputName, ...] = get_args(OutputName)
    image = bundle.manifest.image
    return names if pipeline is not None or image.vae or image.channels in (1, 3, 4) else names[1:]


def render(decode: Callable[[np.ndarray], np.ndarray], latents: np.ndarray, output: OutputName) -> np.ndarray:
    """Latents in the form that a client asked for.

    Args:
        decode: makes images, float32 [samples, (frames,) height, width, channels] in [0, 1].
        latents: float32 [samples, *latent_shape].
        output: "latents" as they are; "image" what `decode` makes; "png" the bytes of one picture with all samples side
            by side, uint8 [bytes]. A video's frames are side by side, and samples below each other.

    Raises:
        AdatsqError: the images have NaN or infinity, which a picture would hide.
    """
    if output == "latents":
        return latents
    images = decode(latents)
    if not np.isfinite(images).all():
        raise AdatsqError("the decoded images have NaN or infinity; ask for less guidance, or for another seed")
    return images if output == "image" else _png(_sheet(images))


def _sheet(images: np.ndarray) -> np.ndarray:
    """Images [samples, height, width, channels], or videos with frames as the second axis, as one picture."""
    if images.ndim == 5:
        return np.concatenate([np.concatenate(frames, axis=1) for frames in images])
    return np.concatenate(images, axis=1)


def _png(image: np.ndarray) -> np.ndarray:
    """A PNG file of a picture [height, width, 1, 3 or 4] in [0, 1]."""
    from PIL import Image

    pixels, buffer = np.round(image * 255).astype(np.uint8), BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, format="png")
    return np.frombuffer(bytearray(buffer.getvalue()), np.uint8)


def _only(tensors: Mapping[str, np.ndarray], name: str, default: object) -> Any:
    return tensors[name].item() if name in tensors else default
