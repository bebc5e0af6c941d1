"""Every model that ships with the package, served: the pictures are those of the loop in process, bit for bit."""

from collections.abc import Iterator

import numpy as np
import pytest

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository
from adatsq_trt.engines.triton_server.requests import render
from adatsq_trt.engines.triton_server.server import Installation, Server
from adatsq_trt.zoo import zoo_models
from benchmarks.serving.client import GrpcClient, HttpClient, RefusedError
from tests.serving.conftest import started

pytestmark = pytest.mark.serving
SEEDS, PROMPTS = [3, 4], [1, 2]


@pytest.fixture(scope="module")
def served(
    zoo: dict[str, BundleFiles], installation: Installation, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One server with all of them."""
    repository = tmp_path_factory.mktemp("zoo") / "repository"
    write_repository([Deployment(name, files) for name, files in zoo.items()], repository, link=True)
    with started(repository, installation, tuple(zoo)) as server:
        yield server


@pytest.mark.parametrize("name", zoo_models())
@pytest.mark.parametrize("quantized", [True, False])
def test_served_pictures_are_those_of_the_loop_in_process(
    served: Server, zoo: dict[str, BundleFiles], name: str, quantized: bool
) -> None:
    bundle = Bundle(zoo[name])
    latents = bundle.denoise(bundle.noise(SEEDS), bundle.conditioning(PROMPTS), quantized=quantized)
    answer = HttpClient(served.ports).generate(name, "png", prompt=PROMPTS, seed=SEEDS, quantized=quantized)
    assert bytes(answer["png"]) == render(bundle.decode, latents, "png").tobytes()
    with GrpcClient(served.ports) as client:
        got = client.latents(name, prompt=PROMPTS, seed=SEEDS, quantized=quantized)
    np.testing.assert_array_equal(got, latents.ravel())


@pytest.mark.parametrize("name", zoo_models())
def test_prompts_by_their_texts(served: Server, zoo: dict[str, BundleFiles], name: str) -> None:
    client, texts = HttpClient(served.ports), zoo[name].manifest.prompt_texts
    got = client.generate(name, "latents", {"text": texts[1]}, seed=SEEDS)
    np.testing.assert_array_equal(
        got["latents"], client.generate(name, "latents", prompt=[1, 1], seed=SEEDS)["latents"]
    )
    refusal = f"text 'an owl': not one of the bundle's {len(texts)} texts, such as '.*; give one of them, or ask with"
    with pytest.raises(RefusedError, match=refusal):
        client.generate(name, "latents", {"text": "an owl"}, seed=SEEDS)
