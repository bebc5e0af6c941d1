"""The prompts that calibration draws, and their encodings, made once by the pipeline's own text encoders."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adatsq_trt.checkpoints.kinds import AGAIN
from adatsq_trt.checkpoints.source import Source
from adatsq_trt.checkpoints.weights import find_weights
from adatsq_trt.errors import DamagedFileError, MissingFileError, UserError

_DEFAULT = "prompts.txt"


def default_prompts() -> tuple[str, ...]:
    """128 prompts of many subjects, styles and lengths, written for this package."""
    text = resources.files("adatsq_trt.checkpoints").joinpath(_DEFAULT).read_text(encoding="utf-8")
    return tuple(text.splitlines())


def read_prompts(file: Path) -> tuple[str, ...]:
    """A file of prompts, one in a line; empty lines and repetitions are left out.

    Raises:
        MissingFileError: no such file.
        UserError: it is not UTF-8, or there is no prompt in it.
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
    prompts = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not prompts:
        raise UserError(f"--prompts '{file}' holds no prompt; write one in each line, or leave --prompts out")
    return prompts


def encode_prompts(source: Source, prompts: tuple[str, ...], on_prompt: Callable[[], None]) -> dict[str, Tensor]:
    """Encode prompts with the pipeline's text encoders, which are gone from memory afterwards.

    Args:
        source: of the pipeline.
        prompts: texts; what is too long for an encoder is cut off, as the pipeline does.
        on_prompt: called after each.

    Returns:
        "tokens" [prompts + 1, tokens, width] and "pooled" [prompts + 1, width], the empty prompt last, in the type
        that the encoders have on disk (bfloat16 for 16 bits). Short prompts are filled up with zeros.

    Raises:
        DamagedFileError: diffusers or transformers cannot load a part.
        MissingFileError: an encoder has no weights.
    """
    pipe = _load_encoders(source)
    encodings = encode_with(pipe, source, prompts, on_prompt)
    del pipe
    gc.collect()
    return encodings


def encode_with(
    pipe: Any, source: Source, prompts: tuple[str, ...], on_prompt: Callable[[], None]
) -> dict[str, Tensor]:
    """As `encode_prompts`, with text encoders that are in memory.

    Args:
        pipe: the pipeline; its transformer is not used.
        source: of the pipeline.
        prompts: texts.
        on_prompt: called after each.

    Raises:
        DamagedFileError: an encoding has NaN or infinite numbers.
    """
    tokens, pooled = list[Tensor](), list[Tensor]()
    with torch.no_grad():
        for prompt in (*prompts, ""):
            encoded = source.kind.encode(pipe, prompt)
            if not all(bool(value.isfinite().all()) for value in encoded):
                raise DamagedFileError(
                    f"'{source.folder}': the encoding of the prompt '{prompt}' has NaN or infinite numbers; its text "
                    f"encoders are damaged; {AGAIN}"
                )
            tokens.append(encoded[0])
            pooled.append(encoded[1])
            on_prompt()
    length = max(map(len, tokens))
    length += -length % source.kind.token_multiple
    filled = [functional.pad(rows, (0, 0, 0, length - len(rows))) for rows in tokens]
    return {"tokens": torch.stack(filled), "pooled": torch.stack(pooled)}


def _load_encoders(source: Source) -> Any:
    """The pipeline without transformer and VAE."""
    kind = source.kind
    weights = [find_weights(source.folder / part) for part in kind.encoders if part.startswith("text_encoder")]
    wide = any("F32" in files.dtypes.values() for files in weights)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a newer name for torch_dtype, which older ones lack
            return kind.load_class(kind.pipeline).from_pretrained(
                source.folder,
                transformer=None,
                vae=None,
                torch_dtype=torch.float32 if wide else torch.bfloat16,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as error:  # what is raised depends on the part and the library
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DamagedFileError(f"'{source.folder}': its text encoders do not load ({reason}); {AGAIN}") from error
