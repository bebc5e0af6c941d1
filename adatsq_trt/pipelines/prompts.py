"""The prompts that calibration draws, and their encodings, made once by the pipeline's own text encoders."""

from __future__ import annotations

import gc
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from adatsq_trt.errors import DamagedFileError, MissingFileError, UserError
from adatsq_trt.pipelines.kinds import AGAIN, Encodings
from adatsq_trt.pipelines.source import Source
from adatsq_trt.pipelines.weights import find_weights

_DEFAULT = "prompts.txt"


def default_prompts() -> tuple[str, ...]:
    """128 prompts of many subjects, styles and lengths, written for this package."""
    text = resources.files("adatsq_trt.pipelines").joinpath(_DEFAULT).read_text(encoding="utf-8")
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


def encode_prompts(source: Source, prompts: tuple[str, ...], on_prompt: Callable[[], None]) -> Encodings:
    """Encode prompts with the pipeline's text encoders, which are gone from memory afterwards.

    Args:
        source: of the pipeline.
        prompts: texts; what is too long for an encoder is cut off, as the pipeline does.
        on_prompt: called after each.

    Returns:
        "conditional.<graph input>" [prompts, ...] and, for guided models, "unconditional.<graph input>" [1, ...], in
        the type that the encoders have on disk (bfloat16 for 16 bits).

    Raises:
        DamagedFileError: diffusers or transformers cannot load a part.
        MissingFileError: an encoder has no weights.
    """
    pipe = _load_encoders(source)
    with torch.inference_mode():
        encoded = source.kind.encode_all(pipe, prompts, on_prompt)
    del pipe
    gc.collect()
    for name, value in encoded.items():
        if not bool(value.isfinite().all()):
            raise DamagedFileError(
                f"'{source.folder}': encoding the prompts gave NaN or infinite numbers in '{name}'; its text encoders "
                f"are damaged; {AGAIN}"
            )
    return {name: value.clone().contiguous() for name, value in encoded.items()}


def _load_encoders(source: Source) -> Any:
    """The pipeline without transformer and VAE."""
    kind = source.kind
    weights = [find_weights(source.folder / part) for part in kind.encoders if part.startswith("text_encoder")]
    wide = any("F32" in files.dtypes.values() for files in weights)
    try:
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
