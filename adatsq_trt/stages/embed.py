"""Stage `embed`: the prompts and images of a checkpoint, encoded once by its own text encoders and VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from adatsq_trt.checkpoints.loading import OpenedPipeline
from adatsq_trt.errors import MismatchError
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.run_directory import RunDirectory, Stage
from adatsq_trt.stages.work import Work

NAME = "embed"
ENCODINGS = "encodings.safetensors"


def stage(context: Context) -> Stage:
    """The stage for a checkpoint and its prompts."""
    assert context.pipeline is not None, "models of the zoo have no such stage"
    return _stage(context.run, context.pipeline)


def _stage(run: RunDirectory, pipeline: OpenedPipeline) -> Stage:
    inputs: dict[str, Any] = {"encoders_sha256": pipeline.encoders_sha256, "prompts": list(pipeline.settings.prompts)}
    if pipeline.settings.negative_prompt:  # earlier runs have none
        inputs["negative_prompt"] = pipeline.settings.negative_prompt
    if pipeline.images_sha256 is not None:
        settings = pipeline.settings
        # An image becomes as many latents as are drawn, and one that is made here is made in that size.
        inputs["images"] = [pipeline.images_sha256, settings.height, settings.width, settings.frames]
    return run.stage(NAME, inputs)


def encodings_file(run: RunDirectory) -> Path:
    """Where the encodings lie."""
    return run.path / NAME / ENCODINGS


def run(context: Context) -> Stage:
    """Encode, unless that is done."""
    this, pipeline = stage(context), context.pipeline
    if not this.done:
        assert pipeline is not None, "as in `stage`"
        with this.run(), context.progress("embed: prompts", pipeline.encoded) as advance:
            write_tensors(this.unit(ENCODINGS), pipeline.encode(advance))
    return this


def work(_context: Context) -> Work:
    """Nothing that is counted: text encoders are not at hand before they encode."""
    return Work()


def read(run: RunDirectory, pipeline: OpenedPipeline) -> dict[str, Tensor]:
    """The encodings of a finished run.

    Raises:
        MismatchError: they are of other prompts or encoders.
    """
    if not _stage(run, pipeline).done:
        raise MismatchError(
            f"'{encodings_file(run)}' is not of this model's text encoders and prompts, which have changed since; run "
            "'adatsq-trt build engine' again"
        )
    return read_tensors(encodings_file(run))
