"""Pipelines of all families in the real server: a prompt in words goes in, a picture or a video comes out."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from adatsq_trt.engines.runtime import Bundle, Conditioning
from adatsq_trt.engines.triton_server.pipeline import Pipeline
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository
from adatsq_trt.engines.triton_server.requests import render
from adatsq_trt.engines.triton_server.server import Installation, Server
from benchmarks.serving.client import HttpClient, RefusedError
from tests import tiny_ltx
from tests.served_pipelines import MAKERS, VIDEOS, SavedPipeline, save_and_build
from tests.serving.conftest import connect, started
from tests.tiny_checkpoints import HEIGHT, WIDTH

pytestmark = pytest.mark.serving
TEXT, SEEDS = "a red three and a green seven", [1, 2]


# The others are encoded, asked and drawn as one of these is; tests/engines/triton_server has all.
NAMES = tuple(name for name in MAKERS if name not in ("flux_2_klein", "chroma"))


@dataclass(frozen=True)
class Served:
    """A server with all families, and what it serves."""

    server: Server
    repository: Path
    saved: dict[str, SavedPipeline]

    def pipeline(self, name: str) -> tuple[Bundle, Pipeline]:
        """The same in this process."""
        bundle = Bundle(self.saved[name].bundle)
        return bundle, Pipeline(self.repository / name / "1" / "pipeline", bundle)


@pytest.fixture(scope="module")
def served(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Without the folders that the pipelines came from."""
    folder = tmp_path_factory.mktemp("pipelines")
    saved = {name: save_and_build(name, folder / name) for name in NAMES}
    repository = folder / "repository"
    write_repository([Deployment(name, one.bundle, pipeline=one.folder) for name, one in saved.items()], repository)
    for one in saved.values():
        shutil.rmtree(one.folder)
    loaded = [f"--load-model={name}" for name in NAMES]
    with started(repository, installation, NAMES, "--model-control-mode=explicit", *loaded) as server:
        yield Served(server, repository, saved)


@pytest.mark.parametrize("name", NAMES)
def test_words_go_in_and_a_picture_comes_out(served: Served, name: str) -> None:
    client, (bundle, pipeline) = HttpClient(served.server.ports), served.pipeline(name)
    answer = client.generate(name, "png", {"text": TEXT}, seed=SEEDS)
    latents = bundle.denoise(bundle.noise(SEEDS), pipeline.conditioning(TEXT, len(SEEDS)))
    assert bytes(answer["png"]) == render(pipeline.decode, latents, "png").tobytes()
    # Frames beside each other, samples below.
    columns, rows = {"ltx": (tiny_ltx.FRAMES, 2)}.get(name, (5, 2) if name in VIDEOS else (2, 1))
    width, height = (tiny_ltx.WIDTH, tiny_ltx.HEIGHT) if name == "ltx" else (WIDTH, HEIGHT)
    assert Image.open(BytesIO(bytes(answer["png"]))).size == (columns * width, rows * height)
    assert len(client.latents(name, prompt=1, seed=1)) == bundle.noise([1]).size
    with pytest.raises(RefusedError, match="got neither, expected the parameter 'text' or 'prompt', 0 to 1"):
        client.latents(name, seed=1)


@pytest.mark.parametrize("name", NAMES)
def test_a_negative_prompt(served: Served, name: str) -> None:
    client, (bundle, pipeline) = HttpClient(served.server.ports), served.pipeline(name)
    asked = {"text": TEXT, "negative": "a green seven"}
    if name in ("flux", "flux_2"):
        with pytest.raises(RefusedError, match="negative: the bundle was built without a second branch of guidance"):
            client.generate(name, "latents", asked, seed=[1])
        return
    got = np.array(client.generate(name, "latents", asked, seed=[1])["latents"], np.float32)
    one, other = (pipeline.conditioning(asked[key], 1).conditional for key in ("text", "negative"))
    np.testing.assert_array_equal(got, bundle.denoise(bundle.noise([1]), Conditioning(one, other)).ravel())


def test_text_encoders_that_were_altered_are_not_loaded(served: Served) -> None:
    settings = served.repository / "wan" / "1" / "pipeline" / "tokenizer" / "tokenizer.json"
    whole, admin = settings.read_text(), connect(served.server)
    settings.write_text(whole + " ")
    admin.unload_model("wan")
    with pytest.raises(InferenceServerException, match=r"tokenizer/tokenizer.json' was altered: got sha256"):
        admin.load_model("wan")
    settings.write_text(whole)
    admin.load_model("wan")
