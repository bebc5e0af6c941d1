"""A web page for a try: it forwards a browser's requests to Triton server, which allows no pages from elsewhere."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import TracebackType
from typing import Any, Self

from adatsq_trt.engines.bundle import BundleFiles, Manifest
from adatsq_trt.engines.triton_server.server import HOST, require_free
from adatsq_trt.engines.triton_server.writing import fill

_MAX_REQUEST_BYTES = 100_000


class Page:
    """The page's server, on the loopback address; a context manager that ends it."""

    def __init__(self, port: int, http_port: int, bundle: BundleFiles, name: str) -> None:
        """Serve the page.

        Args:
            port: of the page.
            http_port: Triton server's.
            bundle: the one that is served; the page shows its steps and buckets.
            name: of the loop model.

        Raises:
            UserError: the port is in use.
        """
        require_free(port)
        text = page_text(bundle, name)

        class Handler(_Handler):
            page = text.encode()
            target = f"http://{HOST}:{http_port}/v2/models/{name}/generate_stream"

        self._server = ThreadingHTTPServer((HOST, port), Handler)
        self._server.daemon_threads = True
        self._thread = Thread(target=self._server.serve_forever, name="page", daemon=True)

    def __enter__(self) -> Self:
        """Start."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        self._server.shutdown()
        self._server.server_close()


def page_text(bundle: BundleFiles, name: str) -> str:
    """The page of a bundle, which knows its prompts, its buckets and their formats."""
    manifest, policy = bundle.manifest, bundle.policy
    assignments = [Counter(row.values()).most_common() for row in policy.rows]
    formats = [", ".join(f"{count} × {name}" for name, count in row) for row in assignments]
    data = {
        "steps": policy.steps,
        "buckets": [{**asdict(bucket), "formats": formats[bucket.assignment]} for bucket in policy.buckets],
        "prompts": manifest.prompt_texts,
        "last_prompt": manifest.prompts - 1,
    }
    buckets = f"{len(policy.buckets)} buckets" if len(policy.buckets) > 1 else "one bucket"
    values = {
        "name": name,
        "summary": f"{policy.steps} steps in {buckets} (steps with the same formats), {policy.mean_bits:.2f} mean bits",
        "guidance": f"{manifest.guidance:g}",
        "second": _second_scale(manifest),
        "data": json.dumps(data).replace("<", r"\u003c"),  # a prompt cannot end the script
    }
    return fill("page.html", values)


def _second_scale(manifest: Manifest) -> str:
    """The field of the second transformer's scale of guidance, in HTML; empty where there is one transformer."""
    field = f'<input name="guidance_2" type="number" step="any" value="{manifest.second_guidance:g}" required>'
    return f"<label>Guidance of the second transformer{field}</label>" if manifest.schedule.experts else ""


class _Handler(BaseHTTPRequestHandler):
    """Answers one request of a browser."""

    page: bytes
    target: str

    def do_GET(self) -> None:
        """The page itself."""
        if self.path.partition("?")[0] != "/":
            self.send_error(404)
            return
        self._begin(200, "text/html; charset=utf-8")
        self.wfile.write(self.page)

    def do_POST(self) -> None:
        """A generation: what Triton server says is passed on as it comes."""
        stated = self.headers.get("Content-Length", "")
        length = int(stated) if stated.isdecimal() and len(stated) < 10 else 0
        if self.path != "/generate" or not 0 < length <= _MAX_REQUEST_BYTES:
            self.send_error(400)
            return
        request = urllib.request.Request(self.target, data=self.rfile.read(length))
        try:
            answer = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            answer = error  # its body is Triton server's sentence
        except (OSError, HTTPException) as error:
            self._begin(502, "application/json")
            self.wfile.write(_error_message(f"Triton server does not answer: {error}"))
            return
        with answer, suppress(ConnectionError):  # the browser may leave
            self._begin(answer.status, "text/event-stream")
            for part in _parts(answer):
                self.wfile.write(part)

    def _begin(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the terminal is for the command."""


def _parts(answer: Any) -> Iterator[bytes]:
    """Yield the answer as it comes; at the end a message of our own where the server goes away before the last one."""
    try:
        while part := answer.read1():
            yield part
    except (OSError, HTTPException):
        yield b"\n\ndata: " + _error_message("Triton server went away before the answer; ask again") + b"\n\n"


def _error_message(text: str) -> bytes:
    return json.dumps({"error": text}).encode()
