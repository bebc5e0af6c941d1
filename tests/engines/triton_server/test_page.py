"""The page without Triton server behind it; tests/serving has both, and a browser."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.triton_server.page import Page, page_text
from adatsq_trt.engines.triton_server.server import HOST, free_ports

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def connection(tiny_bundle: BundleFiles) -> Iterator[HTTPConnection]:
    ports = free_ports()
    with Page(ports.http, ports.grpc, tiny_bundle, "tiny"):
        yield HTTPConnection(HOST, ports.http, timeout=10)


def ask(connection: HTTPConnection, length: str, path: str = "/generate") -> HTTPResponse:
    connection.putrequest("POST", path)
    connection.putheader("Content-Length", length)
    connection.endheaders(b"{}")
    return connection.getresponse()


def test_the_page_is_all_that_can_be_read(connection: HTTPConnection) -> None:
    connection.request("GET", "/?prompt=1")
    answer = connection.getresponse()
    assert (answer.status, b"<title>tiny" in answer.read()) == (200, True)
    connection.request("GET", "/../page.py")
    assert connection.getresponse().status == 404


def test_the_page_knows_the_bundle(tiny_bundle: BundleFiles) -> None:
    texts = ("</script><b>", "a 7", "two 4")
    manifest = tiny_bundle.manifest.model_copy(update={"prompt_texts": texts})
    text = page_text(replace(tiny_bundle, manifest=manifest), "tiny")
    data = json.loads(text.split("last_prompt } = ")[1].splitlines()[0].rstrip(";"))
    assert data["prompts"] == list(texts)
    assert data["buckets"][0] == {"first": 0, "last": 0, "assignment": 0, "formats": "1 × fp8, 1 × w8a8s"}
    assert text.count("</script>") == 1
    assert "4 steps in 4 buckets (steps with the same formats), " in text


@pytest.mark.parametrize("length", ["", "0", "-1", "two", "1e3", "100001", "9" * 5000])
def test_lengths_that_are_not_read(connection: HTTPConnection, length: str) -> None:
    assert ask(connection, length).status == 400


@pytest.fixture
def refusing() -> Iterator[int]:
    """The port of a server that refuses every request, as Triton server does."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(400)
            self.end_headers()
            self.wfile.write(json.dumps({"error": "guidance: got null"}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer((HOST, 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_when_the_server_is_away(connection: HTTPConnection) -> None:
    assert ask(connection, "2", "/elsewhere").status == 400
    answer = ask(connection, "2")
    assert (answer.status, "does not answer" in json.load(answer)["error"]) == (502, True)


def test_a_refusal_is_passed_on_as_one(tiny_bundle: BundleFiles, refusing: int) -> None:
    port = free_ports().http
    with Page(port, refusing, tiny_bundle, "tiny"):
        answer = ask(HTTPConnection(HOST, port, timeout=10), "2")
        assert (answer.status, json.load(answer)) == (400, {"error": "guidance: got null"})


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_says_what_went_wrong(tiny_bundle: BundleFiles, refusing: int, tmp_path: Path) -> None:
    port = free_ports().http
    with Page(port, refusing, tiny_bundle, "tiny"):
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom")
        command = [str(CHROMIUM), *options, "--virtual-time-budget=5000", f"http://{HOST}:{port}/?prompt=1"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert 'data-state="failed"' in shown
    assert '<p class="error" role="alert">guidance: got null</p>' in shown
