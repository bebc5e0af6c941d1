"""The prompts that calibration draws, and their encodings, made once by the pipeline's own text encoders."""

from __future__ import annotations

import gc
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import JsonValue
from torch import Tensor
from torch.nn import functional

from adatsq_trt.checkpoints.source import INDEX, Source
from adatsq_trt.checkpoints.weights import find_weights
from adatsq_trt.errors import DamagedFileError, MissingFileError, UserError, one_line
from adatsq_trt.files import read_json_model
from adatsq_trt.loading import of_parts, one_loader
from adatsq_trt.models.family import AGAIN, JsonObject
from adatsq_trt.models.image_condition import ReadImage

_DEFAULT = "prompts.txt"
# What files of whole language and picture models hold beside their text encoder.
_NOT_OF_ENCODERS = ("decoder.", "lm_head.", "vision_model.", "visual_projection.", "text_projection.", "logit_scale")


def default_prompts() -> tuple[str, ...]:
    """128 prompts of many subjects, styles and lengths, written for this package."""
    text = resources.files("adatsq_trt.checkpoints").joinpath(_DEFAULT).read_text(encoding="utf-8")
    return _lines(text)


def read_prompts(file: Path) -> tuple[str, ...]:
    """A file of prompts, one in a line, which a line feed ends; empty lines and repetitions are left out.

    Raises:
        MissingFileError: no such file.
        UserError: it is not UTF-8, has other ends of lines, or there is no prompt in it.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise MissingFileError(
            f"--prompts '{file}' does not exist; give a text file with a prompt in each line"
        ) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"--prompts '{file}', line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from error
    prompts = _lines(text)
    for number, prompt in enumerate(text.split("\n"), 1):
        for character, where in (("\r", "where old Macs end a line"), ("\0", "as in UTF-16")):
            if character in prompt.strip():
                raise UserError(
                    f"--prompts '{file}', line {number}: got the character {character!r} in a prompt, {where}; save "
                    "the file as UTF-8 with a line feed after each prompt"
                )
    if not prompts:
        raise UserError(f"--prompts '{file}' holds no prompt; write one in each line, or leave --prompts out")
    return prompts


def _lines(text: str) -> tuple[str, ...]:
    """Nothing but a line feed ends a line: form feeds, U+2028 and the like may be in a prompt."""
    return tuple(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip()))


Images = Callable[[], Iterator[Image.Image]]


def encode_prompts(
    source: Source,
    prompts: tuple[str, ...],
    on_prompt: Callable[[], None],
    negative: str = "",
    images: Images | None = None,
) -> dict[str, Tensor]:
    """Encode prompts with the pipeline's text encoders, which are gone from memory afterwards.

    Args:
        source: of the pipeline.
        prompts: texts; what is too long for an encoder is cut off, as the pipeline does.
        on_prompt: called after each.
        negative: prompt of the second branch of guidance.
        images: gives one for each prompt, at every call, for text encoders that see it.

    Returns:
        "tokens" [prompts + 1, tokens, width] and "pooled" [prompts + 1, width], the negative prompt last, in the type
        that the encoders have on disk (bfloat16 for 16 bits). Short prompts are filled up with zeros. With images
        there are 2 * prompts of each: the negative prompt with each image. Where a pipeline makes a mask of each
        prompt, "pooled" is that, [prompts + 1, tokens]. A second text takes the place of a pooled projection, its
        tokens one behind the other.

    Raises:
        DamagedFileError: diffusers or transformers cannot load a part, or encodings that say nothing of the prompts.
        MissingFileError: an encoder has no weights.
        UserError: prompts that the encoders do not tell apart.
    """
    pipe = _load_encoders(source)
    encodings = encode_with(pipe, source, prompts, on_prompt, negative, images)
    del pipe
    gc.collect()
    return encodings


def encode_with(
    pipe: Any,
    source: Source,
    prompts: tuple[str, ...],
    on_prompt: Callable[[], None],
    negative: str = "",
    images: Images | None = None,
) -> dict[str, Tensor]:
    """As `encode_prompts`, with text encoders that are in memory.

    Args:
        pipe: the pipeline; its transformer is not used.
        source: of the pipeline.
        prompts: texts.
        on_prompt: called after each.
        negative: prompt of the second branch of guidance.
        images: as for `encode_prompts`.

    Raises:
        DamagedFileError: encodings that say nothing of the prompts.
        UserError: prompts that the encoders do not tell apart.
    """
    texts, tokens, pooled = list[str](), list[Tensor](), list[Tensor]()
    with torch.no_grad():
        for prompt, encoded in _encodings(pipe, source, prompts, negative, images):
            _require_numbers(source, prompt, encoded)
            texts.append(prompt)
            tokens.append(encoded[0])
            pooled.append(encoded[1])
            on_prompt()
    _require_distinct(source, texts, tokens, pooled)
    second = source.family.second_multiple
    return {
        "tokens": _filled(tokens, source.family.token_multiple),
        "pooled": _filled(pooled, second).flatten(1) if second else torch.stack(pooled),
    }


def _filled(texts: Sequence[Tensor], multiple: int) -> Tensor:
    """Texts [tokens, width] with zeros behind them, at the next multiple of the longest: [texts, tokens, width]."""
    length = max(1, *map(len, texts))
    length += -length % multiple
    return torch.stack([functional.pad(rows, (0, 0, 0, length - len(rows))) for rows in texts])


def _encodings(
    pipe: Any, source: Source, prompts: tuple[str, ...], negative: str, images: Images | None
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Each prompt with its encoding, and after them the negative one: once, or with the image of each prompt."""
    condition = source.family.image_condition
    if not isinstance(condition, ReadImage):
        yield from ((prompt, source.family.encode(pipe, prompt)) for prompt in (*prompts, negative))
        return
    assert images is not None, "the caller knows the family"
    encoded = dict[tuple[str, str], Tensor]()  # several prompts may have one image
    for texts in (prompts, (negative,) * len(prompts)):
        for prompt, image in zip(texts, images(), strict=True):
            key = (prompt, hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest())
            if key not in encoded:
                encoded[key] = condition.encode_text(pipe, prompt, image)
            yield prompt, (encoded[key], encoded[key].new_empty(0))


def _require_numbers(source: Source, prompt: str, encoded: tuple[Tensor, Tensor]) -> None:
    """Refuse an encoding that is not finite, or zero throughout.

    Raises:
        DamagedFileError: names the prompt.
    """
    for value in encoded:
        what = None if value.isfinite().all() else "has NaN or infinite numbers"
        if value.numel() and not value.any():
            what = "is zero throughout"
        if what is not None:
            raise DamagedFileError(
                f"'{source.folder}': the encoding of the prompt '{prompt}' {what}; its text encoders are damaged; "
                f"{AGAIN}"
            )


def _require_distinct(
    source: Source, prompts: Sequence[str], tokens: Sequence[Tensor], pooled: Sequence[Tensor]
) -> None:
    """Refuse encodings that do not depend on the prompt, and prompts that have the same.

    Args:
        source: of the pipeline.
        prompts: the negative one last.
        tokens: of each.
        pooled: of each.

    Raises:
        DamagedFileError: an encoder gives the same for all prompts.
        UserError: two prompts with one encoding.
    """
    last = f"'{prompts[-1]}'" if prompts[-1] else "the empty one"
    digests = [list(map(_digest, values)) for values in (tokens, pooled)]
    for part, values, own in zip(("tokens", "pooled projections"), (tokens, pooled), digests, strict=True):
        if values is pooled and (source.family.text_mask or source.family.second_multiple):
            continue  # prompts of one length have one mask, and prompts may have the same in quotes
        if len(set(own)) == 1 < len(set(prompts)) and values[0].numel():
            raise DamagedFileError(
                f"'{source.folder}': the prompts, '{prompts[0]}' and {last} among them, all have the same "
                f"{part}; a text encoder is damaged; {AGAIN}"
            )
    first = dict[tuple[bytes, ...], str]()
    for prompt, digest in zip(prompts, zip(*digests, strict=True), strict=True):
        other = first.setdefault(digest, prompt)
        if other != prompt:
            raise UserError(
                f"--prompts: '{other}' and '{prompt}' have the same encoding: '{source.folder}' does not tell them "
                "apart, or reads only as far as they are alike; leave one of them out"
            )


def _digest(value: Tensor) -> bytes:
    content = value.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(repr(tuple(value.shape)).encode() + content).digest()


def _load_encoders(source: Source) -> Any:
    """The pipeline without transformer and VAE."""
    family = source.family
    parts = [part for part in family.encoders if part.startswith("text_encoder")]
    weights = [find_weights(source.folder / part) for part in parts]
    wide = any("F32" in files.dtypes.values() for files in weights)
    common = {
        "torch_dtype": torch.float32 if wide else torch.bfloat16,
        "use_safetensors": True,
        "local_files_only": True,
    }
    index = read_json_model(source.folder / INDEX, JsonObject, AGAIN).root
    variants = {part: files.variant for part, files in zip(parts, weights, strict=True)}
    try:
        with one_loader(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a newer name for torch_dtype, which older ones lack
            encoders = {
                part: load_encoder(source.folder / part, index.get(part), {**common, "variant": variants[part]})
                for part in parts
            }
            return of_parts(family.load_pipeline_class()).from_pretrained(
                source.folder, transformer=None, vae=None, trust_remote_code=False, **encoders, **common
            )
    except DamagedFileError:
        raise
    except Exception as error:  # what is raised depends on the part and the library
        raise DamagedFileError(
            f"'{source.folder}': its text encoders do not load ({one_line(error)}); {AGAIN}"
        ) from error


def load_encoder(folder: Path, place: JsonValue, common: Mapping[str, Any]) -> Any:
    """A text or image encoder, all of whose weights are those of its file: transformers fills gaps at random.

    Args:
        folder: of the encoder.
        place: library and class.
        common: arguments of `from_pretrained`.

    Raises:
        DamagedFileError: names a tensor that is missing, left over or of another shape.
    """
    assert isinstance(place, list)  # `find_source` has seen library and class
    library, name = map(str, place)
    encoder, found = getattr(import_module(library), name).from_pretrained(folder, output_loading_info=True, **common)
    left_over = {key for key in found["unexpected_keys"] if not key.startswith(_NOT_OF_ENCODERS)}
    mismatched = {entry[0] for entry in found["mismatched_keys"]}
    for tensors, what in (
        (set(found["missing_keys"]), "are missing, so they would be random"),
        (mismatched, "have another shape, so they would be random"),
        (left_over, "are more than its configuration has layers for, so they would be left out"),
    ):
        if tensors:
            raise DamagedFileError(
                f"'{folder}': {len(tensors)} tensors {what}, '{min(tensors)}' among them; a {name} is expected as its "
                f"config.json describes it; {AGAIN}"
            )
    return encoder
