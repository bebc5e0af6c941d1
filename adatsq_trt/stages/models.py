"""The model of a run: one of the zoo, or a checkpoint of the user's, whose prompts are encoded on the way."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from adatsq_trt.config import BuildConfig, option_name
from adatsq_trt.errors import MissingFileError, UserError
from adatsq_trt.files import read_json_model
from adatsq_trt.formats import resolve_formats
from adatsq_trt.progress import Reporter
from adatsq_trt.settings import IN_MEMORY, SETTINGS_NAME, PipelineSettings, Settings
from adatsq_trt.zoo import find_model, zoo_models

if TYPE_CHECKING:
    from adatsq_trt.checkpoints.loading import OpenedPipeline
    from adatsq_trt.stages.context import Context
    from adatsq_trt.stages.run_directory import RunDirectory
    from adatsq_trt.zoo.loading import LoadedModel

log = logging.getLogger(__name__)
_OF_CHECKPOINTS = ("base", "lora", "prompts", "negative_prompt", "encodings", "images", "height", "width", "frames")


def require_model(model: object, config: BuildConfig) -> None:
    """Refuse, before anything heavy is imported, what cannot be a model, and options that a zoo model does not take.

    Raises:
        UserError: says which, and what models there are.
    """
    if not isinstance(model, str | Path):
        return
    name = str(model)
    if name not in zoo_models() and ("/" in name or Path(name).exists()):
        return
    find_model(name)
    given = [option for option in _OF_CHECKPOINTS if getattr(config, option)]
    if given:
        raise UserError(
            f"{option_name(given[0])}: model '{name}' of the zoo is complete and takes none; leave it out, or name a "
            "checkpoint of your own"
        )


@dataclass(frozen=True)
class OpenedModel:
    """A model that was checked but, if it is a checkpoint of the user's, not loaded.

    Attributes:
        outline: its layers and settings; weights only if it is of the zoo.
        pipeline: the checkpoint.
    """

    outline: LoadedModel
    pipeline: OpenedPipeline | None = None

    @property
    def settings(self) -> PipelineSettings | None:
        """Where the checkpoint comes from."""
        return None if self.pipeline is None else self.pipeline.settings

    def load(self, run: RunDirectory, settings: Settings) -> LoadedModel:
        """Load the transformer and round it to its declared type; the prompts are encoded already.

        Raises:
            MismatchError: they are of other prompts or encoders.
        """
        if self.pipeline is None:
            return declared(self.outline, settings)
        from adatsq_trt.stages import embed

        loaded = self.pipeline.load(embed.read(run, self.pipeline))
        loaded.adapter.excluded = self.outline.adapter.excluded
        return declared(loaded, settings)


def open_model(model: object, config: BuildConfig) -> OpenedModel:
    """Check a model.

    Args:
        model: name of a model of the zoo; else a path, a hub id, or a pipeline or transformer in memory.
        config: choices of the build.

    Raises:
        UserError: it does not exist, is damaged, or is of an architecture that has no adapter.
    """
    if str(model) in zoo_models():
        from adatsq_trt.zoo.loading import load_model

        return OpenedModel(load_model(str(model)))
    in_memory = not isinstance(model, str | Path)
    return _open(
        PipelineSettings(
            path=IN_MEMORY if in_memory else str(model),
            base=None if config.base is None else str(config.base),
            loras=config.loras,
            height=config.height,
            width=config.width,
            frames=config.frames,
            # A scale of 1 is no guidance, which spares models the branch with the empty prompt.
            guided=config.guidance is None or config.guidance != 1.0,
            prompts=_drawn_prompts(config),
            encodings=None if config.encodings is None else str(Path(config.encodings).absolute()),
            negative_prompt=config.negative_prompt,
            images=None if config.images is None else str(Path(config.images).absolute()),
        ),
        model if in_memory else None,
    )


def exclude_layers(model: LoadedModel, patterns: Sequence[str]) -> tuple[str, ...]:
    """Have some layers of a model stay in full precision.

    Args:
        model: none of its layers is excluded yet.
        patterns: of module paths, with * and ?.

    Returns:
        Their module paths.

    Raises:
        UserError: a pattern that matches nothing, or patterns that leave nothing.
    """
    layers = tuple(model.adapter.quantizable_layers())
    for pattern in patterns:
        _matching("--exclude", pattern, layers, model)
    excluded = tuple(layer for layer in layers if any(fnmatch.fnmatchcase(layer, p) for p in patterns))
    if len(excluded) == len(layers):
        raise UserError(f"--exclude {', '.join(patterns)}: no layer is left to quantize; leave out a pattern")
    model.adapter.excluded = frozenset(excluded)
    return excluded


def restrict_formats(
    model: LoadedModel, restrictions: Sequence[str], formats: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Which formats some layers may have.

    Args:
        model: its excluded layers are left out already.
        restrictions: PATTERN=FORMATS each.
        formats: all candidates.

    Returns:
        Module path → formats, in the order of `formats`, of the layers that patterns match.

    Raises:
        UserError: a pattern that matches nothing, formats that are no candidates, or that leave a layer none.
    """
    layers, allowed = tuple(model.adapter.quantizable_layers()), dict[str, tuple[str, ...]]()
    for text in restrictions:
        pattern, sign, names = text.partition("=")
        if not sign or not names:
            raise UserError(f"--formats-for '{text}': expected PATTERN=FORMATS, such as '*.ff.*=fp8,bf16'")
        own = [fmt.name for fmt in resolve_formats(names)]
        for name in own:
            if name not in formats:
                raise UserError(
                    f"--formats-for '{text}': {name} is none of the candidates, which are {', '.join(formats)}; add it "
                    "to --formats"
                )
        for layer in _matching("--formats-for", pattern, layers, model):
            allowed[layer] = tuple(name for name in allowed.get(layer, formats) if name in own)
            if not allowed[layer]:
                raise UserError(
                    f"--formats-for '{text}': with the others it leaves layer '{layer}' no format; leave one out"
                )
    return allowed


def _matching(option: str, pattern: str, layers: Sequence[str], model: LoadedModel) -> list[str]:
    """The layers that a pattern of the user's matches."""
    found = [layer for layer in layers if fnmatch.fnmatchcase(layer, pattern)]
    if not found:
        near = get_close_matches(pattern, layers, n=3, cutoff=0.0)
        raise UserError(
            f"{option} '{pattern}': no layer of model '{model.name}' has such a name; the nearest are {', '.join(near)}"
        )
    return found


def _drawn_prompts(config: BuildConfig) -> tuple[str, ...]:
    """No more prompts are encoded than the largest batch of samples draws; each batch draws the first in turn."""
    prompts = _prompts(config)
    if config.encodings is not None:
        return prompts
    drawn = max(config.calibration_samples, config.selection_samples, config.held_out_samples)
    if config.prompts is not None and len(prompts) > drawn:
        log.warning(
            "--prompts: the first %d of %d prompts are drawn, encoded and in the bundle; more with --held-out-samples",
            drawn,
            len(prompts),
        )
    return prompts[:drawn]


def _prompts(config: BuildConfig) -> tuple[str, ...]:
    from adatsq_trt.checkpoints.prompts import default_prompts, read_prompts

    if config.encodings is not None:
        from adatsq_trt.checkpoints.encodings import encoded_prompts

        for option in ("prompts", "negative_prompt"):
            if getattr(config, option):
                name = option_name(option)
                raise UserError(f"--encodings: they stand in the place of {name}; leave one of them out")
        return encoded_prompts(Path(config.encodings))
    if config.prompts is None:
        return default_prompts()
    if isinstance(config.prompts, str | Path):
        return read_prompts(Path(config.prompts))
    return tuple(config.prompts)


def _open(settings: PipelineSettings, model: object = None) -> OpenedModel:
    from adatsq_trt.checkpoints.loading import open_pipeline

    if model is not None:
        from adatsq_trt.checkpoints.objects import open_object

        in_memory = open_object(model, settings)
        return OpenedModel(in_memory.outline, in_memory)
    opened = open_pipeline(settings)
    return OpenedModel(opened.outline, opened)


def open_run(path: Path, progress: Reporter | None = None) -> Context:
    """A finished run, for reading.

    Args:
        path: of the run directory.
        progress: who is told how work on it goes on.

    Raises:
        MissingFileError: there is no run directory, or it was never started.
        DamagedFileError: its settings are of another schema version.
    """
    from adatsq_trt.stages.context import Context
    from adatsq_trt.stages.run_directory import RunDirectory

    run = RunDirectory.existing(path)
    settings = read_json_model(run.path / SETTINGS_NAME, Settings)
    model = reopen_model(settings, run)
    model.adapter.excluded = frozenset(settings.excluded)
    return Context(run, settings, model, progress=progress or Reporter())


def reopen_model(settings: Settings, run: RunDirectory) -> LoadedModel:
    """The model of a finished run; its prompts' encodings are read from there.

    Raises:
        UserError: the model is not there any more, or is another one.
    """
    if settings.pipeline is None:
        from adatsq_trt.zoo.loading import load_model

        return declared(load_model(settings.model), settings)
    if settings.pipeline.path.startswith(IN_MEMORY):
        raise MissingFileError(
            f"'{run.path}' was made of a {settings.pipeline.path.removeprefix(IN_MEMORY)} in memory, which no file "
            "holds; save it with save_pretrained and build from that folder"
        )
    from adatsq_trt.stages import embed

    opened = _open(settings.pipeline)
    assert opened.pipeline is not None
    return declared(opened.pipeline.load(embed.read(run, opened.pipeline)), settings)


def declared(model: LoadedModel, settings: Settings) -> LoadedModel:
    """A model that was just loaded, its weights rounded to the type that its graphs will have."""
    import torch

    from adatsq_trt.models.declared import declare_type

    rounding = declare_type(model.adapter.trace_module(), getattr(torch, settings.base_type))
    return replace(model, rounding=rounding)


def pipeline_of(run: Path) -> Path | None:
    """Find the folder of the pipeline that a run directory was built from; None where there is none on this machine."""
    if not (run / SETTINGS_NAME).is_file():
        return None
    came_from = read_json_model(run / SETTINGS_NAME, Settings).pipeline
    if came_from is None:
        return None
    places = [Path(place) for place in (came_from.base, came_from.path) if place is not None]
    return next((place for place in places if place.is_dir()), None)  # a hub id is no reason for a download
