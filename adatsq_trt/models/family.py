"""A family of models: one of diffusers' pipelines with the adapter of its transformer, all that is known of it.

A family is a file of this folder and a line in `families`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import JsonValue, RootModel
from torch import Tensor, nn

from adatsq_trt.errors import DamagedFileError, DependencyError, MismatchError
from adatsq_trt.files import read_json_model
from adatsq_trt.image import ImageShape
from adatsq_trt.image_call import ImageCall
from adatsq_trt.models.image_condition import ImageCondition, ReadImage
from adatsq_trt.models.prompted import PromptedAdapter
from adatsq_trt.models.stored import EmptyOnMeta
from adatsq_trt.schedule import EULER
from adatsq_trt.text_call import TextCall

AGAIN = "save the pipeline again with diffusers' save_pretrained, or download it again"


class JsonObject(RootModel[dict[str, JsonValue]]):
    """Any JSON object: what is in it is diffusers' business."""


@dataclass(frozen=True)
class Canvas:
    """Size of the picture or video that is drawn.

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
    """Pixels and frames that a cell of the VAE's latent stands for.

    Attributes:
        pixels: along one side.
        frames: of a video, but for the first.
    """

    pixels: int
    frames: int | None = None


class Family(ABC):
    """A pipeline of diffusers, or one that is built like those, and its transformer.

    Attributes:
        adapter: of its transformer.
        pipeline: class name.
        encoders: folders of its text encoders and tokenizers.
        settings_parts: folders of parts without weights that the family reads, such as a guider.
        text_tokens: most tokens of a prompt.
        text_library: library that the pipeline reads prompts with: one that cleans them, or that its processor needs.
        text_outputs: graph input → index into what the pipeline's `encode_prompt` returns; tokens first, then a pooled
            projection or a mask.
        text_mask: whether the second of these is a mask, a number for each token, instead of a pooled projection.
        text_masks: of these tokens, graph input → index of the mask that says which there are.
        second_multiple: where the second of `text_outputs` is a text and no pooled projection: it may have no tokens,
            and is filled up with zeros to a multiple of so many.
        text_options: arguments of `encode_prompt` beside the prompt, the device and `max_sequence_length`.
        token_multiple: prompts are filled up with zeros to a multiple of so many tokens.
        patch: cells of the VAE's latent along one side of a token.
        packed: whether a latent is a row of tokens; else it has the VAE's own shape.
        guided: whether guidance takes a second branch, with the empty prompt.
        schedulers: classes that the pipeline's loop is known for.
        scheduler_options: class of schedulers → an option of it → the value without which the loop is another one.
        transformer_options: of the transformer's configuration → the value that is supported.
        pipeline_options: of the pipeline → the value that is supported.
        experts: whether a pipeline may have a second transformer for the steps below its `boundary_ratio`.
        instead: advice where a pipeline is refused.
        unused_weights: weights that single files hold beside the transformer's own.
        vae_channels: the VAE's setting that says how many channels its latents have.
        canvas: size that is drawn when none is asked for; Flux's and Z-Image's own VAEs have 8 pixels to a cell.
        image_condition: what the pipeline makes of an image beside the prompt; None where it takes none.
    """

    adapter: type[PromptedAdapter]
    pipeline: str
    encoders: tuple[str, ...] = ("text_encoder", "tokenizer")
    settings_parts: tuple[str, ...] = ()
    text_tokens: int = 512
    text_library: str | None = None
    text_outputs: ClassVar[Mapping[str, int]] = {"encoder_hidden_states": 0}
    text_mask: bool = False
    text_masks: ClassVar[Mapping[str, int]] = {}
    second_multiple: int = 0
    text_options: ClassVar[Mapping[str, JsonValue]] = {}
    token_multiple: int = 1
    patch: int = 2
    packed: bool = False
    guided: bool = True
    schedulers: tuple[str, ...] = (EULER,)
    scheduler_options: ClassVar[Mapping[str, Mapping[str, JsonValue]]] = {}
    transformer_options: ClassVar[Mapping[str, JsonValue]] = {}
    pipeline_options: ClassVar[Mapping[str, JsonValue]] = {}
    experts: bool = False
    instead: str = "choose another checkpoint"
    unused_weights: tuple[str, ...] = ()
    vae_channels: str = "latent_channels"
    canvas: Canvas = Canvas(1024, 1024)
    image_condition: ClassVar[ImageCondition | None] = None

    @abstractmethod
    def defaults(self, config: Mapping[str, JsonValue]) -> tuple[int, float]:
        """Denoising steps and guidance scale of the pipeline, from its transformer's configuration."""

    def configured(self, options: Mapping[str, Any]) -> Self:
        """The family as the pipeline's own options (those of model_index.json) make it."""
        return self

    def pipeline_defaults(self, config: Mapping[str, JsonValue], folder: Path) -> tuple[int, float]:
        """The same for a pipeline whose folder may say more."""
        return self.defaults(config)

    def pipeline_canvas(self, config: Mapping[str, JsonValue]) -> Canvas:
        """The size that is drawn when none is asked for, of a pipeline whose transformer may say another one."""
        return self.canvas

    def encode(self, pipe: Any, prompt: str) -> tuple[Tensor, Tensor]:
        """Encode one prompt with a pipeline without transformer: tokens [tokens, width], pooled [width] or [0].

        A second text [tokens, width] takes the place of the pooled projection.

        A family whose pipeline is asked otherwise than by `text_options` and `text_outputs` writes its own; its bundles
        are not served with text.
        """
        tokens, *pooled = self._encoding_call().encode(pipe, prompt).values()
        return tokens, pooled[0] if pooled else tokens.new_empty(0)

    @property
    def text_call(self) -> TextCall | None:
        """The same as data, for a bundle's manifest; None where a text alone is not enough, or for code of its own."""
        return self._encoding_call() if type(self).encode is Family.encode and not self.reads_image else None

    @property
    def reads_image(self) -> bool:
        """Whether the text encoder sees the image."""
        return isinstance(self.image_condition, ReadImage)

    def negatives(self, prompts: int) -> int:
        """How often the negative prompt is encoded: once, or with the image of each prompt."""
        return prompts if self.reads_image else 1

    def image_call(
        self, inputs: Collection[str], files: Mapping[str, str] | None = None, negative_prompt: str = ""
    ) -> ImageCall | None:
        """Inputs that an image decides, as data for a bundle's manifest; None where the pipeline takes no image.

        Args:
            inputs: of the graph.
            files: of what encodes the image beside the VAE: path in the pipeline's folder → sha256.
            negative_prompt: of the unguided branch; of no account where the text encoder does not see the image.
        """
        condition = self.image_condition
        if condition is None:
            return None
        return ImageCall(
            pipeline=self.pipeline,
            inputs=tuple(inputs),
            masked=condition.masked,
            files=dict(files or {}),
            texts=tuple(self.text_outputs) if self.reads_image else (),
            negative_prompt=negative_prompt if self.reads_image else "",
        )

    def image_shapes(self, config: Mapping[str, Any], image: ImageShape, folder: Path) -> dict[str, tuple[int, ...]]:
        """Graph input → its shape for one sample, of those that an image decides; `folder` is the pipeline's."""
        return {} if self.image_condition is None else self.image_condition.shapes(config, image, folder)

    def _encoding_call(self) -> TextCall:
        return TextCall(
            pipeline=self.pipeline,
            arguments={"max_sequence_length": self.text_tokens, **self.text_options},
            outputs=dict(self.text_outputs),
            masks=dict(self.text_masks),
            library=self.text_library,
        )

    def lora_key(self, layer: str, part: str) -> str:
        """A matrix of a LoRA in the authors' names, as diffusers' converter for this architecture reads it.

        Args:
            layer: "diffusion_model." and its name with dots, or one word, as kohya's trainers write it.
            part: "up" or "down".
        """
        return f"{layer}.lora_{part}.weight"

    def lora_layer(self, name: str) -> str:
        """A layer that trainers write in one word, as `lora_key` takes it."""
        return name

    def own_name(self, weight: str) -> str:
        """A weight in the authors' names, as the transformer calls it."""
        return weight

    @property
    def transformer(self) -> str:
        """Class name of the transformer."""
        return self.adapter.model_class.__name__

    def widths(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Width of a text token and of the pooled projection or mask, or 0, from the transformer's configuration."""
        pooled = self.adapter.pooled_width
        beside = self.text_tokens if self.text_mask else 0
        return config[self.adapter.text_width], beside if pooled is None else config[pooled]

    def load_pipeline_class(self) -> Any:
        """The pipeline's class."""
        import diffusers

        return getattr(diffusers, self.pipeline)

    def make_outline(self, config: Mapping[str, JsonValue]) -> nn.Module:
        """The transformer without weights, on the meta device."""
        with torch.device("meta"):
            module: nn.Module = self.adapter.model_class.from_config(dict(config))
        return module

    def make_empty(self, config: Mapping[str, JsonValue]) -> nn.Module:
        """The transformer with its buffers but without weights: large parameters are on the meta device."""
        with EmptyOnMeta():
            module: nn.Module = self.adapter.model_class.from_config(dict(config))
        return module

    def require_libraries(self) -> None:
        """Refuse to encode prompts without a library that changes what comes out.

        Raises:
            DependencyError: names it.
        """
        if self.text_library is not None and util.find_spec(self.text_library) is None:
            raise DependencyError(
                f"{self.pipeline} reads its prompts with the library {self.text_library}, without which they are "
                f"encoded differently or not at all; install it with: pip install {self.text_library}"
            )

    def require_supported(self, config: Mapping[str, JsonValue], file: Path, folder: Path) -> None:
        """Refuse a transformer that takes or gives anything but latents of the pipeline's VAE, a text and its image.

        Args:
            config: of the transformer.
            file: the configuration, as messages name it.
            folder: of the pipeline.

        Raises:
            MismatchError: names the setting.
        """
        given, returned = config.get("in_channels"), self.returned_channels(config)
        vae = folder / "vae" / "config.json"
        channels = read_json_model(vae, JsonObject, AGAIN).root.get(self.vae_channels)
        cells = self.patch**2 if self.packed else 1
        beside = self._image_channels(channels * cells, folder) if isinstance(channels, int) else 0
        noise = given - beside if isinstance(given, int) else given
        if noise != (given if returned is None else returned):
            took = (
                f"expected {beside} channels of an image beside those of the noise"
                if beside
                else "it takes a picture or a mask beside the noise, expected a transformer that takes noise and a text"
            )
            raise MismatchError(
                f"'{file}': in_channels {given} and out_channels {returned}: {took}; choose another {self.pipeline}"
            )
        for name, value in self.transformer_options.items():
            if name in config and config[name] != value:
                raise MismatchError(
                    f"'{file}': {name} is {config[name]!r}, expected {value!r}, as in a transformer that takes noise "
                    f"and a text; choose another {self.pipeline}"
                )
        if isinstance(channels, int) and noise != channels * cells:
            raise MismatchError(
                f"'{file}': in_channels {given}, the VAE '{vae}' has {self.vae_channels} {channels}, which makes "
                f"{channels * cells}; choose a transformer and a pipeline that go together"
            )

    def _image_channels(self, latent: int, folder: Path) -> int:
        """Channels of the transformer's input that an image has beside the noise's `latent`."""
        condition = self.image_condition
        return 0 if condition is None else condition.channels(latent, self.vae_scale(folder))

    def returned_channels(self, config: Mapping[str, JsonValue]) -> JsonValue:
        """Channels of the transformer's output, counted as `in_channels`; None for as many."""
        return config.get("out_channels")

    def vae_scale(self, folder: Path) -> VaeScale:
        """Compute the pixels that a cell of the latent stands for, from the VAE's configuration.

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
        channels: Any = self.returned_channels(transformer.config) or transformer.config.in_channels
        return ImageShape(rows, channels // side**2, side, columns, frames, vae=True)
