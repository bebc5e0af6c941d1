"""Stage `embed`: prompts encoded once by a checkpoint's own text encoders."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adatsq_trt.checkpoints.loading import OpenedPipeline, open_pipeline
from adatsq_trt.errors import MismatchError
from adatsq_trt.files import read_tensors
from adatsq_trt.settings import PipelineSettings
from adatsq_trt.stages import embed
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.run_directory import RunDirectory
from tests.stages.tiny_run import make_settings
from tests.tiny_checkpoints import make_flux_pipeline

PROMPTS = ("a red three", "a green seven")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> OpenedPipeline:
    folder = tmp_path_factory.mktemp("flux")
    make_flux_pipeline().save_pretrained(folder)
    return open_pipeline(PipelineSettings(path=str(folder), prompts=PROMPTS, height=32, width=32))


@pytest.fixture
def context(pipeline: OpenedPipeline, tmp_path: Path) -> Iterator[Context]:
    with RunDirectory.open(tmp_path / "run") as run:
        settings = make_settings(pipeline=pipeline.settings)
        yield Context(run, settings, pipeline.outline, pipeline=pipeline)


def test_the_encodings_are_the_encoders_own_and_made_once(
    context: Context, pipeline: OpenedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embed.run(context).done
    stored, own = read_tensors(embed.encodings_file(context.run)), pipeline.encode(lambda: None)
    assert set(stored) == set(own)
    assert all(torch.equal(stored[name], own[name]) for name in own)
    assert all(len(value) == len(PROMPTS) + 1 for value in stored.values()), "and the empty prompt"
    monkeypatch.setattr(OpenedPipeline, "encode", lambda *_: pytest.fail("encoded again"))
    embed.run(context)
    assert set(embed.read(context.run, pipeline)) == set(own)


def test_encodings_of_other_prompts_are_not_read(context: Context, pipeline: OpenedPipeline) -> None:
    with pytest.raises(MismatchError, match="is not of this model's text encoders and prompts"):
        embed.read(context.run, pipeline)
    embed.run(context)
    other = replace(pipeline, settings=pipeline.settings.model_copy(update={"prompts": ("another",)}))
    with pytest.raises(MismatchError, match="which have changed since"):
        embed.read(context.run, other)
