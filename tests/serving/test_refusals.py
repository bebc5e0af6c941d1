"""What the real server must not answer as if nothing were wrong: unknown names, values out of range, NaN."""

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from safetensors.numpy import load_file, save_file
from tritonclient.utils import InferenceServerException

from adatsq_trt.engines.bundle import PROMPTS_NAME, BundleFiles, write_manifest
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository
from adatsq_trt.engines.triton_server.server import HOST, Server
from benchmarks.serving.client import GrpcClient, HttpClient, RefusedError
from tests.serving.conftest import TINY, connect, infer_inputs, step_request

pytestmark = pytest.mark.serving
GOOD = {"prompt": 0, "seed": 1, "parameters": {"output": "latents"}}
LONG = "x" * 10_000
STEP = f"{TINY}_step"


def ask(server: Server, body: dict[str, object]) -> dict[str, Any]:
    """The one message of a generation; a refusal as it comes."""
    address = f"http://{HOST}:{server.ports.http}/v2/models/{TINY}/generate"
    try:
        with urllib.request.urlopen(address, data=json.dumps(body).encode(), timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return {"code": error.code, **json.load(error)}


BAD: dict[str, tuple[dict[str, object], str]] = {
    "field": ({"guidence": 9.0}, "unknown request field 'guidence'; did you mean 'guidance'? choose one of: "),
    "field of another kind": ({"strength": 0.5}, "unknown request field 'strength'; choose one of: "),
    "negative without texts": (
        {"negative": "a dog"},
        "negative 'a dog': not one of the bundle's 0 texts; leave it out, or serve the bundle with --pipeline",
    ),
    "parameter": ({"parameters": {"ouput": "latents"}}, "unknown request field 'ouput'; did you mean 'output'?"),
    "twice": ({"output": "png"}, "parameter 'output' is given twice; give it once"),
    "guidance": ({"guidance": 1e30}, "guidance: got 1e+30, expected 0 to 100; leave it out for the bundle's own, 2"),
    "negative guidance": ({"guidance": -1.0}, "guidance: got -1, expected 0 to 100"),
    "steps beyond 32 bits": ({"steps": 2**32 + 4}, "steps: got 4294967300, the bundle's policy is for 4"),
    "preview": ({"preview": True}, "preview: there are messages to carry it with progress only"),
    "long field": ({LONG: 1}, f"unknown request field '{LONG[:80]}...'; choose one of: "),
    "long output": ({"parameters": {"output": LONG}}, f"unknown output '{LONG[:80]}...'; choose one of: "),
    "long text": ({"prompt": [], "parameters": {"text": LONG}}, "got 0 prompts and 1 seeds"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(server: Server, name: str) -> None:
    change, message = BAD[name]
    got = ask(server, {**GOOD, **change})
    assert got["code"] == 400
    assert got["error"].startswith(message)
    assert len(got["error"]) < 400
    assert len(ask(server, GOOD)["latents"]) == 64


def test_a_long_text_is_cut(server: Server) -> None:
    for text in (LONG, " " * 10_000):
        error = ask(server, {"seed": 1, "parameters": {"text": text}})["error"]
        assert error.startswith("text")
        assert len(error) < 400


def test_what_the_server_itself_takes_is_let_through(server: Server) -> None:
    reserved = {
        **{"sequence_id": 3, "sequence_start": True, "sequence_end": True, "priority": 1, "timeout": 10**7},
        **{"headers": "x", "binary_data_output": True, "triton_enable_empty_final_response": True},
    }
    got = ask(server, {**GOOD, "id": "7", "parameters": {"output": "latents", **reserved}})
    assert (got["latents"], got["id"]) == (ask(server, GOOD)["latents"], "7")


def test_an_input_among_the_parameters_of_generate_is_an_input(server: Server) -> None:
    got = ask(server, {"prompt": 0, "seed": 1, "parameters": {"output": "latents", "guidance": 9.0}})
    assert got["latents"] == ask(server, {**GOOD, "guidance": 9.0})["latents"] != ask(server, GOOD)["latents"]


def test_parameters_over_grpc(server: Server) -> None:
    inputs = [
        tritonclient.grpc.InferInput(name, [1], "INT64").set_data_from_numpy(np.array([1]))
        for name in ("prompt", "seed")
    ]
    said: SimpleQueue[Any] = SimpleQueue()
    with tritonclient.grpc.InferenceServerClient(f"{HOST}:{server.ports.grpc}") as client:
        client.start_stream(lambda result, error: said.put(error or result))
        options = {"request_id": "7", "priority": 1, "timeout": 10**7, "enable_empty_final_response": True}
        client.async_stream_infer(TINY, inputs, parameters={"output": "latents"}, **options)
        assert said.get(timeout=60).as_numpy("latents").size == 64
        client.async_stream_infer(TINY, inputs, parameters={"output": "latents", "guidance": "9"})
        assert "'guidance' is an input, not a parameter" in said.get(timeout=60).message()


def test_guidance_over_grpc(server: Server) -> None:
    with GrpcClient(server.ports) as client, pytest.raises(RefusedError, match=r"guidance: got 1e\+30, expected 0 to"):
        client.latents(TINY, prompt=0, seed=1, guidance=1e30)


# ------------------------------------------------------------------------------------------------ numbers that are none


@pytest.fixture
def overflowing(tiny: BundleFiles, tmp_path: Path) -> Path:
    """A repository whose second prompt is finite, and so large that the latents are not."""
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "bundle"))
    prompts = load_file(folder / PROMPTS_NAME)
    prompts["conditional.pooled"][1] = 3e38
    save_file(prompts, folder / PROMPTS_NAME)
    write_manifest(folder, tiny.manifest)
    write_repository([Deployment(TINY, BundleFiles.open(folder))], tmp_path / "repository")
    return tmp_path / "repository"


def test_latents_that_are_not_finite_are_no_answer(overflowing: Path, start: Callable[..., Server]) -> None:
    server = start(overflowing, (TINY,))
    for output in ("latents", "image", "png"):
        for quantized in (True, False):
            with pytest.raises(RefusedError, match=r"step \d failed: the latents have NaN or infinity; ask for less"):
                HttpClient(server.ports).generate(TINY, output, prompt=1, seed=1, quantized=quantized, guidance=100.0)
    assert len(HttpClient(server.ports).latents(TINY, prompt=0, seed=1)) == 64


def test_step_model(server: Server, tiny: BundleFiles) -> None:
    good, client = step_request(Bundle(tiny), 0, 1), connect(server)
    with pytest.raises(InferenceServerException, match=r"unknown request field 'guidance'; choose one of: hidden_"):
        client.infer(STEP, infer_inputs(good), parameters={"guidance": 2})
    with pytest.raises(InferenceServerException, match="step 0 failed: the velocities have NaN or infinity"):
        client.infer(
            STEP,
            infer_inputs(
                {
                    name: np.full_like(value, 3e38) if value.dtype == np.float32 else value
                    for name, value in good.items()
                }
            ),
        )
    answer = client.infer(STEP, infer_inputs(good), priority=0, timeout=10**7).as_numpy("velocity")
    assert np.isfinite(answer).all()
