"""A VAE that a bundle carries: from the latent that a denoising loop ends in to pictures, by diffusers' own class."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import JsonValue, RootModel

from adatsq_trt.errors import DamagedFileError, DependencyError
from adatsq_trt.files import read_json_model
from adatsq_trt.loading import PLAIN_LOADING, one_loader

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LTX, _OF_PATCHES = "AutoencoderKLLTXVideo", "AutoencoderKLFlux2"
_OF_VIDEOS = ("AutoencoderKLWan", "AutoencoderKLQwenImage", "AutoencoderKLHunyuanVideo15", _LTX)
_CLASSES = ("AutoencoderKL", _OF_PATCHES, *_OF_VIDEOS)
_AGAIN = "run 'adatsq-trt build engine' again"


class _Config(RootModel[dict[str, JsonValue]]):
    """A configuration of diffusers'."""


class Vae:
    """Decodes one sample at a time: a VAE's activations are many times as large as its pictures."""

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> None:
        """Load the VAE of a bundle whose files were verified.

        Args:
            folder: of the VAE.
            dtype: of its weights and activations; float32 unless given.
            device: that it is on.

        Raises:
            DamagedFileError: it is of another class, or diffusers cannot load it.
            DependencyError: diffusers is not installed.
        """
        try:
            import diffusers
            import torch
        except ImportError as error:
            raise DependencyError(
                "pictures of this bundle are decoded by its VAE, which needs diffusers and torch; install them"
            ) from error
        name = read_json_model(folder / "config.json", _Config, _AGAIN).root.get("_class_name")
        if name not in _CLASSES:
            raise DamagedFileError(f"'{folder}' is a {name}, expected one of {', '.join(_CLASSES)}; {_AGAIN}")
        try:
            with one_loader():
                self._vae: Any = (
                    getattr(diffusers, str(name))
                    .from_pretrained(
                        folder,
                        torch_dtype=dtype or torch.float32,
                        use_safetensors=True,
                        local_files_only=True,
                        variant=weights_variant(folder),
                        **PLAIN_LOADING,
                    )
                    .to(device)
                )
        except Exception as error:  # what diffusers raises depends on the file
            raise DamagedFileError(f"'{folder}' does not load ({error}); {_AGAIN}") from error

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents, float32 [B, (frames,) height, width, channels] → images, float32, likewise, 3 channels in [0, 1]."""
        import torch

        images = []
        with torch.inference_mode():
            for latent in torch.from_numpy(np.ascontiguousarray(latents)):
                scaled = self._unscaled(latent).movedim(-1, 0).to(self._vae.device, self._vae.dtype)
                images.append(self._decoded(scaled).movedim(0, -1).float().cpu())
        return np.asarray((torch.stack(images) / 2 + 0.5).clamp(0, 1))

    def _decoded(self, latent: Tensor) -> Tensor:
        """One sample, channels first; a picture is one frame for a VAE of videos."""
        is_frame = latent.ndim == 3 and type(self._vae).__name__ in _OF_VIDEOS
        sample = latent[None, :, None] if is_frame else latent[None]
        # LTX-Video's VAE may be told how much noise it still has to remove: none, as its pipeline says unless asked.
        time = (sample.new_zeros(1),) if self._vae.config.get("timestep_conditioning") else ()
        decoded: Tensor = self._vae.decode(sample, *time, return_dict=False)[0][0]
        return decoded[:, 0] if is_frame else decoded

    def _unscaled(self, latent: Tensor) -> Tensor:
        """From what the transformer sees, about unit variance, to the VAE's own numbers; channels last."""
        config = self._vae.config
        if type(self._vae).__name__ == _OF_PATCHES:
            return self._unscaled_patches(latent)
        if type(self._vae).__name__ == _LTX:
            mean, std = (getattr(self._vae, name).to(latent) for name in ("latents_mean", "latents_std"))
            return latent * std / config.scaling_factor + mean  # type: ignore[no-any-return]
        if "latents_std" in config and config.latents_std is not None:
            return latent * latent.new_tensor(config.latents_std) + latent.new_tensor(config.latents_mean)
        return latent / config.scaling_factor + (config.get("shift_factor") or 0.0)  # type: ignore[no-any-return]

    def _unscaled_patches(self, latent: Tensor) -> Tensor:
        """The same for a VAE that knows mean and variance of every channel of a patch of 2 x 2 cells."""
        statistics, (height, width, channels) = self._vae.bn, latent.shape
        mean, std = (
            x.view(channels, 2, 2).permute(1, 2, 0).repeat(height // 2, width // 2, 1).to(latent)
            for x in (statistics.running_mean, (statistics.running_var + statistics.eps).sqrt())
        )
        unscaled: Tensor = latent * std + mean
        return unscaled


def weights_variant(folder: Path) -> str | None:
    """The variant in the names of a diffusers component's weights, such as "fp16"; None where there is a plain name."""
    pattern = re.compile(r"\w+(?:\.safetensors\.index(?:\.(\w+))?\.json|(?:\.(\w+))?\.safetensors)")
    found = {match[1] or match[2] for file in folder.iterdir() if (match := pattern.fullmatch(file.name))}
    return None if None in found else next(iter(sorted(found)), None)
