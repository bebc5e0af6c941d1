"""A bundle in the place of a diffusers pipeline's transformer.

    pipe.transformer = AdatsqTransformer.from_bundle("runs/demo")
    pipe(prompt, num_inference_steps=20, …)

The pipeline stays as it is: it keeps its scheduler, its guidance and its loop. So far this serves FluxPipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from adatsq_trt.engines.runtime import TIME_INPUT, Bundle
from adatsq_trt.errors import MismatchError

ARCHITECTURES = ("FluxTransformer2DModel",)
# A pipeline in bfloat16 rounds its timesteps to eight significant bits, before it divides them by 1000 and afterwards.
_TIME_TOLERANCE = 2 * 2.0**-8


class AdatsqTransformer(nn.Module):
    """Stands in for FluxTransformer2DModel; the step, and with it the formats, follow from the timestep.

    Attributes:
        bundle: what computes.
        config: the settings of the transformer that pipelines look at.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Wrap a bundle.

        Raises:
            MismatchError: its model is none that a supported pipeline has.
        """
        super().__init__()
        if bundle.manifest.architecture not in ARCHITECTURES:
            raise MismatchError(
                f"bundle '{bundle.files.folder}' holds a {bundle.manifest.architecture}; pipelines are supported for "
                f"{', '.join(ARCHITECTURES)}; run this one with Bundle.denoise"
            )
        self.bundle = bundle
        names = [signature.name for signature in bundle.inputs]
        self.config = FrozenDict(
            {"in_channels": bundle.manifest.latent_shape[-1], "guidance_embeds": "guidance" in names}
        )

    @classmethod
    def from_bundle(cls, path: Path | str) -> Self:
        """Open a bundle, or the bundle of a run directory.

        Raises:
            UserError: as `Bundle.open`, or a model that no supported pipeline has.
        """
        return cls(Bundle.open(path))

    @property
    def dtype(self) -> torch.dtype:
        """Type of inputs and outputs."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs are."""
        return torch.device("cpu")

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """What pipelines announce a guidance branch with; both branches of a step have the same formats."""
        yield

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicted velocity, with the arguments of FluxTransformer2DModel.

        Args:
            hidden_states: [rows, tokens, channels].
            encoder_hidden_states: [rows, text tokens, width].
            pooled_projections: [rows, width].
            timestep: [rows], scheduler's timestep / 1000; one step for all rows.
            img_ids: [tokens, 3]: the positions that the bundle was exported for.
            txt_ids: [text tokens, 3], zeros.
            guidance: [rows], for models that are trained with it.
            joint_attention_kwargs: must be empty.
            return_dict: whether to wrap the result.

        Raises:
            UserError: a timestep that is none of the bundle's steps; other positions, names or shapes.
        """
        if joint_attention_kwargs:
            raise MismatchError(f"joint_attention_kwargs {sorted(joint_attention_kwargs)}: a bundle takes none")
        self._require_positions(img_ids, txt_ids)
        given = {
            self.bundle.latent_input: hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            "pooled_projections": pooled_projections,
            TIME_INPUT: timestep,
        }
        if guidance is not None:
            given["guidance"] = guidance
        inputs = {name: value.detach().float().cpu().numpy() for name, value in given.items()}
        velocity = self.bundle.predict(self._step(inputs[TIME_INPUT]), inputs)
        sample = torch.from_numpy(velocity).to(hidden_states)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _step(self, timestep: np.ndarray) -> int:
        """The step of the bundle's schedule that a timestep belongs to."""
        schedule = self.bundle.schedule
        times = np.asarray([schedule.model_time(step) for step in range(schedule.steps)])
        step = int(np.abs(times - timestep.flat[0]).argmin())
        if np.abs(timestep - times[step]).max() > _TIME_TOLERANCE * times[step]:
            raise MismatchError(
                f"timestep: got {timestep.min():.6g} to {timestep.max():.6g}, the nearest step of the bundle is "
                f"{times[step]:.6g}; call the pipeline with num_inference_steps={schedule.steps}, the scheduler that "
                "the bundle was built with and the image size that it was exported for"
            )
        return step

    def _require_positions(self, img_ids: Tensor, txt_ids: Tensor) -> None:
        """Positions are constants of the graph, so the pipeline's must be the same."""
        height, width = self.bundle.manifest.image.shape.grid
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        wanted = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
        if txt_ids.any() or img_ids.shape != wanted.shape or not torch.equal(img_ids.cpu().long(), wanted):
            raise MismatchError(
                f"positions: got {len(img_ids)} image tokens, the bundle was exported for {height} x {width} and text "
                "positions of zero; call the pipeline with that height and width"
            )
