"""`adatsq-trt serve` as a user meets it."""

import base64
import re
import signal
import subprocess
import time
import urllib.request
from io import BytesIO
from pathlib import Path

import psutil
import pytest
from openai import OpenAI
from PIL import Image

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.triton_server.server import HOST, Server, free_ports
from benchmarks.serving.client import HttpClient
from tests.cli.conftest import CommandLine
from tests.serving.conftest import SERVER_FOLDER, process_of, until
from tests.tiny_checkpoints import HEIGHT, WIDTH, make_wan_pipeline

pytestmark = pytest.mark.serving


def options(http: int, grpc: int, metrics: int) -> list[str]:
    ports = {"--http-port": http, "--grpc-port": grpc, "--metrics-port": metrics}
    return ["--server", str(SERVER_FOLDER), *(str(part) for item in ports.items() for part in item)]


def _listen_to_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_printed_curl_line_makes_a_picture(digits: BundleFiles, tmp_path: Path, end: signal.Signals) -> None:
    ports, page = free_ports(), str(free_ports().http)
    api = free_ports().http
    named = ("--name", "small", "--ui", "--ui-port", page, "--image-api", str(api))
    arguments = ["serve", str(digits.folder), *named, *options(ports.http, ports.grpc, ports.metrics)]
    said = tmp_path / "said"
    with said.open("w") as output:
        # A shell that runs the tests in the background ignores SIGINT, and so would what it starts.
        process = subprocess.Popen(
            [CommandLine.script, *arguments], stdout=output, stderr=output, preexec_fn=_listen_to_interrupts
        )
    deadline = time.monotonic() + 120
    while "Ctrl-C ends it" not in said.read_text():
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    lines = said.read_text().splitlines()
    curl = next(line for line in lines if line.strip().startswith("curl"))
    assert "/v2/models/small/generate" in curl
    subprocess.run(["bash", "-c", curl], cwd=tmp_path, check=True)
    with urllib.request.urlopen(f"http://{HOST}:{page}", timeout=60) as answer:
        assert b"<title>small" in answer.read()
    assert Image.open(tmp_path / "picture.png").size == (8, 8)
    drawn = OpenAI(base_url=f"http://{HOST}:{api}/v1", api_key="none").images.generate(prompt="3", size="8x8")
    assert Image.open(BytesIO(base64.b64decode(drawn.data[0].b64_json))).size == (8, 8)
    below = psutil.Process(process.pid).children(recursive=True)
    assert any(one.name() == "tritonserver" for one in below)
    process.send_signal(end)
    assert process.wait(60) == 0
    assert psutil.wait_procs(below, 10)[1] == []


def test_a_pipelines_folder_is_built_and_takes_a_prompt(tmp_path: Path) -> None:
    folder, prompts, ports, said = tmp_path / "tiny-wan", tmp_path / "prompts.txt", free_ports(), tmp_path / "said"
    make_wan_pipeline().save_pretrained(folder)
    prompts.write_text("a red\nthree\nseven red\n")
    sizes = ("--height", HEIGHT, "--width", WIDTH, "--frames", 5, "--prompts", prompts)
    effort = ("--steps", 2, "--calibration-samples", 2, "--selection-samples", 3, "--held-out-samples", 1)
    build = ("--", "--target", "cpu", *sizes, *effort, "--output", tmp_path / "run")
    arguments = ["serve", folder, *options(ports.http, ports.grpc, ports.metrics), *build]
    with said.open("w") as output:
        process = subprocess.Popen([CommandLine.script, *map(str, arguments)], stdout=output, stderr=output)
    try:
        until(lambda: "Ctrl-C ends it" in said.read_text() or process.poll() is not None, seconds=500)
        curl = next(line for line in said.read_text().splitlines() if line.strip().startswith("curl"))
        assert '"text": "a red bicycle"' in curl
        subprocess.run(["bash", "-c", curl], cwd=tmp_path, check=True)
        assert Image.open(tmp_path / "picture.png").size == (5 * WIDTH, HEIGHT)  # frames beside each other
    finally:
        process.terminate()
        assert process.wait(60) == 0, said.read_text()


def test_a_model_that_is_killed_comes_back(digits: BundleFiles, tmp_path: Path) -> None:
    ports, said = free_ports(), tmp_path / "said"
    arguments = ["serve", str(digits.folder), "--name", "small", *options(ports.http, ports.grpc, ports.metrics)]
    with said.open("w") as output:
        process = subprocess.Popen([CommandLine.script, *arguments], stdout=output, stderr=output)

    try:
        until(lambda: "Ctrl-C ends it" in said.read_text())
        log = Path(re.search(r"the server's log is (.*); try", said.read_text().replace("\n", ""))[1])
        process_of("small", process.pid).kill()
        until(lambda: "ready again" in log.read_text())
        assert len(HttpClient(ports).latents("small", prompt=0, seed=1)) == 64
        line = "the process of model 'small' has ended; requests under way are lost"
        assert log.read_text().count(line) == 1
        assert line in " ".join(said.read_text().split())
    finally:
        process.terminate()
        assert process.wait(60) == 0


def test_refusals(digits: BundleFiles, server: Server, tmp_path: Path) -> None:
    busy = options(server.ports.http, server.ports.grpc, server.ports.metrics)
    refusal = CommandLine.process("serve", digits.folder, *busy).refusal
    assert refusal.startswith(f"port {server.ports.http} on 127.0.0.1 cannot be used: Address already in use")
    assert "no Triton server in" in CommandLine.process("serve", digits.folder, "--server", tmp_path).refusal
    assert "is not a bundle" in CommandLine.process("serve", tmp_path).refusal
    built = CommandLine.process("serve", digits.folder, "--server", SERVER_FOLDER, "--", "--steps", "2").refusal
    assert built.startswith("got '--steps' after '--', an option of 'build engine', and")
    unnamed = CommandLine.process("serve", digits.folder, "--server", SERVER_FOLDER, "--name", "a/b").refusal
    assert unnamed.startswith("--name 'a/b': expected letters")
