"""A bundle in the place of a diffusers pipeline's transformer.

    pipe.transformer = AdatsqTransformer.from_bundle("runs/demo")
    pipe(prompt, num_inference_steps=20, …)

The pipeline stays as it is: it keeps its scheduler, its guidance and its loop. This serves FluxPipeline, ZImagePipeline
and WanPipeline. With UniPC, which Wan's pipelines come with, the pipeline combines the predictions of several steps; it
draws what the bundle's own loop draws, which takes Euler's steps at the same sigmas, with

    pipe.scheduler = pipe.transformer.scheduler
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from adatsq_trt.engines.bundle import ShapeRecord
from adatsq_trt.engines.runtime import TIME_INPUT, Bundle
from adatsq_trt.engines.step_clock import StepClock
from adatsq_trt.errors import MismatchError
from adatsq_trt.schedule import TRAIN_TIMESTEPS

_TEXT = "encoder_hidden_states"


class AdatsqTransformer(nn.Module):
    """Stands in for a transformer; the step, and with it the formats, follow from the timestep.

    Attributes:
        architecture: diffusers' class that it stands in for.
        bundle: what computes.
    """

    architecture: ClassVar[str]

    def __init__(self, bundle: Bundle) -> None:
        """Wrap a bundle of this architecture; see `from_bundle`, which finds the class."""
        super().__init__()
        self.bundle = bundle
        self._clock = StepClock()
        self._config = FrozenDict(self._settings())

    @property
    def config(self) -> FrozenDict:
        """The settings of the transformer that pipelines look at, each before its loop."""
        self._clock.finish()
        return self._config

    @classmethod
    def from_bundle(cls, bundle: Bundle | Path | str) -> AdatsqTransformer:
        """Wrap a bundle that is open, or open one, or the one of a run directory.

        Raises:
            UserError: as `Bundle.open`, or a model that no supported pipeline has.
        """
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        kinds = {kind.architecture: kind for kind in (AdatsqFlux, AdatsqZImage, AdatsqWan)}
        if bundle.manifest.architecture not in kinds:
            raise MismatchError(
                f"bundle '{bundle.files.folder}' holds a {bundle.manifest.architecture}; pipelines are supported for "
                f"{', '.join(kinds)}; run this one with Bundle.denoise"
            )
        return kinds[bundle.manifest.architecture](bundle)

    @property
    def dtype(self) -> torch.dtype:
        """Type of inputs and outputs; others are converted."""
        return self.bundle.dtype

    @property
    def device(self) -> torch.device:
        """Where the pipeline's tensors should be; those that are elsewhere are copied."""
        return self.bundle.device

    @property
    def scheduler(self) -> FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler:
        """A scheduler with which the pipeline takes the steps of the bundle's own loop."""
        return self.bundle.schedule.scheduler()

    @contextmanager
    def cache_context(self, name: str, **_about: Any) -> Iterator[None]:
        """What pipelines announce a guidance branch with; both branches of a step have the same formats."""
        self._clock.enter(name)
        try:
            yield
        finally:
            self._clock.enter(None)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """What pipelines call at their end.

        Raises:
            MismatchError: as `StepClock.finish`.
        """
        self._clock.finish()

    def _settings(self) -> dict[str, Any]:
        """The configuration."""
        return {"in_channels": self.bundle.manifest.latent_shape[0]}

    def _velocity(self, inputs: Mapping[str, Tensor], model_time: Tensor, shape: ShapeRecord | None = None) -> Tensor:
        """The bundle's prediction, of the latents' type.

        Args:
            inputs: the graph's inputs but for the time.
            model_time: [rows], timestep / 1000; one step for all rows.
            shape: the size, where the latents do not tell it.

        Raises:
            UserError: a time that is none of the bundle's steps; other names or shapes.
        """
        latents = inputs[self.bundle.latent_input]
        shape = self._shape(latents) if shape is None else shape
        size = shape.size if self.bundle.sizes else None
        schedule = self.bundle.files.schedule(size)
        step = self._clock.step(model_time, schedule)
        # The step's own time: the pipeline's is the same but for the rounding on its way.
        time = latents.new_full((len(latents),), schedule.model_time(step), dtype=torch.float32)
        velocity = self.bundle.predict(step, {**inputs, TIME_INPUT: time}, size=size)
        return self._clock.checked(velocity.to(latents))

    @property
    def _shapes(self) -> tuple[ShapeRecord, ...]:
        """All sizes of the bundle."""
        return self.bundle.manifest.shapes or (self.bundle.manifest.shape(),)

    def _shape(self, latents: Tensor) -> ShapeRecord:
        """The size that latents have."""
        for shape in self._shapes:
            if shape.latent_shape == tuple(latents.shape[1:]):
                return shape
        wanted = " and ".join(str(list(shape.latent_shape)) for shape in self._shapes)
        raise MismatchError(
            f"latents: got {list(latents.shape[1:])}, the bundle was exported for {wanted}; call the pipeline with "
            f"that size{self._names}"
        )

    @property
    def _names(self) -> str:
        """What sizes there are in pixels, where the bundle says it."""
        return f": {', '.join(shape.name for shape in self.bundle.manifest.shapes)}" if self.bundle.sizes else ""


class AdatsqFlux(AdatsqTransformer):
    """Stands in for FluxTransformer2DModel."""

    architecture = "FluxTransformer2DModel"

    def __init__(self, bundle: Bundle) -> None:
        """As of all."""
        super().__init__(bundle)
        # A generation passes the same tensors at every step: they are read once.
        self._positions = WeakIdKeyDictionary()

    def _settings(self) -> dict[str, Any]:
        """The channels of a token, and whether the guidance scale is an input."""
        names = [signature.name for signature in self.bundle.inputs]
        return {"in_channels": self.bundle.manifest.latent_shape[-1], "guidance_embeds": "guidance" in names}

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
            img_ids: [tokens, 3]: the positions of a size that the bundle was exported for.
            txt_ids: [text tokens, 3], zeros.
            guidance: [rows], for models that are trained with it.
            joint_attention_kwargs: must be empty.
            return_dict: whether to wrap the result.

        Raises:
            UserError: a timestep that is none of the bundle's steps; other positions, names or shapes.
        """
        _require_no("joint_attention_kwargs", joint_attention_kwargs)
        shape = self._shape_at(img_ids, txt_ids)
        inputs = {
            "hidden_states": hidden_states,
            _TEXT: encoder_hidden_states,
            "pooled_projections": pooled_projections,
            **({} if guidance is None else {"guidance": guidance}),
        }
        sample = self._velocity(inputs, timestep, shape)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _shape_at(self, img_ids: Tensor, txt_ids: Tensor) -> ShapeRecord:
        """The size that positions belong to: several may have the same number of tokens."""
        for ids in (img_ids, txt_ids):
            if ids not in self._positions:
                self._positions[ids] = ids.cpu().long()
        given, text = self._positions[img_ids], self._positions[txt_ids]
        for shape in self._shapes:
            rows, columns = torch.meshgrid(*map(torch.arange, shape.image.shape.grid), indexing="ij")
            wanted = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
            if not text.any() and torch.equal(given, wanted):
                return shape
        grids = " and ".join("{} x {}".format(*shape.image.shape.grid) for shape in self._shapes)
        raise MismatchError(
            f"positions: got {len(img_ids)} image tokens, the bundle was exported for {grids} and text positions of "
            f"zero; call the pipeline with that height and width{self._names}"
        )


class AdatsqZImage(AdatsqTransformer):
    """Stands in for ZImageTransformer2DModel; the pipeline's guidance_scale is the bundle's less one."""

    architecture = "ZImageTransformer2DModel"

    @property
    def in_channels(self) -> int:
        """Channels of a latent."""
        return int(self.config["in_channels"])  # Z-Image's pipeline asks before its loop

    def forward(
        self,
        x: Sequence[Tensor],
        t: Tensor,
        cap_feats: Sequence[Tensor],
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[list[Tensor]]:
        """The opposite of the predicted velocity, with the arguments of ZImageTransformer2DModel.

        Args:
            x: latents [channels, 1, height, width], one for each row.
            t: [rows], 1 - timestep / 1000; one step for all rows.
            cap_feats: captions [tokens, width], of as many tokens as the bundle was exported for or fewer.
            return_dict: whether to wrap the result.
            joint_attention_kwargs: must be empty.

        Raises:
            UserError: a timestep that is none of the bundle's steps; captions that are too long; other shapes.
        """
        _require_no("joint_attention_kwargs", joint_attention_kwargs)
        length = next(int(signature.shape[1]) for signature in self.bundle.inputs if signature.name == _TEXT)
        longest = max(map(len, cap_feats))
        if longest > length:
            raise MismatchError(
                f"caption: got {longest} tokens, the bundle was exported for {length}; call the pipeline with "
                f"max_sequence_length={length} or a shorter prompt"
            )
        captions = [functional.pad(caption, (0, 0, 0, length - len(caption))) for caption in cap_feats]
        inputs = {self.bundle.latent_input: torch.cat(list(x), dim=1).transpose(0, 1), _TEXT: torch.stack(captions)}
        sample = list(-self._velocity(inputs, 1 - t.float())[:, :, None])
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class AdatsqWan(AdatsqTransformer):
    """Stands in for WanTransformer3DModel."""

    architecture = "WanTransformer3DModel"

    def _settings(self) -> dict[str, Any]:
        """No size is ruled out here: those that the bundle was not exported for are refused with the latents."""
        return {**super()._settings(), "patch_size": (1, 1, 1)}

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicted velocity, with the arguments of WanTransformer3DModel.

        Args:
            hidden_states: [rows, channels, frames, height, width].
            timestep: [rows], in (0, 1000]; one step for all rows.
            encoder_hidden_states: [rows, text tokens, width].
            return_dict: whether to wrap the result.
            attention_kwargs: must be empty.

        Raises:
            UserError: a timestep that is none of the bundle's steps; other shapes.
        """
        _require_no("attention_kwargs", attention_kwargs)
        inputs = {self.bundle.latent_input: hidden_states, _TEXT: encoder_hidden_states}
        sample = self._velocity(inputs, timestep.float() / TRAIN_TIMESTEPS)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _require_no(name: str, settings: Mapping[str, Any] | None) -> None:
    """Refuse settings of the attention, which a compiled graph cannot follow."""
    if settings:
        raise MismatchError(f"{name} {sorted(settings)}: a bundle takes none")
