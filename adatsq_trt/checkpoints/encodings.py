"""Text conditioning that was encoded elsewhere: one safetensors file in the place of prompts and text encoders.

    tokens           [prompts, tokens, width]  encoded prompts
    pooled           [prompts, pooled width]   for models that take a pooled projection (Flux)
    mask             [prompts, tokens]         optional: 0 where a token stands for none; without it all count
    negative_tokens  [tokens, width]           optional: of the unguided branch; zeros unless given
    negative_pooled  [pooled width]            likewise

Numbers are float32, float16 or bfloat16, all of one type; the mask is of any type. The file's metadata may hold
"prompts", a JSON list of their texts, by which a bundle is asked for them; otherwise they are called by their numbers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from adatsq_trt.errors import DamagedFileError, MismatchError, MissingFileError
from adatsq_trt.files import read_tensors

TOKENS, POOLED, MASK = "tokens", "pooled", "mask"
NEGATIVE_TOKENS, NEGATIVE_POOLED = "negative_tokens", "negative_pooled"
_NAMES = (TOKENS, POOLED, MASK, NEGATIVE_TOKENS, NEGATIVE_POOLED)
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_ADVICE = "write it as docs/how-to/encodings.md says"


def encoded_prompts(file: Path) -> tuple[str, ...]:
    """Texts of the prompts of a file, or their numbers; reads no tensor.

    Raises:
        MissingFileError: no such file.
        DamagedFileError: not safetensors, without `tokens`, or with another number of texts.
    """
    if not file.is_file():
        raise MissingFileError(f"--encodings '{file}' does not exist; {_ADVICE}")
    try:
        with safe_open(file, "pt") as opened:
            metadata, names = opened.metadata() or {}, set(opened.keys())
            count = opened.get_slice(TOKENS).get_shape()[0] if TOKENS in names else 0
    except (SafetensorError, OSError, IndexError) as error:
        raise DamagedFileError(
            f"--encodings '{file}' is not a complete safetensors file ({error}); {_ADVICE}"
        ) from error
    if not count:
        raise DamagedFileError(f"--encodings '{file}' has no tensor '{TOKENS}' with a row for each prompt; {_ADVICE}")
    if "prompts" not in metadata:
        return tuple(map(str, range(count)))
    try:
        texts = TypeAdapter(tuple[str, ...]).validate_json(metadata["prompts"])
    except ValidationError as error:
        raise DamagedFileError(
            f"--encodings '{file}': metadata 'prompts' is no JSON list of texts; {_ADVICE}"
        ) from error
    if len(texts) != count or len(set(texts)) != count:
        raise DamagedFileError(
            f"--encodings '{file}': got {len(set(texts))} different texts for {count} prompts, expected one for each; "
            f"{_ADVICE}"
        )
    return texts


def read_encodings(file: Path, width: int, pooled_width: int, multiple: int = 1) -> dict[str, Tensor]:
    """The encodings of a file, as stage `embed` keeps them.

    Args:
        file: of this schema.
        width: of a token, that the transformer takes.
        pooled_width: of the pooled projection; 0 for a model that takes none.
        multiple: tokens are filled up with zeros to a multiple of so many.

    Returns:
        "tokens" [prompts + 1, tokens, width] and "pooled" [prompts + 1, pooled_width], the unguided branch last.

    Raises:
        DamagedFileError: not safetensors, a tensor that is missing or no part of the schema, or numbers that are not
            finite.
        MismatchError: tensors of shapes that do not suit the model or each other.
    """
    tensors = read_tensors(file, _ADVICE)
    strange = sorted(set(tensors) - set(_NAMES))
    if strange:
        raise DamagedFileError(
            f"--encodings '{file}': unknown tensor '{strange[0]}', expected some of {', '.join(_NAMES)} (positions are "
            f"the adapter's own); {_ADVICE}"
        )
    if TOKENS not in tensors or tensors[TOKENS].ndim != 3:
        raise DamagedFileError(f"--encodings '{file}' has no tensor '{TOKENS}' [prompts, tokens, width]; {_ADVICE}")
    count, length, _ = tensors[TOKENS].shape
    dtype = tensors[TOKENS].dtype
    pooled = tensors.get(POOLED, torch.zeros(count, 0, dtype=dtype) if not pooled_width else None)
    shapes = {
        TOKENS: (tensors[TOKENS], (count, length, width)),
        POOLED: (pooled, (count, pooled_width)),
        NEGATIVE_TOKENS: (tensors.get(NEGATIVE_TOKENS, torch.zeros(length, width, dtype=dtype)), (length, width)),
        NEGATIVE_POOLED: (tensors.get(NEGATIVE_POOLED, torch.zeros(pooled_width, dtype=dtype)), (pooled_width,)),
    }
    found = {name: _require(file, name, value, shape, dtype) for name, (value, shape) in shapes.items()}
    if MASK in tensors:
        mask = tensors[MASK]
        if tuple(mask.shape) != (count, length):
            raise MismatchError(
                f"--encodings '{file}': '{MASK}' is {list(mask.shape)}, expected {[count, length]}; {_ADVICE}"
            )
        found[TOKENS] = found[TOKENS] * (mask != 0)[..., None].to(dtype)
    tokens = torch.cat([found[TOKENS], found[NEGATIVE_TOKENS][None]])
    filled = functional.pad(tokens, (0, 0, 0, -length % multiple))
    return {"tokens": filled, "pooled": torch.cat([found[POOLED], found[NEGATIVE_POOLED][None]])}


def _require(file: Path, name: str, value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of the file as it has to be."""
    if value is None:
        raise DamagedFileError(f"--encodings '{file}' has no tensor '{name}', expected {list(shape)}; {_ADVICE}")
    if tuple(value.shape) != shape:
        raise MismatchError(f"--encodings '{file}': '{name}' is {list(value.shape)}, expected {list(shape)}; {_ADVICE}")
    if value.dtype != dtype or dtype not in _TYPES:
        raise MismatchError(
            f"--encodings '{file}': '{name}' is {value.dtype}, expected float32, float16 or bfloat16, the same for "
            f"all; {_ADVICE}"
        )
    if not bool(value.isfinite().all()):
        raise DamagedFileError(f"--encodings '{file}': '{name}' has NaN or infinite numbers; {_ADVICE}")
    return value
