"""The pipelines that can be loaded: their parts, their text encoding, and what they draw unless told otherwise."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import JsonValue, RootModel
from torch import Tensor, nn

from adatsq_trt.checkpoints.schedulers import make_scheduler
from adatsq_trt.errors import DamagedFileError, DependencyError, MismatchError
from adatsq_trt.files import read_json_model
from adatsq_trt.image import ImageShape
from adatsq_trt.models.stored import EmptyOnMeta
from adatsq_trt.schedule import EULER, UNIPC
from adatsq_trt.zoo.loading import SCHEDULER_CONFIG

log = logging.getLogger(__name__)
AGAIN = "save the pipeline again with diffusers' save_pretrained, or download it again"


class JsonObject(RootModel[dict[str, JsonValue]]):
    """Any JSON object: what is in it is diffusers' business."""


@dataclass(frozen=True)
class Canvas:
    """What is drawn.

    Attributes:
        height: in pixels.
        width: in pixels.
        frames: of a video; None for a picture.
    """

    height: int
    width: int
    frames: int | None = None


@dataclass(frozen=True)
class VaeScale:
    """What a cell of the VAE's latent stands for.

    Attributes:
        pixels: along one side.
        frames: of a video, but for the first.
    """

    pixels: int
    frames: int | None = None


class PipelineKind(ABC):
    """One of diffusers' pipelines.

    Attributes:
        pipeline: its class name.
        transformer: class name of its transformer.
        encoders: folders of its text encoders and tokenizers.
        text_tokens: most tokens of a prompt.
        text_library: that the pipeline cleans prompts with where it is installed.
        token_multiple: prompts are filled up with zeros to a multiple of so many tokens.
        patch: cells of the VAE's latent along one side of a token.
        packed: whether a latent is a row of tokens; else it has the VAE's own shape.
        guided: whether guidance takes a second branch, with the empty prompt.
        schedulers: that the pipeline's loop is known for.
        scheduler_options: of the scheduler that the loop looks at itself → the value that is followed.
        transformer_options: of the transformer's configuration → the value that is supported.
        pipeline_options: of the pipeline → the value that is supported.
        vae_channels: the VAE's setting that says how many channels its latents have.
        canvas: what is drawn when nothing else is asked for; Flux's and Z-Image's own VAEs have 8 pixels to a cell.
    """

    pipeline: str
    transformer: str
    encoders: tuple[str, ...] = ("text_encoder", "tokenizer")
    text_tokens: int = 512
    text_library: str | None = None
    token_multiple: int = 1
    patch: int = 2
    packed: bool = False
    guided: bool = True
    schedulers: tuple[str, ...] = (EULER,)
    scheduler_options: ClassVar[Mapping[str, JsonValue]] = {}
    transformer_options: ClassVar[Mapping[str, JsonValue]] = {}
    pipeline_options: ClassVar[Mapping[str, JsonValue]] = {}
    vae_channels: str = "latent_channels"
    canvas: Canvas = Canvas(1024, 1024)

    @abstractmethod
    def defaults(self, config: Mapping[str, JsonValue]) -> tuple[int, float]:
        """Denoising steps and guidance scale of the pipeline, from its transformer's configuration."""

    @abstractmethod
    def encode(self, pipe: Any, prompt: str) -> tuple[Tensor, Tensor]:
        """Encode one prompt with a pipeline without transformer: tokens [tokens, width], pooled [width] or [0]."""

    @abstractmethod
    def widths(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Width of a text token and of the pooled projection, from the transformer's configuration."""

    def load_class(self, name: str) -> Any:
        """A class of diffusers."""
        import diffusers

        return getattr(diffusers, name)

    def make_outline(self, config: Mapping[str, JsonValue]) -> nn.Module:
        """The transformer without weights, on the meta device."""
        with torch.device("meta"):
            module: nn.Module = self.load_class(self.transformer).from_config(dict(config))
        return module

    def make_empty(self, config: Mapping[str, JsonValue]) -> nn.Module:
        """The transformer with its buffers but without weights: large parameters are on the meta device."""
        with EmptyOnMeta():
            module: nn.Module = self.load_class(self.transformer).from_config(dict(config))
        return module

    def make_scheduler(self, folder: Path) -> Any:
        """The scheduler whose sigmas the loop takes, with Euler's method.

        Raises:
            MismatchError: the pipeline has another one, or one with an option that is not followed.
            MissingFileError: it has none.
            DamagedFileError: diffusers cannot make it.
        """
        file = folder / SCHEDULER_CONFIG
        config = read_json_model(file, JsonObject, AGAIN).root
        return make_scheduler(file, config, self.schedulers, self.scheduler_options)

    def require_libraries(self) -> None:
        """Refuse to encode prompts without a library that changes what comes out.

        Raises:
            DependencyError: names it.
        """
        if self.text_library is not None and util.find_spec(self.text_library) is None:
            raise DependencyError(
                f"{self.pipeline} cleans its prompts with the library {self.text_library}, without which they are "
                "encoded differently; install it with: pip install 'adatsq-trt[pipelines]'"
            )

    def require_supported(self, config: Mapping[str, JsonValue], file: Path, folder: Path) -> None:
        """Refuse a transformer that takes or gives anything but latents of the pipeline's VAE and a text.

        Args:
            config: of the transformer.
            file: what messages call the configuration.
            folder: of the pipeline.

        Raises:
            MismatchError: names the setting.
        """
        given, returned = config.get("in_channels"), config.get("out_channels")
        if returned not in (None, given):
            raise MismatchError(
                f"'{file}': in_channels {given} and out_channels {returned}: it takes a picture or a mask beside the "
                f"noise, expected a transformer that takes noise and a text; choose another {self.pipeline}"
            )
        for name, value in self.transformer_options.items():
            if name in config and config[name] != value:
                raise MismatchError(
                    f"'{file}': {name} is {config[name]!r}, expected {value!r}, as in a transformer that takes noise "
                    f"and a text; choose another {self.pipeline}"
                )
        vae = folder / "vae" / "config.json"
        channels = read_json_model(vae, JsonObject, AGAIN).root.get(self.vae_channels)
        cells = self.patch**2 if self.packed else 1
        if isinstance(channels, int) and given != channels * cells:
            raise MismatchError(
                f"'{file}': in_channels {given}, the VAE '{vae}' has {self.vae_channels} {channels}, which makes "
                f"{channels * cells}; choose a transformer and a pipeline that go together"
            )

    def vae_scale(self, folder: Path) -> VaeScale:
        """What a cell of the latent stands for.

        Raises:
            DamagedFileError: the VAE's configuration does not say it.
        """
        config = folder / "vae" / "config.json"
        blocks = read_json_model(config, JsonObject, AGAIN).root.get("block_out_channels")
        if not isinstance(blocks, list) or not blocks:
            raise DamagedFileError(f"'{config}' has no list 'block_out_channels'; {AGAIN}")
        return VaeScale(2 ** (len(blocks) - 1))

    def image(self, transformer: Any, canvas: Canvas, scale: VaeScale) -> ImageShape:
        """How the transformer's latent is laid out."""
        side = self.patch if self.packed else 1
        rows, columns = canvas.height // (side * scale.pixels), canvas.width // (side * scale.pixels)
        frames = None if canvas.frames is None else (canvas.frames - 1) // (scale.frames or 1) + 1
        return ImageShape(rows, transformer.config.in_channels // side**2, side, columns, frames, vae=True)


class FluxKind(PipelineKind):
    """FluxPipeline: guidance is an input of the transformer (dev), or there is none (schnell)."""

    pipeline, transformer = "FluxPipeline", "FluxTransformer2DModel"
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    packed, guided = True, False
    scheduler_options: ClassVar[Mapping[str, JsonValue]] = {
        "use_flow_sigmas": False
    }  # a scheduler that was UniPC is asked for its own sigmas
    transformer_options: ClassVar[Mapping[str, JsonValue]] = {"patch_size": 1}

    def defaults(self, config: Mapping[str, JsonValue]) -> tuple[int, float]:
        """Of Flux dev and of Flux schnell."""
        return (28, 3.5) if config.get("guidance_embeds") else (4, 0.0)

    def encode(self, pipe: Any, prompt: str) -> tuple[Tensor, Tensor]:
        """T5's tokens and CLIP's pooled projection."""
        tokens, pooled, _ = pipe.encode_prompt(prompt, None, device="cpu", max_sequence_length=self.text_tokens)
        return tokens[0], pooled[0]

    def widths(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Of T5 and of CLIP."""
        return config["joint_attention_dim"], config["pooled_projection_dim"]


class ZImageKind(PipelineKind):
    """ZImagePipeline. Its own scale of guidance is one less than ours: it adds s (v - v0) to v."""

    pipeline, transformer = "ZImagePipeline", "ZImageTransformer2DModel"
    token_multiple = 32
    transformer_options: ClassVar[Mapping[str, JsonValue]] = {
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "siglip_feat_dim": None,
    }

    def defaults(self, config: Mapping[str, JsonValue]) -> tuple[int, float]:
        """Of Z-Image; Z-Image-Turbo, which has the same configuration, wants 9 steps and a scale of 1."""
        return 50, 6.0

    def encode(self, pipe: Any, prompt: str) -> tuple[Tensor, Tensor]:
        """As many tokens of the language model as the prompt has."""
        embeddings, _ = pipe.encode_prompt(
            prompt, device="cpu", do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        return embeddings[0], embeddings[0].new_empty(0)

    def widths(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Of the language model."""
        return config["cap_feat_dim"], 0


class WanKind(PipelineKind):
    """WanPipeline: text to video."""

    pipeline, transformer = "WanPipeline", "WanTransformer3DModel"
    canvas = Canvas(480, 832, 81)
    text_library = "ftfy"
    schedulers = (EULER, UNIPC)
    transformer_options: ClassVar[Mapping[str, JsonValue]] = {
        "image_dim": None,
        "added_kv_proj_dim": None,
        "pos_embed_seq_len": None,
    }
    pipeline_options: ClassVar[Mapping[str, JsonValue]] = {"expand_timesteps": False, "boundary_ratio": None}
    vae_channels = "z_dim"

    def defaults(self, config: Mapping[str, JsonValue]) -> tuple[int, float]:
        """Of Wan 2.1."""
        return 50, 5.0

    def encode(self, pipe: Any, prompt: str) -> tuple[Tensor, Tensor]:
        """UMT5's tokens, filled up with zeros."""
        tokens, _ = pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens, device="cpu"
        )
        return tokens[0], tokens.new_empty(0)

    def widths(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Of UMT5."""
        return config["text_dim"], 0

    def make_scheduler(self, folder: Path) -> Any:
        """UniPC, which Wan's pipelines are saved with, gives its sigmas; the steps are Euler's."""
        scheduler = super().make_scheduler(folder)
        if type(scheduler).__name__ == UNIPC:
            log.warning("'%s': denoising with Euler's method on the sigmas of UniPC", folder / SCHEDULER_CONFIG)
        return scheduler

    def vae_scale(self, folder: Path) -> VaeScale:
        """Of Wan's video VAE."""
        config = folder / "vae" / "config.json"
        values = read_json_model(config, JsonObject, AGAIN).root
        pixels, frames = values.get("scale_factor_spatial", 8), values.get("scale_factor_temporal", 4)
        if not isinstance(pixels, int) or not isinstance(frames, int):
            raise DamagedFileError(f"'{config}': scale factors {pixels} and {frames}, expected integers; {AGAIN}")
        return VaeScale(pixels, frames)


KINDS: tuple[PipelineKind, ...] = (FluxKind(), ZImageKind(), WanKind())
