"""The models in the real server, through its real clients: HTTP, gRPC, streams, batches, refusals."""

import json
import time
import urllib.request
from io import BytesIO

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Bundle, StepResult
from adatsq_trt.engines.triton_server.server import HOST, Server
from benchmarks.serving.client import GrpcClient, HttpClient, RefusedError
from benchmarks.serving.load import metric
from tests.serving.conftest import DIGITS, TINY, infer_inputs, step_request

pytestmark = pytest.mark.serving


@pytest.fixture(params=[TINY, DIGITS])
def bundle(request: pytest.FixtureRequest, tiny: BundleFiles, digits: BundleFiles) -> Bundle:
    return Bundle({TINY: tiny, DIGITS: digits}[request.param])


@pytest.fixture
def http(server: Server) -> tritonclient.http.InferenceServerClient:
    return tritonclient.http.InferenceServerClient(f"{HOST}:{server.ports.http}", concurrency=8)


@pytest.fixture(params=[HttpClient, GrpcClient])
def client(request: pytest.FixtureRequest, server: Server):
    client = request.param(server.ports)
    yield client
    client.close()


def test_health_and_metadata(server: Server, http: tritonclient.http.InferenceServerClient) -> None:
    grpc = tritonclient.grpc.InferenceServerClient(f"{HOST}:{server.ports.grpc}")
    for one in (http, grpc):
        assert one.is_server_live()
        assert one.is_server_ready()
        assert one.is_model_ready(DIGITS)
    grpc.close()
    described = {tensor["name"]: tensor for tensor in http.get_model_metadata(DIGITS)["outputs"]}
    assert described["latents"]["shape"] == [-1, 16, 4]


# --------------------------------------------------------------------------------------------- the same pictures


@pytest.mark.parametrize("quantized", [True, False])
def test_pictures_are_those_of_the_loop_in_process(client, bundle: Bundle, quantized: bool) -> None:
    seeds, prompts = [5, 6, 2**63 - 1], [0, 2, 1]
    expected = bundle.denoise(bundle.noise(seeds), bundle.conditioning(prompts), guidance=1.5, quantized=quantized)
    asked = {"prompt": prompts, "seed": seeds, "guidance": 1.5, "quantized": quantized}
    np.testing.assert_array_equal(client.latents(bundle.manifest.model, **asked), expected.ravel())


def test_png(server: Server, bundle: Bundle) -> None:
    answer = HttpClient(server.ports).generate(bundle.manifest.model, "png", prompt=[1, 2], seed=[3, 4])
    images = bundle.decode(bundle.denoise(bundle.noise([3, 4]), bundle.conditioning([1, 2])))
    picture = np.asarray(Image.open(BytesIO(bytes(answer["png"]))))
    expected = np.round(np.concatenate(images, axis=1) * 255).astype(np.uint8)
    np.testing.assert_array_equal(picture, expected[..., 0] if expected.shape[-1] == 1 else expected)


# ------------------------------------------------------------------------------------------------- step by step


def test_progress_with_previews(server: Server, bundle: Bundle) -> None:
    told: list[StepResult] = []
    bundle.denoise(bundle.noise([3]), bundle.conditioning([1]), callback=told.append)
    with GrpcClient(server.ports) as client:
        client.start(bundle.manifest.model, prompt=1, seed=3, progress=True, preview=True)
        messages = list(client.messages())
    assert [(int(m.as_numpy("step")[0]), int(m.as_numpy("bucket")[0])) for m in messages] == [
        (one.step, one.bucket) for one in told
    ]
    for message, one in zip(messages, told, strict=True):
        np.testing.assert_array_equal(message.as_numpy("latents"), one.latents)


def test_progress_over_http(server: Server) -> None:
    body = json.dumps({"prompt": 1, "seed": 3, "progress": True}).encode()
    address = f"http://{HOST}:{server.ports.http}/v2/models/{TINY}/generate_stream"
    with urllib.request.urlopen(urllib.request.Request(address, data=body)) as response:
        lines = [line for line in response.read().decode().splitlines() if line.startswith("data: ")]
    messages = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert [message["step"] for message in messages] == [0, 1, 2, 3]
    assert ["png" in message for message in messages] == [False, False, False, True]


def test_a_cancelled_request_stops(server: Server) -> None:
    def steps() -> float:
        return metric(server.ports, "adatsq_generation_steps_total")

    with GrpcClient(server.ports) as client:
        before = settled(steps)
        for _ in range(4):
            client.start(DIGITS, prompt=[0] * 32, seed=list(range(32)))
            client.cancel()
        assert settled(steps) - before < 4 * 6


def settled(value) -> float:
    """A metric when it no longer changes; models send theirs every half second."""
    last = value()
    for _ in range(20):
        time.sleep(1)
        if (now := value()) == last:
            return now
        last = now
    raise AssertionError("the server does not come to rest")


def counters(server: Server) -> dict[str, float]:
    """The loop models' counters, summed over models and assignments."""
    names = ("denoiser_calls", "generation_steps", "joined_places")
    return {name: metric(server.ports, f"adatsq_{name}_total") for name in names}


def counted(server: Server, steps: float) -> dict[str, float]:
    """The counters when so many steps have been taken; models send theirs every half second."""
    deadline = time.monotonic() + 60
    while (now := counters(server))["generation_steps"] < steps:
        assert time.monotonic() < deadline, now
        time.sleep(0.1)
    return counters(server)  # they are sent one after another


# ------------------------------------------------------------------------------------------- batching, step by step


def test_requests_at_different_steps_of_a_bucket_share_calls(server: Server, digits: BundleFiles) -> None:
    settled(lambda: counters(server)["generation_steps"])
    before, rounds, steps = counters(server), 10, digits.policy.steps
    with GrpcClient(server.ports) as slow, GrpcClient(server.ports) as quick:
        for _ in range(rounds):
            slow.start(DIGITS, prompt=[0] * 16, seed=list(range(16)), progress=True)
            messages = slow.messages()
            next(message for message in messages if message.as_numpy("step")[0] == 2)
            quick.latents(DIGITS, prompt=1, seed=1)  # catches up with the slow one, which waits in the last bucket
            list(messages)
    after = counted(server, before["generation_steps"] + 2 * rounds * steps)
    gained = {name: after[name] - before[name] for name in after}
    assert gained["generation_steps"] == 2 * rounds * steps
    assert gained["denoiser_calls"] < gained["generation_steps"]
    assert gained["joined_places"] > 0


def test_step_model_groups_a_batch_by_bucket(
    http: tritonclient.http.InferenceServerClient, digits: BundleFiles
) -> None:
    bundle, name = Bundle(digits), f"{DIGITS}_step"
    places = [(2 + number % 4, number) for number in range(64)]
    requests = [infer_inputs(step_request(bundle, *place)) for place in places]
    pending = [http.async_infer(name, request) for request in requests]
    answers = [one.get_result().as_numpy("velocity") for one in pending]
    for (step, seed), answer in zip(places, answers, strict=True):
        inputs = bundle.step_inputs(step, bundle.noise([seed]), bundle.conditioning([1]), 2.0)
        np.testing.assert_array_equal(answer, bundle.predict(step, inputs))
    statistics = http.get_inference_statistics(name)["model_stats"][0]
    assert int(statistics["execution_count"]) < 64
    assert int(statistics["inference_count"]) == 2 * 64  # the server counts rows


BAD_STEPS = {
    "NaN": ({"hidden_states": np.full((2, 16, 4), np.nan, np.float32)}, "input 'hidden_states': got NaN or infinity"),
    "step": ({"step": np.full((2, 1), 6, np.int32)}, r"step: got \[6\], expected one of 0 to 5"),
    "two steps": ({"step": np.array([[0], [1]], np.int32)}, r"step: got \[0, 1\], expected one"),
    "shape": ({"hidden_states": np.zeros((2, 16, 5), np.float32)}, "unexpected shape for input 'hidden_states'"),
    "rows": ({"pooled_projections": np.zeros((3, 32), np.float32)}, "batch size|batch-size"),
    "type": ({"hidden_states": np.zeros((2, 16, 4), np.int32)}, "input 'hidden_states' data-type is 'INT32'"),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_steps(http: tritonclient.http.InferenceServerClient, digits: BundleFiles, name: str) -> None:
    change, message = BAD_STEPS[name]
    good = step_request(Bundle(digits), 0, 1)
    with pytest.raises(InferenceServerException, match=message):
        http.infer(f"{DIGITS}_step", infer_inputs({**good, **change}))
    http.infer(f"{DIGITS}_step", infer_inputs(good))


# ----------------------------------------------------------------------------------------------------- refusals

BAD = {
    "prompt": ({"prompt": 10}, "prompt 10: the bundle holds prompts 0 to 9"),
    "seed": ({"seed": -1}, "seed: got -1, expected 0 to"),
    "steps": ({"steps": 20}, "steps: got 20, the bundle's policy is for 6"),
    "counts": ({"seed": [1, 2]}, "got 1 prompts and 2 seeds"),
    "too many": ({"prompt": [0] * 33, "seed": [0] * 33}, "1 to 32"),
    "output": ({"output": "gif"}, "unknown output 'gif'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(client, name: str) -> None:
    change, message = BAD[name]
    with pytest.raises(RefusedError, match=message):
        client.latents(DIGITS, **{"prompt": 0, "seed": 1, **change})
    assert len(client.latents(DIGITS, prompt=0, seed=1)) == 64


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_guidance_that_is_not_finite(server: Server, value: float) -> None:
    with GrpcClient(server.ports) as client, pytest.raises(RefusedError, match=r"guidance: got .*, expected 0 to 100"):
        client.latents(DIGITS, prompt=0, seed=1, guidance=value)


@pytest.mark.parametrize("change", [{"prompt": "cat"}, {"seed": 2**70}, {"guidance": "much"}])
def test_values_of_other_types(server: Server, change: dict[str, object]) -> None:
    client = HttpClient(server.ports)
    with pytest.raises(RefusedError, match="Unable to parse 'data': attempt to access JSON non-"):
        client.generate(DIGITS, **{"prompt": 0, "seed": 1, **change})
    assert len(client.latents(DIGITS, prompt=0, seed=1)) == 64
