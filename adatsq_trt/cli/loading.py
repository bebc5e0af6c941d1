"""The model of a run: one of the zoo, or a checkpoint of the user's, whose prompts are encoded on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adatsq_trt.errors import UserError
from adatsq_trt.settings import PipelineSettings, Settings
from adatsq_trt.zoo import find_model, zoo_models

if TYPE_CHECKING:
    from adatsq_trt.checkpoints.loading import OpenedPipeline
    from adatsq_trt.stages.run_directory import RunDirectory
    from adatsq_trt.zoo.loading import LoadedModel


@dataclass(frozen=True)
class ModelRequest:
    """What the command line says of the model; None stands for "the default".

    Attributes:
        name: of a zoo model; else a path or a hub id.
        base: pipeline that a transformer or a single file belongs to.
        loras: FILE or FILE:SCALE.
        prompts: file with a prompt in each line.
        height: in pixels.
        width: in pixels.
        frames: of a video.
        guidance: scale; 1 is no guidance, which spares models the branch with the empty prompt.
    """

    name: str
    base: str | None = None
    loras: tuple[str, ...] = ()
    prompts: Path | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance: float | None = None


def require_model(request: ModelRequest) -> None:
    """Refuse, before anything heavy is imported, what cannot be a model, and options that a zoo model does not take.

    Raises:
        UserError: says which, and what models there are.
    """
    if request.name not in zoo_models() and ("/" in request.name or Path(request.name).exists()):
        return
    find_model(request.name)
    options = {
        "--base": request.base,
        "--lora": request.loras,
        "--prompts": request.prompts,
        "--height": request.height,
        "--width": request.width,
        "--frames": request.frames,
    }
    given = [option for option, value in options.items() if value]
    if given:
        raise UserError(
            f"{given[0]}: model '{request.name}' of the zoo is complete and takes none; leave it out, or name a "
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

    def load(self, run: RunDirectory) -> LoadedModel:
        """Encode the prompts unless that is done, free the encoders, then load the transformer."""
        if self.pipeline is None:
            return self.outline
        from adatsq_trt.stages import embed

        return self.pipeline.load(embed.run(run, self.pipeline))


def open_model(request: ModelRequest) -> OpenedModel:
    """Check a model.

    Raises:
        UserError: it does not exist, is damaged, or is of an architecture that has no adapter.
    """
    if request.name in zoo_models():
        from adatsq_trt.zoo.loading import load_model

        return OpenedModel(load_model(request.name))
    from adatsq_trt.checkpoints.prompts import default_prompts, read_prompts

    return _open(
        PipelineSettings(
            path=request.name,
            base=request.base,
            loras=request.loras,
            height=request.height,
            width=request.width,
            frames=request.frames,
            guided=request.guidance is None or request.guidance != 1.0,
            prompts=default_prompts() if request.prompts is None else read_prompts(request.prompts),
        )
    )


def _open(settings: PipelineSettings) -> OpenedModel:
    from adatsq_trt.checkpoints.loading import open_pipeline

    opened = open_pipeline(settings)
    return OpenedModel(opened.outline, opened)


def reopen_model(settings: Settings, run: RunDirectory) -> LoadedModel:
    """The model of a finished run; its prompts' encodings are read from there.

    Raises:
        UserError: the model is not there any more, or is another one.
    """
    if settings.pipeline is None:
        from adatsq_trt.zoo.loading import load_model

        return load_model(settings.model)
    from adatsq_trt.stages import embed

    opened = _open(settings.pipeline)
    assert opened.pipeline is not None
    return opened.pipeline.load(embed.read(run, opened.pipeline))
