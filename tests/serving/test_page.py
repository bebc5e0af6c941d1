"""The web page in headless Chromium, driven through its DevTools protocol."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import ClientSession
from PIL import Image

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.triton_server.page import Page
from adatsq_trt.engines.triton_server.server import HOST, Server, free_ports
from adatsq_trt.errors import UserError
from tests.serving.conftest import DIGITS

pytestmark = pytest.mark.serving
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENSHOT = Path(__file__).parents[2] / "build" / "serving-page.png"
READ = """JSON.stringify({
  state: document.body.dataset.state,
  error: document.querySelector(".error").textContent,
  texts: [...document.querySelectorAll("figure p")].map(p => p.textContent),
  boxes: [...document.querySelectorAll("img")].map(img => img.getBoundingClientRect()),
})"""


@pytest.fixture
def address(server: Server, digits: BundleFiles) -> Iterator[str]:
    port = free_ports().http
    with Page(port, server.ports.http, digits, DIGITS):
        yield f"http://{HOST}:{port}"


@contextmanager
def browser(folder: Path) -> Iterator[int]:
    """A headless Chromium; gives the port of its DevTools."""
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--window-size=900,860")
    process = subprocess.Popen(
        [str(CHROMIUM), *options, f"--user-data-dir={folder}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        port, deadline = folder / "DevToolsActivePort", time.monotonic() + 60
        while not port.exists() or not port.read_text():
            assert time.monotonic() < deadline, "the browser does not start"
            time.sleep(0.1)
        yield int(port.read_text().splitlines()[0])
    finally:
        process.terminate()
        process.wait(30)


async def visit(port: int, address: str) -> tuple[dict[str, Any], bytes]:
    """Open the page and wait until its generation has ended; what it says then, and a screenshot."""
    async with ClientSession() as session:
        async with session.put(f"http://{HOST}:{port}/json/new?{address}") as opened:
            target = await opened.json()
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as devtools:

            async def call(number: int, method: str, **parameters: object) -> dict[str, Any]:
                await devtools.send_json({"id": number, "method": method, "params": parameters})
                while (answer := await devtools.receive_json(timeout=60)).get("id") != number:
                    pass
                return answer["result"]

            for number in range(1, 300):
                seen = await call(number, "Runtime.evaluate", expression=READ)
                said = json.loads(seen["result"].get("value") or "{}")
                if said.get("state") in ("finished", "failed"):
                    break
                await asyncio.sleep(0.1)
            shot = await call(1000, "Page.captureScreenshot")
            return said, base64.b64decode(shot["data"])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_finished_generation_in_the_browser(address: str, digits: BundleFiles, tmp_path: Path) -> None:
    with browser(tmp_path) as port:
        said, shot = asyncio.run(visit(port, f"{address}/?prompt=3&seed=7"))
        failed, _ = asyncio.run(visit(port, f"{address}/?prompt=33&seed=7"))
    SCREENSHOT.parent.mkdir(exist_ok=True)
    SCREENSHOT.write_bytes(shot)
    assert (said["state"], said["error"]) == ("finished", "")
    assert said["texts"] == ["step 5, bucket 1", "step 5"]
    # The picture of each side, as it is on the screen, is the one of the loop in process.
    bundle, screen = Bundle(digits), np.asarray(Image.open(BytesIO(shot)).convert("L"), np.float32)
    for box, quantized in zip(said["boxes"], (True, False), strict=True):
        image = bundle.decode(bundle.denoise(bundle.noise([7]), bundle.conditioning([3]), quantized=quantized))[0]
        size = box["width"] / len(image)
        middles = [int((i + 0.5) * size) for i in range(len(image))]
        pixels = screen[np.ix_([int(box["y"]) + m for m in middles], [int(box["x"]) + m for m in middles])]
        np.testing.assert_allclose(pixels, image[..., 0] * 255, atol=2)
    assert failed["state"] == "failed"
    assert failed["error"] == "prompt 33: the bundle holds prompts 0 to 9; choose among these"


def test_other_addresses_are_refused(address: str) -> None:
    for path, body in (("/secret", None), ("/elsewhere", b"{}"), ("/generate", b"")):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(urllib.request.Request(address + path, data=body))


def test_port_in_use(server: Server, digits: BundleFiles) -> None:
    with pytest.raises(UserError, match=f"port {server.ports.http} on .* cannot be used: Address already in use"):
        Page(server.ports.http, server.ports.http, digits, DIGITS)
