"""A checkpoint of the user's as the model of a run: checked first, then encoded, then loaded."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from pydantic import JsonValue
from safetensors import safe_open
from torch import Tensor, nn

from adatsq_trt.checkpoints.encodings import read_encodings
from adatsq_trt.checkpoints.images import PREFIX, ImageSet, encode_images, load_image_pipeline
from adatsq_trt.checkpoints.lora import Lora, fuse, parse_lora
from adatsq_trt.checkpoints.prompts import encode_prompts
from adatsq_trt.checkpoints.requirements import (
    fitting_canvas,
    require_configs,
    require_images,
    require_named,
    require_prompts,
)
from adatsq_trt.checkpoints.schedulers import make_scheduler, require_schedule
from adatsq_trt.checkpoints.single_file import convert, require_layout, transformer_weights
from adatsq_trt.checkpoints.source import INDEX, Source, find_source
from adatsq_trt.checkpoints.weights import (
    Prefixed,
    WeightFiles,
    find_weights,
    joined_weights,
    read_headers,
    refuse_eight_bits,
    require_finite,
    require_shapes,
    verified_sha256,
)
from adatsq_trt.errors import DamagedFileError, UserError, one_line
from adatsq_trt.files import MappedTensors, read_json_model
from adatsq_trt.image import ImageShape, PixelScale
from adatsq_trt.image_call import ImageCall
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.experts import ExpertsAdapter
from adatsq_trt.models.family import AGAIN, Canvas, JsonObject
from adatsq_trt.models.image_condition import ReadImage
from adatsq_trt.models.prompted import PromptedAdapter
from adatsq_trt.models.prompts import StoredPrompts
from adatsq_trt.models.stored import count_weights, fill, large_linears, named_weights
from adatsq_trt.schedule import EXPERTS, FIRST_EXPERT, calls_per_step
from adatsq_trt.settings import PipelineSettings
from adatsq_trt.text_call import TextCall
from adatsq_trt.zoo.loading import SCHEDULER_CONFIG, LoadedModel

OpenedT = TypeVar("OpenedT", bound="OpenedPipeline")
_SUFFIXES = (
    ".json",
    ".model",
    ".safetensors",
    ".txt",
    ".jinja",
)  # of encoders and tokenizers: neither pickles nor code
_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@dataclass(frozen=True)
class OpenedPipeline:
    """A checkpoint whose files are all there and go together; its weights are not in memory.

    Attributes:
        settings: the user's choices, with the defaults filled in.
        source: places of the parts.
        loras: to be fused.
    """

    settings: PipelineSettings
    source: Source
    loras: tuple[Lora, ...]

    @cached_property
    def outline(self) -> LoadedModel:
        """The model without weights and encodings: its layers and settings, on the meta device."""
        return self._model(self._outline, self._empty_encodings("meta"))

    def stand_in(self) -> LoadedModel:
        """The model with zeros for weights and encodings, whose calls take as long as the model's own."""
        transformer = self._each(self.source.family.make_empty)
        fill(transformer, {name: torch.zeros(value.shape) for name, value in transformer.state_dict().items()})
        encodings = self._empty_encodings("cpu")
        return self._model(
            transformer.requires_grad_(False), {name: value.zero_() for name, value in encodings.items()}
        )

    def _empty_encodings(self, device: str) -> dict[str, Tensor]:
        count, family = len(self.settings.prompts), self.source.family
        rows = count + family.negatives(count)
        width, pooled = family.widths(self._config)
        shapes = self._image_shapes(self._image(self._outline))
        # How long the longest prompt is shows when it is encoded.
        length = family.token_multiple if family.token_multiple > 1 else family.text_tokens
        if isinstance(family.image_condition, ReadImage):
            length += family.image_condition.seen_tokens(self._canvas)
        return {
            "tokens": torch.empty(rows, length, width, device=device),
            "pooled": torch.empty(rows, pooled, device=device),
            **{f"{PREFIX}{name}": torch.empty(count, *shape, device=device) for name, shape in shapes.items()},
        }

    def encode(self, on_prompt: Callable[[], None]) -> dict[str, Tensor]:
        """Encode the prompts, and the images that go with them.

        Args:
            on_prompt: called after each text and after each image.

        Returns:
            As `encode_prompts`, and "image.<graph input>" [prompts, ...].
        """
        return self._encode_texts(on_prompt) | self._encode_images(on_prompt)

    @property
    def encoded(self) -> int:
        """How many texts and images are encoded."""
        count, family = len(self.settings.prompts), self.source.family
        return count + family.negatives(count) + (count if family.image_condition else 0)

    def _encode_texts(self, on_prompt: Callable[[], None]) -> dict[str, Tensor]:
        """With the pipeline's own text encoders (`encode_prompts`), or from their encodings."""
        if self.settings.encodings is not None:
            family = self.source.family
            return read_encodings(Path(self.settings.encodings), *family.widths(self._config), family.token_multiple)
        texts = (self.settings.prompts, on_prompt, self.settings.negative_prompt)
        return encode_prompts(self.source, *texts, self._read_images)

    def _read_images(self) -> Iterator[Image.Image]:
        """The images of the prompts, for a text encoder that sees them."""
        pictures = self.images.pictures(len(self.settings.prompts), self._canvas, masked=False)
        return (image for image, _ in pictures)

    def _encode_images(self, on_image: Callable[[], None]) -> dict[str, Tensor]:
        """With the pipeline's own VAE, which is gone from memory afterwards."""
        family, condition = self.source.family, self.source.family.image_condition
        if condition is None:
            return {}
        pictures = self.images.pictures(len(self.settings.prompts), self._canvas, condition.masked)
        pipe = load_image_pipeline(family, self._vae, self.source.folder, condition.parts(self._config))
        encoded = encode_images(family, pipe, pictures, self._canvas, on_image)
        del pipe
        gc.collect()
        return {f"{PREFIX}{name}": value for name, value in encoded.items()}

    @cached_property
    def images(self) -> ImageSet:
        """The images that go with the prompts."""
        condition, folder = self.source.family.image_condition, self.settings.images
        return ImageSet.of(None if folder is None else Path(folder), condition is not None and condition.masked)

    @cached_property
    def images_sha256(self) -> str | None:
        """Hash of the images and of the VAE that encodes them; None for a model of text alone."""
        if self.source.family.image_condition is None:
            return None
        files = [self._vae / "config.json", *find_weights(self._vae).files]
        lines = [*map(verified_sha256, files), *self._image_files.values()]
        return digest([*lines, *self.images.lines(len(self.settings.prompts))])

    @cached_property
    def _image_files(self) -> dict[str, str]:
        """Of what encodes images beside the VAE: path in the pipeline's folder → sha256."""
        condition = self.source.family.image_condition
        return {} if condition is None else self._hashes(condition.parts(self._config))

    @property
    def _vae(self) -> Path:
        return self.source.folder / "vae"

    def load(self, encodings: Mapping[str, Tensor]) -> LoadedModel:
        """Check the transformer's weights and fuse the LoRA files.

        Large layers' weights stay on disk, or, of a single file in another layout than diffusers', in its own type.

        Args:
            encodings: of the prompts (`encode_prompts`).

        Raises:
            DamagedFileError: weights that are NaN or infinite.
            MismatchError: a LoRA that does not fit.
        """
        tensors = self._tensors
        require_finite(tensors.items(), self.source.transformer)
        transformer = self._each(self.source.family.make_empty)
        fill(transformer, tensors)
        for lora in self.loras:
            fuse(self.source.family, transformer, lora)
            require_finite(named_weights(transformer), lora.file)
        return self._model(transformer.requires_grad_(False), encodings)

    @property
    def _tensors(self) -> Mapping[str, Tensor]:
        """The transformer's weights by name, as diffusers names them."""
        if self.source.boundary_ratio is not None:
            own = {name: MappedTensors(find_weights(place).files, AGAIN) for name, place in self._places}
            return Prefixed(own)
        weights = self._weights
        return MappedTensors(weights.files, AGAIN, weights.prefix) if self._stays_mapped else self._converted()

    @property
    def _places(self) -> Iterator[tuple[str, Path]]:
        return iter(self.source.transformers.items())

    def _each(self, make: Callable[[Mapping[str, JsonValue]], nn.Module]) -> nn.Module:
        """The transformer as it is made of its configuration; of two experts both, by name."""
        if self.source.boundary_ratio is None:
            return make(self._config)
        return nn.ModuleDict({name: make(self._config) for name, _ in self._places})

    @cached_property
    def _stays_mapped(self) -> bool:
        """Whether large layers' weights need not be in memory."""
        return set(self._weights.shapes) == set(self._outline.state_dict())

    @cached_property
    def _config(self) -> dict[str, JsonValue]:
        return read_json_model(self.source.config, JsonObject, AGAIN).root

    @cached_property
    def _outline(self) -> nn.Module:
        config = self.source.config
        try:
            return self._each(self.source.family.make_outline)
        except (TypeError, ValueError, AttributeError, ZeroDivisionError, RuntimeError) as error:
            raise DamagedFileError(f"'{config}' does not describe a model ({one_line(error)}); {AGAIN}") from error

    @cached_property
    def _widest(self) -> torch.dtype:
        """The type that all weights fit in."""
        types = {_TYPES.get(name, torch.float32) for name in self._weights.dtypes.values()}
        return types.pop() if len(types) == 1 else torch.float32

    def _converted(self) -> dict[str, Tensor]:
        """The weights that diffusers makes of a single file in another layout, in the file's widest type."""
        weights, file = self._weights, self.source.transformer
        with safe_open(file, framework="pt") as opened:
            given = {name: opened.get_tensor(f"{weights.prefix}{name}") for name in weights.shapes}
        converted = convert(self.source.family, given)
        return {name: converted.pop(name).to(self._widest, copy=True) for name in list(converted)}

    @property
    def _canvas(self) -> Canvas:
        settings = self.settings
        assert settings.height is not None
        assert settings.width is not None
        return Canvas(settings.height, settings.width, settings.frames)

    def _image(self, transformer: Any) -> ImageShape:
        family, several = self.source.family, self.source.boundary_ratio is not None
        one = transformer[FIRST_EXPERT] if several else transformer
        return family.image(one, self._canvas, family.vae_scale(self.source.folder))

    def _image_shapes(self, image: ImageShape) -> dict[str, tuple[int, ...]]:
        """Graph input → its shape for one sample, of those that an image decides."""
        return self.source.family.image_shapes(self._config, image, self.source.folder)

    def _model(self, transformer: Any, encodings: Mapping[str, Tensor]) -> LoadedModel:
        source, settings, family = self.source, self.settings, self.source.family
        cell, image = family.vae_scale(source.folder), self._image(transformer)
        scale = PixelScale(image.patch_size * cell.pixels, cell.frames or 1)
        images = {name: encodings[f"{PREFIX}{name}"] for name in self._image_shapes(image)}
        prompts = StoredPrompts(settings.prompts, encodings["tokens"], encodings["pooled"], images)

        def adapt(module: Any) -> PromptedAdapter:
            return family.adapter(module, prompts, self._scheduler, image, not settings.guided)

        adapter: ModelAdapter
        if source.boundary_ratio is None:
            adapter = adapt(transformer)
        else:
            adapter = ExpertsAdapter({name: adapt(transformer[name]) for name in EXPERTS}, source.boundary_ratio)
        steps, guidance = family.pipeline_defaults(self._config, source.folder)
        calls = calls_per_step(type(self._scheduler).__name__)
        steps = calls * steps - (calls - 1)
        require_schedule(adapter, steps, source.folder / SCHEDULER_CONFIG)
        return LoadedModel(
            source.name, adapter, self.weights_sha256, self.model_sha256, steps, guidance, scale, self._vae
        )

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of the transformer's weights and of what is fused into them; of a single file its own."""
        files = [*self._weights.files]
        hashes = [verified_sha256(file) for file in files]
        if len(hashes) == 1 and not self.loras:
            return hashes[0]
        return digest([*hashes, *self._lora_lines()])

    def _lora_lines(self) -> list[str]:
        # Of a pipeline with one transformer as in earlier runs.
        return [f"{verified_sha256(lora.file)} {lora.scale!r} {lora.expert}".rstrip() for lora in self.loras]

    @cached_property
    def encoders_sha256(self) -> str:
        """Hash of text encoders and tokenizers, or of the file of encodings."""
        if self.settings.encodings is not None:
            return verified_sha256(Path(self.settings.encodings))
        return digest(f"{name} {sha256}" for name, sha256 in self._encoder_files.items())

    @cached_property
    def _encoder_files(self) -> dict[str, str]:
        """Of text encoders and tokenizers: path in the pipeline's folder → sha256."""
        return self._hashes(self.source.family.encoders)

    def _hashes(self, parts: Iterable[str]) -> dict[str, str]:
        files = {f"{part}/{file.name}": file for part in parts for file in files_of(self.source.folder / part)}
        return {name: verified_sha256(file) for name, file in files.items()}

    @property
    def image_call(self) -> ImageCall | None:
        """Inputs that an image decides; None where the pipeline takes none."""
        inputs, family = self.outline.adapter.image_inputs, self.source.family
        files = self._image_files | (self._encoder_files if family.reads_image else {})
        return family.image_call(inputs, files, self.settings.negative_prompt)

    @property
    def text_call(self) -> TextCall | None:
        """How a text becomes what the transformer is given, with the files that do it; None where they do not."""
        call = self.source.family.text_call
        if call is None or self.settings.encodings is not None:
            return None
        files = {INDEX: verified_sha256(self.source.folder / INDEX), **self._encoder_files}
        return call.model_copy(update={"files": files})

    @property
    def encoder_bytes(self) -> int:
        """Most that is resident while the text encoders are loaded, and after them what encodes images."""
        return max(self._text_encoder_bytes, self._image_encoder_bytes)

    @property
    def _text_encoder_bytes(self) -> int:
        if self.settings.encodings is not None:
            return 2 * Path(self.settings.encodings).stat().st_size
        folders = [self.source.folder / name for name in self.source.family.encoders if name.startswith("text_encoder")]
        encoders = [file.stat().st_size for folder in folders for file in find_weights(folder).files]
        return sum(encoders) + max(encoders)

    @property
    def _image_encoder_bytes(self) -> int:
        """In float32, whatever type the files have; none for a model of text alone."""
        condition = self.source.family.image_condition
        if condition is None:
            return 0
        stored = [name for name in condition.parts(self._config) if "processor" not in name]
        files = [file for part in ("vae", *stored) for file in find_weights(self.source.folder / part).files]
        return sum(3 * file.stat().st_size for file in files)  # 16 bits as they are read, and 32

    @property
    def mapped_types(self) -> set[torch.dtype]:
        """Of the large layers' weights, where all stay on disk unchanged; else empty."""
        if self.loras or not self._stays_mapped:
            return set()
        return {_TYPES.get(self._weights.dtypes[f"{path}.weight"], torch.float32) for path in self._large}

    @property
    def resident_bytes(self) -> int:
        """Resident bytes of the loaded transformer, with the copy that a call makes of a stored weight.

        A LoRA that is no plain product of matrices takes more.
        """
        sizes = [linear.in_features * linear.out_features for linear in self._large.values()]
        # As they are rounded to the declared type, and as they were before.
        small = (4 + 4) * (count_weights(self._outline) - sum(sizes))
        # A copy in float32, one in 16 bits and the pages that they are made of; with a LoRA also its product, and that
        # scaled.
        copy = (4 + 2 + 4 + (8 if self.loras else 0)) * max(sizes, default=0)
        changes = sum(2 * lora.file.stat().st_size for lora in self.loras)  # in float32
        return small + copy + changes + (0 if self._stays_mapped else self._widest.itemsize * sum(sizes))

    @cached_property
    def _large(self) -> dict[str, nn.Linear]:
        """Layers whose weights stay as they are stored."""
        return large_linears(self._outline)

    @property
    def file_bytes(self) -> int:
        """Of the largest weight file, where it is mapped as a whole while it is read."""
        return 0 if self._stays_mapped else max(file.stat().st_size for file in self._weights.files)

    @cached_property
    def model_sha256(self) -> str:
        """Hash of all that decides what the model draws, but for the VAE."""
        source, settings = self.source, self.settings
        files = [*source.configs, *files_of(source.folder / "scheduler")]
        lines = [f"{file.name} {verified_sha256(file)}" for file in files]
        if source.boundary_ratio is not None:
            lines.append(f"boundary_ratio {source.boundary_ratio!r}")
        lines += [self.weights_sha256, self.encoders_sha256, repr((settings.height, settings.width))]
        lines += [repr((settings.frames, settings.guided)), *settings.prompts]
        if settings.negative_prompt:  # earlier runs have none
            lines.append(f"negative {settings.negative_prompt}")
        if self.images_sha256 is not None:
            lines.append(f"images {self.images_sha256}")
        return digest(lines)

    @cached_property
    def _scheduler(self) -> Any:
        return make_scheduler(self.source.family, self.source.folder)

    @cached_property
    def _weights(self) -> WeightFiles:
        source = self.source
        if source.single_file:
            return transformer_weights(source.family, read_headers([source.transformer]))
        if source.boundary_ratio is not None:
            return joined_weights({name: find_weights(place) for name, place in self._places})
        return find_weights(source.transformer)


def open_pipeline(settings: PipelineSettings) -> OpenedPipeline:
    """Find a checkpoint's parts and check all that can be told without loading its weights.

    Args:
        settings: sizes may be None, which stands for the pipeline's default.

    Raises:
        UserError: as `find_source`, `parse_lora` and the checks of weights; also for sizes that do not fit.
    """
    silence()
    source = find_source(settings.path, settings.base)
    return open_source(settings, source, lambda settings, loras: OpenedPipeline(settings, source, loras))


def open_source(
    settings: PipelineSettings, source: Source, make: Callable[[PipelineSettings, tuple[Lora, ...]], OpenedT]
) -> OpenedT:
    """Check all that can be told of a model without loading its weights, and fill in the defaults.

    Args:
        settings: sizes may be None, which stands for the pipeline's default.
        source: places of the parts.
        make: the opened model, from settings and LoRA files.

    Raises:
        UserError: as `parse_lora` and the checks of weights; also for sizes that do not fit.
    """
    opened = make(settings, tuple(parse_lora(text) for text in settings.loras))
    require_configs(source)
    require_named(source, opened.loras)
    require_prompts(source.family, settings)
    source.family.require_libraries()
    source.family.require_supported(opened._config, source.config, source.folder)
    outline = opened._outline
    weights = opened._weights
    refuse_eight_bits(weights)
    if source.single_file:
        require_layout(source.family, weights, outline, source.config)
    else:
        require_shapes(weights, outline, source.config)
    find_weights(source.folder / "vae")
    canvas = fitting_canvas(settings, source)
    require_images(source.family, settings, opened.images, canvas)
    places = {"path": _absolute(settings.path), "base": settings.base and _absolute(settings.base)}
    loras = tuple(map(str, opened.loras))
    update = {**places, "loras": loras, **asdict(canvas)}
    guided = settings.guided and source.family.guided
    if settings.negative_prompt and not guided:
        raise UserError(
            f"--negative-prompt '{settings.negative_prompt}': guidance takes no second branch here; leave it out, or "
            "guide a model that is not distilled with another scale than 1"
        )
    resolved = settings.model_copy(update={**update, "guided": guided})
    return make(resolved, opened.loras)


def _absolute(text: str) -> str:
    """A path means the same from everywhere; a hub id stays one."""
    return str(Path(text).absolute()) if Path(text).exists() else text


def files_of(folder: Path) -> Iterator[Path]:
    """List the files of a part of a pipeline, without pickles and code."""
    yield from sorted(path for path in folder.glob("*") if path.is_file() and path.suffix in _SUFFIXES)


def digest(lines: Iterable[str]) -> str:
    """Hash over some lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def silence() -> None:
    """Our own progress and messages are enough."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
