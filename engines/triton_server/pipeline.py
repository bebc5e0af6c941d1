"""Parts of a diffusers pipeline beside its transformer: text encoders and a VAE, in 16 bits; so far FluxPipeline's.

A model repository carries their files and a record of the files' hashes. Nothing is loaded before these are compared.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, JsonValue, RootModel

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Bundle, Conditioning
from adatsq_trt.engines.vae import weights_variant
from adatsq_trt.errors import DamagedFileError, MismatchError, MissingFileError, one_line
from adatsq_trt.files import read_json_model, sha256, write_json_model

PIPELINE_NAME, RECORD_NAME = "pipeline", "pipeline.json"
_PIPELINE_CLASS, _ARCHITECTURE = "FluxPipeline", "FluxTransformer2DModel"
_INDEX_NAME = "model_index.json"
_WITH_WEIGHTS = ("text_encoder", "text_encoder_2", "vae")
_PARTS = (*_WITH_WEIGHTS, "scheduler", "tokenizer", "tokenizer_2")
_SUFFIXES = (".json", ".model", ".safetensors", ".txt")  # neither pickles nor code
_TEXT, _POOLED = "encoder_hidden_states", "pooled_projections"
_PIXELS_PER_PATCH = 2  # along one side, in the VAE's latents
_ADVICE = "name the folder of a pipeline that diffusers has saved"
_AGAIN = "run 'adatsq-trt deploy triton' again"


class PipelineRecord(BaseModel):
    """The files of a deployed pipeline.

    Attributes:
        files: path relative to the pipeline's folder → sha256.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    files: dict[str, str]


class _Settings(RootModel[dict[str, JsonValue]]):
    """One of diffusers' JSON files."""


def require_pipeline(folder: Path, bundle: BundleFiles) -> None:
    """Refuse a pipeline that a bundle is not the transformer of.

    Raises:
        MissingFileError: it is not complete, or has no weights in safetensors.
        DamagedFileError: one of its settings cannot be read.
        MismatchError: it is of another class, or its widths or its scheduler are not the bundle's.
    """
    got = _setting(folder / _INDEX_NAME, "_class_name")
    if got != _PIPELINE_CLASS or bundle.manifest.architecture != _ARCHITECTURE:
        raise MismatchError(
            f"'{folder}' is a {got} and the bundle's model a {bundle.manifest.architecture}; served with text are "
            f"{_PIPELINE_CLASS} and {_ARCHITECTURE}; leave --pipeline out"
        )
    widths = {signature.name: signature.shape[-1] for signature in bundle.row_inputs()}
    channels = bundle.manifest.latent_shape[-1] // _PIXELS_PER_PATCH**2
    expected = {"text_encoder": ("hidden_size", widths.get(_POOLED)), "text_encoder_2": ("d_model", widths.get(_TEXT))}
    for part, (name, width) in {**expected, "vae": ("latent_channels", channels)}.items():
        if (value := _setting(folder / part / "config.json", name)) != width:
            raise MismatchError(
                f"'{folder / part}' has {name} {value}, the bundle's transformer needs {width}; name the pipeline that "
                "the bundle was built from"
            )
        if not any((folder / part).glob("*.safetensors")):
            raise MissingFileError(
                f"'{folder / part}' has no weights in safetensors; save the pipeline again with diffusers"
            )
    _require_scheduler(folder, bundle)


def _require_scheduler(folder: Path, bundle: BundleFiles) -> None:
    """Refuse a pipeline whose own loop would take other steps than the bundle's."""
    import diffusers

    from adatsq_trt.engines.transformer import require_scheduler

    try:
        config = diffusers.FlowMatchEulerDiscreteScheduler.load_config(folder / "scheduler", local_files_only=True)
        scheduler = getattr(diffusers, str(config["_class_name"])).from_config(config)
    except Exception as error:  # what diffusers raises depends on the file
        raise DamagedFileError(f"'{folder / 'scheduler'}' does not load ({one_line(error)}); {_ADVICE}") from error
    try:
        require_scheduler(bundle.manifest, scheduler)
    except MismatchError as error:
        raise MismatchError(f"'{folder / 'scheduler'}': {error}") from error


def copy_pipeline(source: Path, target: Path) -> str:
    """Copy what serving needs of a pipeline, and record it.

    Args:
        source: a pipeline that diffusers has saved.
        target: folder that gets `pipeline/` and `pipeline.json`.

    Returns:
        The sha256 of the record.
    """
    found = [source / _INDEX_NAME, *(path for part in _PARTS for path in sorted((source / part).rglob("*")))]
    names = [path.relative_to(source) for path in found if path.is_file() and path.suffix in _SUFFIXES]
    for name in names:
        copy = target / PIPELINE_NAME / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, copy)
    hashes = {name.as_posix(): sha256(target / PIPELINE_NAME / name) for name in names}
    write_json_model(target / RECORD_NAME, PipelineRecord(files=hashes))
    return sha256(target / RECORD_NAME)


class Pipeline:
    """Words to conditioning, and latents to pictures."""

    def __init__(self, folder: Path, record_sha256: str, bundle: Bundle, device: str = "cpu") -> None:
        """Load what `copy_pipeline` has written.

        Args:
            folder: its target.
            record_sha256: hash that it returned.
            bundle: the transformer.
            device: device of the text encoders and the VAE.

        Raises:
            DamagedFileError: a file is not the one that was recorded, or diffusers cannot load it.
            MissingFileError: a file is gone.
        """
        _require_hashes(folder, record_sha256)  # before the imports, which take longer than a refusal should
        import torch
        from diffusers import FluxPipeline

        try:
            self._pipe = FluxPipeline.from_pretrained(
                folder / PIPELINE_NAME,
                transformer=None,
                torch_dtype=torch.bfloat16,
                variant=next(
                    filter(None, (weights_variant(folder / PIPELINE_NAME / part) for part in _WITH_WEIGHTS)), None
                ),
                use_safetensors=True,
                local_files_only=True,
            ).to(device)
        except Exception as error:  # what diffusers raises depends on the file
            raise DamagedFileError(f"'{folder / PIPELINE_NAME}' does not load ({error}); {_AGAIN}") from error
        self._grid = bundle.manifest.image.shape.grid
        self._text_tokens = next(int(s.shape[1]) for s in bundle.inputs if s.name == _TEXT)
        self._empty = self._encode("") if bundle.conditioning([0]).unconditional else None

    def conditioning(self, text: str, samples: int) -> Conditioning:
        """The conditioning of samples of one prompt.

        Args:
            text: the prompt; what is too long for the encoders is cut off.
            samples: how many.
        """
        encoded = self._encode(text)
        return Conditioning(_repeat(encoded, samples), self._empty and _repeat(self._empty, samples))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents, float32 [samples, *latent_shape] → images, float32 [samples, height, width, 3] in [0, 1]."""
        import torch

        pipe, vae = self._pipe, self._pipe.vae
        height, width = (patches * _PIXELS_PER_PATCH * pipe.vae_scale_factor for patches in self._grid)
        with torch.inference_mode():
            unpacked = pipe._unpack_latents(torch.from_numpy(latents), height, width, pipe.vae_scale_factor)
            scaled = unpacked / vae.config.scaling_factor + vae.config.shift_factor
            images = vae.decode(scaled.to(vae.device, vae.dtype), return_dict=False)[0]
            return np.asarray(pipe.image_processor.postprocess(images, output_type="np"))

    def _encode(self, text: str) -> dict[str, np.ndarray]:
        """The transformer's inputs for a text, float32 [1, ...]."""
        import torch

        with torch.inference_mode():
            hidden, pooled, _ = self._pipe.encode_prompt(text, None, max_sequence_length=self._text_tokens)
        return {name: value.float().cpu().numpy() for name, value in ((_TEXT, hidden), (_POOLED, pooled))}


def _repeat(rows: dict[str, np.ndarray], samples: int) -> dict[str, np.ndarray]:
    return {name: np.repeat(row, samples, axis=0) for name, row in rows.items()}


def _setting(path: Path, name: str) -> JsonValue:
    return read_json_model(path, _Settings, _ADVICE).root.get(name)


def _require_hashes(folder: Path, record_sha256: str) -> None:
    record = folder / RECORD_NAME
    expected = {record: record_sha256}
    if sha256(record) == record_sha256:
        files = read_json_model(record, PipelineRecord, _AGAIN).files
        expected = {folder / PIPELINE_NAME / name: digest for name, digest in files.items()}
    for path, digest in expected.items():
        if (got := sha256(path)) != digest:
            raise DamagedFileError(f"'{path}' was altered: got sha256 {got}, expected {digest}; {_AGAIN}")
