"""Loading, unloading, files that were changed, ports in use, and a repository without the project's source tree."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import psutil
import pytest
from tritonclient.utils import InferenceServerException

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.triton_server.server import Installation, Server
from adatsq_trt.errors import AdatsqError, DependencyError, UserError
from benchmarks.serving.client import GrpcClient, HttpClient, RefusedError
from tests.serving.conftest import DIGITS, SERVER_FOLDER, TINY, connect, infer_inputs, step_request

pytestmark = pytest.mark.serving
ROOT = Path(__file__).parents[2]
STANDALONE = """
import json, sys, urllib.request
from pathlib import Path
import adatsq_trt
from adatsq_trt.engines.triton_server.server import HOST, Installation, Server, free_ports
with Server(Path(sys.argv[1]), free_ports(), Installation.find(Path(sys.argv[2]))) as server:
    server.wait_until_ready(["digits-flux"])
    body = json.dumps({"prompt": 3, "seed": 7, "parameters": {"output": "latents"}}).encode()
    address = f"http://{HOST}:{server.ports.http}/v2/models/digits-flux/generate"
    answer = json.load(urllib.request.urlopen(urllib.request.Request(address, data=body)))
    print(json.dumps([adatsq_trt.__file__, answer["latents"]]))
"""


@pytest.fixture
def own(repository: Path, tmp_path: Path) -> Path:
    """A copy of the repository, for writing."""
    return Path(shutil.copytree(repository, tmp_path / "repository"))


def test_load_and_unload(repository: Path, tiny: BundleFiles, start: Callable[..., Server]) -> None:
    server = start(repository, (), "--model-control-mode=explicit", f"--load-model={DIGITS}")
    server.wait_until_ready([DIGITS])
    admin, client = connect(server), HttpClient(server.ports)
    with pytest.raises(RefusedError, match="Request for unknown model: 'tiny'"):
        client.latents(TINY, prompt=0, seed=1)
    admin.load_model(TINY)
    bundle = Bundle(tiny)
    expected = bundle.denoise(bundle.noise([1]), bundle.conditioning([0])).ravel()
    np.testing.assert_array_equal(client.latents(TINY, prompt=0, seed=1), expected)

    answered = Event()

    def ask_until_refused() -> str:
        for _ in range(100_000):
            try:
                np.testing.assert_array_equal(client.latents(TINY, prompt=0, seed=1), expected)
                answered.set()
            except RefusedError as error:
                return str(error)
        raise AssertionError("the model is never unloaded")

    with ThreadPoolExecutor(8) as pool:
        refusals = [pool.submit(ask_until_refused) for _ in range(8)]
        assert answered.wait(60)
        admin.unload_model(TINY)
        for refusal in refusals:
            assert re.search("'tiny'.*unknown model|unknown model: 'tiny'", refusal.result())
    assert len(client.latents(DIGITS, prompt=0, seed=1)) == 64


def test_a_changed_file_is_not_loaded_and_the_rest_is(own: Path, start: Callable[..., Server]) -> None:
    server = start(own, (DIGITS,), "--model-control-mode=explicit", f"--load-model={DIGITS}")
    for name in ("onnx/weights.data", "manifest.json", "policy.json"):
        path = own / TINY / "1" / "bundle" / name
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        with pytest.raises(InferenceServerException, match=r"got sha256 .*, (config.pbtxt expects|expected) .* again"):
            connect(server).load_model(TINY)
        path.write_bytes(content)
    assert len(HttpClient(server.ports).latents(DIGITS, prompt=0, seed=1)) == 64
    connect(server).load_model(TINY)


def test_a_graph_that_goes_while_it_is_served(own: Path, tiny: BundleFiles, start: Callable[..., Server]) -> None:
    """Full precision, and all that the step model runs, is read when it is first asked for."""
    server, graphs = start(own, (TINY, f"{TINY}_step")), own / TINY / "1" / "bundle" / "onnx"
    for name in ("reference.cpu.onnx", "switch.cpu.onnx"):
        (graphs / name).unlink()
    lost = r"^(\[500\] )?step 0 failed: .*{}.cpu.onnx.*; the server's log says more$"
    with pytest.raises(InferenceServerException, match=lost.format("switch")):
        connect(server).infer(f"{TINY}_step", infer_inputs(step_request(Bundle(tiny), step=0, seed=1)))
    for client in (HttpClient(server.ports), GrpcClient(server.ports)):
        with pytest.raises(RefusedError, match=lost.format("reference")):
            client.latents(TINY, prompt=0, seed=1, quantized=False)
        bundle = Bundle(tiny)
        expected = bundle.denoise(bundle.noise([1]), bundle.conditioning([0])).ravel()
        np.testing.assert_array_equal(client.latents(TINY, prompt=0, seed=1), expected)
        client.close()
    assert "Traceback" in server.log_file.read_text()


def test_the_command_line_is_told_why_a_model_does_not_load(own: Path, start: Callable[..., Server]) -> None:
    (own / TINY / "1" / "bundle" / "policy.json").unlink()
    with pytest.raises(AdatsqError, match=r"model 'tiny' does not load: .*policy.json' is gone"):
        start(own, (TINY,))


def test_ports_in_use_and_no_server(server: Server, repository: Path, installation: Installation, tmp_path) -> None:
    with pytest.raises(UserError, match=f"port {server.ports.http} on 127.0.0.1 cannot be used: Address already"):
        Server(repository, server.ports, installation)
    with pytest.raises(DependencyError, match=r"no Triton server in .*; run: pip install --no-deps nvidia-pytriton"):
        Installation.find(tmp_path)


def test_a_server_that_dies_is_reported_and_comes_back(repository: Path, start: Callable[..., Server]) -> None:
    server = start(repository, (TINY,))
    models = psutil.Process(server.process.pid).children(recursive=True)
    regions = f"{server.log_file.parent.name}*"
    assert models
    assert list(Path("/dev/shm").glob(regions))
    server.process.send_signal(signal.SIGABRT)  # what it does to itself when an assertion fails
    with pytest.raises(AdatsqError, match=r"Triton server ended with code -6: .*Signal \(6\) received\.$"):
        server.wait()
    server.stop()
    assert psutil.wait_procs(models, 10)[1] == []
    assert not list(Path("/dev/shm").glob(regions))
    again = start(repository, (TINY,), ports=server.ports)
    assert len(HttpClient(again.ports).latents(TINY, prompt=0, seed=1)) == 64


def test_the_repository_and_the_wheel_are_enough(repository: Path, digits: BundleFiles, tmp_path: Path) -> None:
    """In an environment with the project's wheel and its dependencies, without the source tree."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    site = next(environment.glob("lib/*/site-packages"))
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    checkout = tmp_path / "checkout"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, checkout / name)
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--target", site, checkout)
    subprocess.run([sys.executable, *install], check=True)
    shutil.rmtree(checkout)
    elsewhere = Path(shutil.copytree(repository, tmp_path / "elsewhere"))
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ended = subprocess.run(
        [environment / "bin" / "python", "-c", STANDALONE, elsewhere, SERVER_FOLDER],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    origin, latents = json.loads(ended.stdout)
    assert Path(origin).is_relative_to(site)
    bundle = Bundle(digits)
    expected = bundle.denoise(bundle.noise([7]), bundle.conditioning([3])).ravel()
    np.testing.assert_array_equal(np.array(latents, np.float32), expected)
