"""Stage `embed`: the prompts of a checkpoint, encoded once by its own text encoders."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from adatsq_trt.checkpoints.loading import OpenedPipeline
from adatsq_trt.checkpoints.prompts import encode_prompts
from adatsq_trt.cli.progress import progress
from adatsq_trt.errors import MismatchError
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.stages.run_directory import RunDirectory, Stage

NAME = "embed"
ENCODINGS = "encodings.safetensors"


def stage(run: RunDirectory, pipeline: OpenedPipeline) -> Stage:
    """The stage for a checkpoint and its prompts."""
    inputs = {"encoders_sha256": pipeline.encoders_sha256, "prompts": list(pipeline.settings.prompts)}
    return run.stage(NAME, inputs)


def encodings_file(run: RunDirectory) -> Path:
    """Where the encodings lie."""
    return run.path / NAME / ENCODINGS


def run(run: RunDirectory, pipeline: OpenedPipeline) -> dict[str, Tensor]:
    """Encode, unless that is done."""
    this = stage(run, pipeline)
    if not this.done:
        prompts = pipeline.settings.prompts
        with this.run(), progress("embed: prompts", len(prompts) + 1) as advance:
            write_tensors(this.unit(ENCODINGS), encode_prompts(pipeline.source, prompts, advance))
    return read_tensors(this.unit(ENCODINGS))


def read(run: RunDirectory, pipeline: OpenedPipeline) -> dict[str, Tensor]:
    """The encodings of a finished run.

    Raises:
        MismatchError: they are of other prompts or encoders.
    """
    if not stage(run, pipeline).done:
        raise MismatchError(
            f"'{encodings_file(run)}' is not of this model's text encoders and prompts, which have changed since; run "
            "'adatsq-trt build engine' again"
        )
    return read_tensors(encodings_file(run))
