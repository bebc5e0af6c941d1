"""The pipelines that can be loaded: their parts, their text encoding, and the adapter of their transformer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue, RootModel
from torch import Tensor, nn

from adatsq_trt.errors import MismatchError
from adatsq_trt.files import read_json_model
from adatsq_trt.models.adapter import ImageShape, ModelAdapter
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.models.prompts import StoredPrompts

AGAIN = "save the pipeline again with diffusers' save_pretrained, or download it again"
Encodings = dict[str, Tensor]


class JsonObject(RootModel[dict[str, JsonValue]]):
    """Any JSON object: what is in it is diffusers' business."""


@dataclass(frozen=True)
class Canvas:
    """What is drawn.

    Attributes:
        height: in pixels.
        width: in pixels.
    """

    height: int
    width: int


@dataclass(frozen=True)
class Parts:
    """A pipeline's parts that an adapter is made of.

    Attributes:
        transformer: the diffusers module, or one on the meta device.
        scheduler: of diffusers.
        prompts: texts.
        encodings: "conditional.<graph input>" and "unconditional.<graph input>" → [prompts or 1, ...].
        canvas: what is drawn.
        vae_scale: pixels along one side of a cell of the VAE's latent.
    """

    transformer: Any
    scheduler: Any
    prompts: tuple[str, ...]
    encodings: Mapping[str, Tensor]
    canvas: Canvas
    vae_scale: int


class PipelineKind(ABC):
    """One of diffusers' pipelines.

    Attributes:
        pipeline: its class name.
        transformer: class name of its transformer.
        encoders: folders of its text encoders and tokenizers.
        text_tokens: most tokens of a prompt.
    """

    pipeline: str
    transformer: str
    encoders: tuple[str, ...]
    text_tokens: int

    def load_class(self, name: str) -> Any:
        """A class of diffusers."""
        import diffusers

        return getattr(diffusers, name)

    def make_outline(self, config: Mapping[str, JsonValue]) -> nn.Module:
        """The transformer without weights, on the meta device."""
        with torch.device("meta"):
            module: nn.Module = self.load_class(self.transformer).from_config(dict(config))
        return module

    def make_scheduler(self, folder: Path) -> Any:
        """The scheduler; the denoising loop is Euler's method on a flow.

        Raises:
            MismatchError: the pipeline has another one.
            MissingFileError: it has none.
        """
        file = folder / "scheduler" / "scheduler_config.json"
        name = read_json_model(file, JsonObject, AGAIN).root.get("_class_name")
        if name != "FlowMatchEulerDiscreteScheduler":
            raise MismatchError(
                f"'{file}': got the scheduler {name}, expected FlowMatchEulerDiscreteScheduler; save the pipeline with "
                "that one"
            )
        return self.load_class("FlowMatchEulerDiscreteScheduler").from_pretrained(file.parent, local_files_only=True)

    @abstractmethod
    def defaults(self, transformer: nn.Module) -> tuple[int, float]:
        """Denoising steps and guidance scale when none are asked for, as the pipeline's own documentation has them."""

    @abstractmethod
    def default_canvas(self, vae_scale: int) -> Canvas:
        """What is drawn when no size is asked for."""

    @abstractmethod
    def multiple(self, transformer: nn.Module, vae_scale: int) -> int:
        """Height and width in pixels are multiples of this."""

    @abstractmethod
    def encode(self, pipe: Any, prompt: str) -> Encodings:
        """Encode one prompt with a pipeline without transformer: "<graph input>" → [1, ...]."""

    @abstractmethod
    def outline_encodings(self, transformer: nn.Module, prompts: int) -> Encodings:
        """Encodings without values, on the meta device, named as in `Parts`."""

    @abstractmethod
    def adapter(self, parts: Parts) -> ModelAdapter:
        """The transformer's adapter."""

    def encode_all(self, pipe: Any, prompts: Sequence[str], on_prompt: Callable[[], None]) -> Encodings:
        """All that the adapter needs of some prompts, named as in `Parts`; one at a time, so memory stays small."""
        rows = []
        for prompt in prompts:
            rows.append(self.encode(pipe, prompt))
            on_prompt()
        return {f"conditional.{name}": torch.cat([row[name] for row in rows]) for name in rows[0]}


class FluxKind(PipelineKind):
    """FluxPipeline: guidance is an input of the transformer (dev) or there is none (schnell)."""

    pipeline = "FluxPipeline"
    transformer = FluxAdapter.architecture
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    text_tokens = 512
    _PATCH, _SIZE = 2, 128  # cells of the VAE's latent

    def defaults(self, transformer: nn.Module) -> tuple[int, float]:
        """Of Flux dev and of Flux schnell."""
        return (28, 3.5) if _config(transformer).guidance_embeds else (4, 0.0)

    def default_canvas(self, vae_scale: int) -> Canvas:
        """1024 x 1024 with Flux's own VAE."""
        return Canvas(self._SIZE * vae_scale, self._SIZE * vae_scale)

    def multiple(self, transformer: nn.Module, vae_scale: int) -> int:
        """A token is a patch of 2 x 2 cells."""
        return self._PATCH * vae_scale

    def encode(self, pipe: Any, prompt: str) -> Encodings:
        """T5's tokens and CLIP's pooled projection."""
        tokens, pooled, _ = pipe.encode_prompt(prompt, None, device="cpu", max_sequence_length=self.text_tokens)
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def outline_encodings(self, transformer: nn.Module, prompts: int) -> Encodings:
        """[prompts, text_tokens, width of T5] and [prompts, width of CLIP]."""
        config = _config(transformer)
        return {
            "conditional.encoder_hidden_states": _empty(prompts, self.text_tokens, config.joint_attention_dim),
            "conditional.pooled_projections": _empty(prompts, config.pooled_projection_dim),
        }

    def adapter(self, parts: Parts) -> ModelAdapter:
        """A Flux whose patches make up the VAE's latent."""
        encodings, token = parts.encodings, self._PATCH * parts.vae_scale
        prompts = StoredPrompts(
            parts.prompts,
            encodings["conditional.encoder_hidden_states"],
            encodings["conditional.pooled_projections"],
        )
        image = ImageShape(
            parts.canvas.height // token,
            parts.transformer.config.in_channels // self._PATCH**2,
            self._PATCH,
            columns=parts.canvas.width // token,
            vae=True,
        )
        return FluxAdapter(parts.transformer, prompts, parts.scheduler, image, guidance_distilled=True)


KINDS: tuple[PipelineKind, ...] = (FluxKind(),)


def _config(module: nn.Module) -> Any:
    return module.config


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")
