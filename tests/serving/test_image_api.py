"""The image-generation API in front of the real server, asked with that API's public client."""

import base64
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, OpenAI

from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.triton_server.image_api import PATH, ImageApi
from adatsq_trt.engines.triton_server.pipeline import Pipeline
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository
from adatsq_trt.engines.triton_server.requests import render
from adatsq_trt.engines.triton_server.server import HOST, Installation, free_ports
from adatsq_trt.errors import UserError
from tests.served_pipelines import SavedPipeline, save_and_build
from tests.serving.conftest import started
from tests.tiny_checkpoints import HEIGHT, WIDTH

pytestmark = pytest.mark.serving
NAME, TEXT, SIZE = "flux", "a red three and a green seven", f"{WIDTH}x{HEIGHT}"


@dataclass(frozen=True)
class Served:
    """The endpoint's port, and what is behind it."""

    port: int
    saved: SavedPipeline
    pipeline: Path

    def client(self) -> OpenAI:
        return client_of(self.port)


def client_of(port: int) -> OpenAI:
    return OpenAI(base_url=f"http://{HOST}:{port}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def served(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A pipeline's bundle in the server, and the endpoint before it."""
    folder, port = tmp_path_factory.mktemp("api"), free_ports().http
    saved = save_and_build(NAME, folder)
    write_repository([Deployment(NAME, saved.bundle, pipeline=saved.folder)], folder / "repository")
    shutil.rmtree(saved.folder)
    with ExitStack() as stack:
        server = stack.enter_context(started(folder / "repository", installation, (NAME,)))
        stack.enter_context(ImageApi(port, server.ports.http, saved.bundle, NAME))
        yield Served(port, saved, folder / "repository" / NAME / "1" / "pipeline")


def test_the_public_client_draws_pictures(served: Served) -> None:
    answer = served.client().images.generate(
        prompt=TEXT, model=NAME, n=2, size=SIZE, response_format="b64_json", extra_body={"seed": 7}
    )
    bundle = Bundle(served.saved.bundle)
    pipeline = Pipeline(served.pipeline, bundle)
    assert answer.data is not None
    for seed, picture in zip((7, 8), answer.data, strict=True):
        latents = bundle.denoise(bundle.noise([seed]), pipeline.conditioning(TEXT, 1))
        assert base64.b64decode(picture.b64_json or "") == render(pipeline.decode, latents, "png").tobytes()
        assert picture.model_extra == {"seed": seed}
    assert (answer.size, answer.output_format) == (SIZE, "png")


def test_without_a_seed_pictures_differ_and_say_theirs(served: Served) -> None:
    client = served.client()
    one, other = (client.images.generate(prompt=TEXT).data[0] for _ in range(2))
    assert one.b64_json != other.b64_json
    again = client.images.generate(prompt=TEXT, extra_body={"seed": one.seed}).data[0]
    assert again.b64_json == one.b64_json


REFUSALS: dict[str, tuple[dict[str, Any], int, str | None, str]] = {
    "size": ({"size": "512x512"}, 400, "size", f"size: got '512x512', expected '{SIZE}'; leave it out"),
    "format": ({"response_format": "url"}, 400, "response_format", 'response_format: got "url"; input should be \'b64'),
    "count": ({"n": 11}, 400, "n", "n: got 11; input should be less than or equal to 10"),
    "none": ({"n": 0}, 400, "n", "n: got 0; input should be greater than or equal to 1"),
    "seed": ({"extra_body": {"seed": -1}}, 400, "seed", "seed: got -1; input should be greater than or equal to 0"),
    "unknown": ({"extra_body": {"sed": 1}}, 400, "sed", "unknown parameter 'sed'; did you mean 'seed'?"),
    "quality": ({"quality": "hd"}, 400, "quality", "quality: got \"hd\"; input should be 'auto'"),
    "model": ({"model": "another"}, 404, "model", f"model 'another': expected '{NAME}'"),
    "words": ({"prompt": " "}, 400, "prompt", "prompt: got ' ', expected words"),
    "no prompt": ({"prompt": ""}, 400, "prompt", 'prompt: got ""; string should have at least 1 character'),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_supported_is_an_error_in_the_apis_shape(served: Served, name: str) -> None:
    changes, status, field, message = REFUSALS[name]
    with pytest.raises(APIStatusError) as refused:
        served.client().images.generate(**{"prompt": TEXT, **changes})
    assert refused.value.status_code == status
    assert isinstance(refused.value.body, dict)
    assert refused.value.body["message"].startswith(message)
    assert (refused.value.body["type"], refused.value.body["param"]) == ("invalid_request_error", field)


@pytest.mark.parametrize(
    ("path", "body", "status"), [(PATH, b"{", 400), (PATH, b"[]", 400), ("/v1/models", b"{}", 404), (PATH, None, 405)]
)
def test_what_no_client_sends(served: Served, path: str, body: bytes | None, status: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://{HOST}:{served.port}{path}", data=body)
    assert refused.value.code == status
    assert json.load(refused.value)["error"]["type"] == "invalid_request_error"


def test_a_server_that_is_gone(served: Served) -> None:
    ports = free_ports()
    with ImageApi(ports.http, ports.grpc, served.saved.bundle, NAME), pytest.raises(APIStatusError) as refused:
        client_of(ports.http).images.generate(prompt=TEXT)
    assert refused.value.status_code == 503
    assert isinstance(refused.value.body, dict)
    assert refused.value.body["type"] == "server_error"
    assert refused.value.body["message"].startswith("Triton server does not answer: ")


def test_videos_and_ports_in_use_are_refused(served: Served) -> None:
    files = served.saved.bundle
    with pytest.raises(UserError, match=f"port {served.port} on {HOST} cannot be used"):
        ImageApi(served.port, 1, files, NAME)
    for update, message in (
        ({"image": files.manifest.image.model_copy(update={"frames": 2})}, "draws videos, the API has pictures"),
        ({"pixels": None}, "does not say how many pixels it draws"),
    ):
        manifest = files.manifest.model_copy(update=update)
        with pytest.raises(UserError, match=message):
            ImageApi(free_ports().http, 1, type(files)(files.folder, manifest, files.policy, files.index), NAME)
