"""A real pipeline in the real server: a prompt in words goes in, a picture comes out."""

import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.triton_server.pipeline import Pipeline, copy_pipeline
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository
from adatsq_trt.engines.triton_server.server import Server
from benchmarks.serving.client import HttpClient, RefusedError
from tests.serving.conftest import connect
from tests.tiny_pipeline import make_flux_bundle, save_pipeline

pytestmark = pytest.mark.serving
NAME, TEXT, SEEDS = "flux", "a red three and a green seven", [1, 2]


def test_words_go_in_and_a_picture_comes_out(start: Callable[..., Server], tmp_path: Path) -> None:
    files, saved = make_flux_bundle(tmp_path / "bundle"), save_pipeline(tmp_path / "saved")
    repository = tmp_path / "repository"
    write_repository([Deployment(NAME, files, pipeline=saved)], repository)
    shutil.rmtree(saved)
    server = start(repository, (NAME,), "--model-control-mode=explicit", f"--load-model={NAME}")
    client = HttpClient(server.ports)
    answer = client.generate(NAME, "png", {"text": TEXT}, seed=SEEDS)

    bundle = Bundle(files)
    pipeline = Pipeline(tmp_path, copy_pipeline(repository / NAME / "1" / "pipeline", tmp_path), bundle)
    images = pipeline.decode(bundle.denoise(bundle.noise(SEEDS), pipeline.conditioning(TEXT, len(SEEDS))))
    expected = np.round(np.concatenate(images, axis=1) * 255).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(bytes(answer["png"])))), expected)
    assert len(client.latents(NAME, prompt=3, seed=1)) == 64
    with pytest.raises(RefusedError, match="got neither, expected the parameter 'text' or 'prompt', 0 to 9"):
        client.latents(NAME, seed=1)

    settings = repository / NAME / "1" / "pipeline" / "vae" / "config.json"
    settings.write_text(settings.read_text() + " ")
    admin = connect(server)
    admin.unload_model(NAME)
    with pytest.raises(InferenceServerException, match=r"vae/config.json' was altered: got sha256"):
        admin.load_model(NAME)
