"""A pipeline or transformer that is in memory already, as the model of a run; nothing of it is ever changed.

Its tensors are shared, not copied: large layers look theirs up at every call, as those of a checkpoint's files. What
is small and read from files elsewhere (configurations, scheduler, tokenizers, VAE) is saved to a temporary folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from adatsq_trt.checkpoints.loading import OpenedPipeline, digest, files_of, open_source, silence
from adatsq_trt.checkpoints.prompts import encode_with
from adatsq_trt.checkpoints.source import Source, find_base, safe_name
from adatsq_trt.checkpoints.weights import WeightFiles
from adatsq_trt.errors import MismatchError, UserError
from adatsq_trt.models.families import family_of_pipeline, family_of_transformer, known_families
from adatsq_trt.models.family import Family
from adatsq_trt.schedule import EXPERTS, FIRST_EXPERT, SECOND_EXPERT
from adatsq_trt.settings import IN_MEMORY, PipelineSettings
from adatsq_trt.text_call import TextCall

_ENCODING = Lock()  # tokenizers serve one thread at a time, and two builds may have one pipeline
# As safetensors calls them.
_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


@dataclass(frozen=True)
class OpenedObject(OpenedPipeline):
    """A pipeline or transformer in memory that can be the model of a run.

    Attributes:
        transformer: diffusers' object.
        pipe: the pipeline that it belongs to, which encodes the prompts; None where a base in files does.
        sketch: the temporary folder.
    """

    transformer: nn.Module = field(kw_only=True)
    pipe: Any = field(default=None, kw_only=True)
    sketch: TemporaryDirectory[str] = field(kw_only=True)

    def _encode_texts(self, on_prompt: Callable[[], None]) -> dict[str, Tensor]:
        """With the pipeline's text encoders, or with those of the base."""
        if self.pipe is None or self.settings.encodings is not None:
            return super()._encode_texts(on_prompt)
        encoders = [getattr(self.pipe, name) for name in self.source.family.encoders]
        with _ENCODING, _evaluating([part for part in encoders if isinstance(part, nn.Module)]):
            texts = (self.settings.prompts, on_prompt, self.settings.negative_prompt)
            return encode_with(self.pipe, self.source, *texts, self._read_images)

    @cached_property
    def _tensors(self) -> Mapping[str, Tensor]:
        state: dict[str, Tensor] = self.transformer.state_dict()
        return {name: value.detach() for name, value in state.items()}

    @cached_property
    def _weights(self) -> WeightFiles:
        shapes = {name: tuple(value.shape) for name, value in self._tensors.items()}
        types = {name: _TYPES.get(value.dtype, str(value.dtype)) for name, value in self._tensors.items()}
        return WeightFiles((), shapes, dict.fromkeys(shapes, self.source.transformer), types)

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of the transformer's tensors and of what is fused into them."""
        return digest([tensors_sha256(self._tensors), *self._lora_lines()])

    @cached_property
    def encoders_sha256(self) -> str:
        """Hash of the text encoders' tensors and configurations, and of the tokenizers."""
        if self.pipe is None or self.settings.encodings is not None:
            return super().encoders_sha256
        lines = []
        for name in self.source.family.encoders:
            part = getattr(self.pipe, name)
            if isinstance(part, nn.Module):
                config: Any = part.config
                lines += [f"{name} {tensors_sha256(part.state_dict())}", config.to_json_string()]
            else:
                folder = Path(self.sketch.name, name)
                lines += [f"{name}/{file.name} {_sha256(file)}" for file in files_of(folder)]
        return digest(lines)

    @property
    def text_call(self) -> TextCall | None:
        """None where text encoders are in memory: no file is known to hold them."""
        return super().text_call if self.pipe is None else None

    @property
    def _text_encoder_bytes(self) -> int:
        """Text encoders are in memory already."""
        own = self.pipe is not None and self.settings.encodings is None
        return 0 if own else super()._text_encoder_bytes

    @property
    def file_bytes(self) -> int:
        """Nothing is read."""
        return 0


def open_object(model: Any, settings: PipelineSettings) -> OpenedObject:
    """Check a pipeline or transformer in memory.

    Args:
        model: diffusers' object.
        settings: the user's choices; a transformer needs a `base`.

    Raises:
        MismatchError: an object that has no adapter, or whose parts do not go together.
        UserError: a base where none belongs or none where one is needed; tensors that are not in the processor's
            memory; sizes that do not fit.
    """
    silence()
    family, pipe = _family(model)
    transformer = model if pipe is None else pipe.transformer
    encoders = {} if pipe is None else {name: getattr(pipe, name, None) for name in family.encoders}
    if settings.encodings is None and None in encoders.values():
        missing = next(name for name, part in encoders.items() if part is None)
        raise UserError(f"the pipeline has no {missing}: load it with one, or pass encodings=FILE")
    ratio = _boundary_ratio(pipe, family)
    first = transformer
    if ratio is not None:
        transformer = nn.ModuleDict({name: getattr(pipe, name) for name in EXPERTS})
    parts = [transformer] if pipe is None else [transformer, *encoders.values(), pipe.vae]
    condition = family.image_condition
    _require_here([part for part in parts if isinstance(part, nn.Module)])
    sketch = TemporaryDirectory(prefix="adatsq-model-")
    folder = Path(sketch.name)
    for place, part in transformer.items() if ratio is not None else [(FIRST_EXPERT, transformer)]:
        part.save_config(folder / place)
    if pipe is None:
        base, base_family = find_base(settings.base, f"a {family.transformer} in memory", "it has no text encoders")
        if base_family.transformer != family.transformer:
            raise MismatchError(f"base '{base}' is a {base_family.pipeline}; name a {family.pipeline}")
        family = base_family
    else:
        if settings.base is not None:
            raise UserError(f"base {settings.base}: the model is a whole pipeline already; leave base out")
        base = folder
        pipe.scheduler.save_config(folder / "scheduler")
        pipe.vae.save_pretrained(folder / "vae")
        for name in family.settings_parts:
            if getattr(pipe, name, None) is None:
                raise UserError(f"the pipeline has no {name}: load it with one")
            getattr(pipe, name).save_pretrained(folder / name)
        for name, part in encoders.items():
            if part is not None and not isinstance(part, nn.Module):
                part.save_pretrained(folder / name)
        for name in () if condition is None else condition.parts(first.config):
            if getattr(pipe, name, None) is None:
                raise UserError(f"the pipeline has no {name}, which its transformer needs: load it with one")
            getattr(pipe, name).save_pretrained(folder / name)
    name = safe_name(str(getattr(first.config, "_name_or_path", "") or type(model).__name__))
    source = Source(name, family, base, folder / FIRST_EXPERT, folder / FIRST_EXPERT / "config.json", ratio)
    named = settings.model_copy(update={"path": f"{IN_MEMORY}{type(model).__name__}"})

    def opened(settings: PipelineSettings, loras: Any) -> OpenedObject:
        return OpenedObject(settings, source, loras, transformer=transformer, pipe=pipe, sketch=sketch)

    return open_source(named, source, opened)


def _boundary_ratio(pipe: Any, family: Family) -> float | None:
    """That of a pipeline with two transformers; None where there is one.

    Raises:
        MismatchError: the pipeline treats its transformer in a way that is not supported.
    """
    if pipe is None:
        return None
    for option, value in family.pipeline_options.items():
        if pipe.config.get(option, value) != value:
            raise MismatchError(f"the pipeline's {option} is {pipe.config[option]!r}, expected {value!r}")
    ratio, second = pipe.config.get("boundary_ratio"), getattr(pipe, SECOND_EXPERT, None)
    if ratio is None and second is None:
        return None
    found = type(second).__name__
    if not family.experts or found != family.transformer or not isinstance(ratio, float | int) or not 0 < ratio < 1:
        raise MismatchError(
            f"the pipeline's boundary_ratio is {ratio!r} and its transformer_2 a {found}, expected a ratio between 0 "
            f"and 1 with a {family.transformer}, or neither"
        )
    return float(ratio)


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Without dropout inside the block; afterwards every module has its own mode again."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training


def _family(model: Any) -> tuple[Family, Any]:
    """The family of a pipeline or transformer, and the pipeline where there is one."""
    name = type(model).__name__
    if family := family_of_pipeline(name):
        found = type(model.transformer).__name__
        if found != family.transformer:
            raise MismatchError(f"the pipeline's transformer is a {found}, expected a {family.transformer}")
        return family.configured(model.config), model
    if family := family_of_transformer(name):
        return family, None
    raise MismatchError(
        f"the model is a {name}, expected a name, a path, a hub id, or an object of one of these classes: "
        f"{known_families()}; pass such a model, or write an adapter (docs/adapters.md)"
    )


def _require_here(modules: list[nn.Module]) -> None:
    for module in modules:
        for name, tensor in module.state_dict().items():
            if tensor.device.type != "cpu":
                raise UserError(
                    f"{type(module).__name__}: '{name}' is on {tensor.device}, expected the processor's memory; move "
                    "the model with .to('cpu') first (the device that computes is chosen with device=)"
                )


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash over names, types, shapes and bytes."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        hasher.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        hasher.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
