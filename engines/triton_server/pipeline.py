"""Text encoders of a diffusers pipeline beside a bundle of its transformer, in 16 bits, with the bundle's VAE.

How a prompt becomes the transformer's condition is in the bundle's manifest (`adatsq_trt.text_call`), with the hashes
of the files that do it. A model repository carries these files; none is loaded before it was compared.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import JsonValue, RootModel

from adatsq_trt.engines.bundle import VAE_FOLDER, BundleFiles
from adatsq_trt.engines.runtime import Bundle, Conditioning
from adatsq_trt.engines.vae import Vae, weights_variant
from adatsq_trt.errors import DamagedFileError, DependencyError, MismatchError, UserError, one_line
from adatsq_trt.files import read_json_model, sha256
from adatsq_trt.loading import of_parts, one_loader
from adatsq_trt.text_call import TextCall

PIPELINE_NAME = "pipeline"
_INDEX_NAME = "model_index.json"
_ADVICE = "name the folder of a pipeline that diffusers has saved"
_AGAIN = "run 'adatsq-trt deploy triton' again"


class _Settings(RootModel[dict[str, JsonValue]]):
    """One of diffusers' JSON files."""


def require_pipeline(folder: Path, bundle: BundleFiles) -> None:
    """Refuse a pipeline that a bundle was not built from.

    Raises:
        MissingFileError: it is not complete.
        DamagedFileError: one of its settings cannot be read.
        MismatchError: it is of another class, its text encoders or its scheduler are others than the bundle's, or the
            bundle does not know its text encoders.
    """
    got, call = _read(folder / _INDEX_NAME, _ADVICE).get("_class_name"), _text_call(bundle)
    if got != call.pipeline:
        raise MismatchError(
            f"'{folder}' is a {got}, the bundle was built from a {call.pipeline}; name the pipeline that it was built "
            "from, or leave --pipeline out"
        )
    for name, expected in call.files.items():
        if sha256(folder / name) != expected:
            raise MismatchError(
                f"'{folder / name}' is not the file that the bundle's prompts were encoded with; name the pipeline "
                "that the bundle was built from"
            )
    _require_scheduler(folder, bundle)


def _text_call(bundle: BundleFiles) -> TextCall:
    call = bundle.manifest.text
    if call is None:
        raise MismatchError(
            f"bundle '{bundle.folder}' holds a {bundle.manifest.architecture} and does not say how its text encoders "
            "work: it was built from encodings or from an object in memory, by an earlier version, or for a family "
            "that encodes by code of its own; build it again from the pipeline's folder, or leave --pipeline out"
        )
    return call


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


def place_pipeline(source: Path, bundle: BundleFiles, target: Path, link: bool = False) -> None:
    """Copy the text encoders and tokenizers of a pipeline to `target`/pipeline.

    Args:
        source: a pipeline that `require_pipeline` has accepted.
        bundle: says which files.
        target: folder of a model's version.
        link: link to the files instead of copying them.
    """
    for name in _text_call(bundle).files:
        placed = target / PIPELINE_NAME / name
        placed.parent.mkdir(parents=True, exist_ok=True)
        if link:
            placed.symlink_to((source / name).absolute())
        else:
            shutil.copyfile(source / name, placed)


class Pipeline:
    """Words to conditioning, and latents to pictures."""

    def __init__(self, folder: Path, bundle: Bundle, device: str = "cpu") -> None:
        """Load what `place_pipeline` has written, and the bundle's VAE.

        Args:
            folder: the pipeline's.
            bundle: the transformer.
            device: device of the text encoders and the VAE.

        Raises:
            DamagedFileError: a file is not the one that was recorded, or diffusers cannot load it.
            MissingFileError: a file is gone.
            DependencyError: a library is not installed.
        """
        self._bundle, self._call = bundle, _text_call(bundle.files)
        _require_files(folder, self._call)  # before the imports, which take longer than a refusal should
        if self._call.library is not None and find_spec(self._call.library) is None:
            raise DependencyError(
                f"{self._call.pipeline} reads its prompts with the library {self._call.library}, without which they "
                f"are encoded differently or not at all; install it with: pip install {self._call.library}"
            )
        import torch

        self._pipe = _load(folder, self._call).to(device)
        folder = bundle.files.folder / VAE_FOLDER
        self._vae = Vae(folder, torch.bfloat16, device) if bundle.manifest.image.vae else None
        self._shapes = {signature.name: signature.shape[1:] for signature in bundle.inputs}

    def conditioning(self, text: str, samples: int, name: str = "text") -> Conditioning:
        """Make the conditioning of samples of one prompt; the second branch of guidance has the bundle's own.

        Args:
            text: the prompt.
            samples: how many.
            name: of the parameter that it came in.

        Raises:
            UserError: it has more tokens than the bundle's graphs take.
        """
        import torch

        with torch.inference_mode():
            encoded = self._call.encode(self._pipe, text)
        rows = {key: self._filled(key, value.float().cpu().numpy(), name) for key, value in encoded.items()}
        conditional = {key: np.repeat(row[None], samples, axis=0) for key, row in rows.items()}
        return Conditioning(conditional, self._bundle.conditioning([0] * samples).unconditional)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents → images, float32, as `Bundle.decode`, with a VAE in 16 bits."""
        if self._vae is None:
            return self._bundle.decode(latents)
        return self._vae.decode(self._bundle.manifest.image.decode(latents))

    def _filled(self, name: str, row: np.ndarray, parameter: str) -> np.ndarray:
        """An encoding as the graph takes it: zeros follow the tokens of a short prompt."""
        shape = tuple(map(int, self._shapes[name]))
        if row.ndim > 1 and len(row) > shape[0]:
            raise UserError(
                f"{parameter}: got {len(row)} tokens, the bundle takes {shape[0]}; shorten it, or build the bundle "
                "with a prompt as long among its --prompts"
            )
        filled = np.zeros(shape, np.float32)
        filled[tuple(map(slice, row.shape))] = row
        return filled


def _load(folder: Path, call: TextCall) -> Any:
    """The pipeline with nothing but its text encoders and tokenizers."""
    import diffusers
    import torch

    given = {Path(name).parent.name for name in call.files}
    index = _read(folder / _INDEX_NAME, _AGAIN)
    weights = [folder / part for part in sorted(given) if any((folder / part).glob("*.safetensors"))]
    try:
        with one_loader():
            return of_parts(getattr(diffusers, call.pipeline)).from_pretrained(
                folder,
                torch_dtype=torch.bfloat16,
                variant=next(filter(None, map(weights_variant, weights)), None),
                use_safetensors=True,
                local_files_only=True,
                **{name: None for name, place in index.items() if isinstance(place, list) and name not in given},
            )
    except Exception as error:  # what diffusers raises depends on the file
        raise DamagedFileError(f"'{folder}' does not load ({one_line(error)}); {_AGAIN}") from error


def _read(path: Path, advice: str) -> dict[str, JsonValue]:
    return read_json_model(path, _Settings, advice).root


def _require_files(folder: Path, call: TextCall) -> None:
    for name, expected in call.files.items():
        if (got := sha256(folder / name)) != expected:
            raise DamagedFileError(f"'{folder / name}' was altered: got sha256 {got}, expected {expected}; {_AGAIN}")
