"""A pipeline of two transformers in the real server: words go in, a video with both scales of guidance comes out."""

from pathlib import Path

import numpy as np
import pytest

import adatsq_trt
from adatsq_trt.engines.triton_server.pipeline import Pipeline
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository
from adatsq_trt.engines.triton_server.requests import render
from adatsq_trt.engines.triton_server.server import Installation
from benchmarks.serving.client import HttpClient
from tests.serving.conftest import started
from tests.tiny_wan_experts import SCALES, SMALL, make_wan_experts_pipeline

pytestmark = pytest.mark.serving
TEXT, SEEDS = "a red three", [1, 2]


def test_both_transformers_draw(installation: Installation, tmp_path: Path) -> None:
    make_wan_experts_pipeline().save_pretrained(tmp_path / "pipeline")
    with adatsq_trt.build(tmp_path / "pipeline", output=tmp_path / "run", **SMALL, **SCALES) as bundle:
        repository = tmp_path / "repository"
        write_repository([Deployment("wan", bundle.files, pipeline=tmp_path / "pipeline")], repository)
        with started(repository, installation, ("wan",)) as server:
            client, pipeline = HttpClient(server.ports), Pipeline(repository / "wan" / "1" / "pipeline", bundle)
            noise, words = bundle.noise(SEEDS), pipeline.conditioning(TEXT, len(SEEDS))
            drawn = bytes(client.generate("wan", "png", {"text": TEXT}, seed=SEEDS)["png"])
            assert drawn == render(pipeline.decode, bundle.denoise(noise, words), "png").tobytes()
            answer = client.generate("wan", "latents", {"text": TEXT}, seed=SEEDS, guidance=[3.0], guidance_2=[1.5])
            expected = bundle.denoise(noise, words, guidance=3.0, guidance_2=1.5)
            np.testing.assert_array_equal(np.array(answer["latents"], np.float32), expected.ravel())
