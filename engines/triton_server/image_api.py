"""An endpoint in the shape of the common image-generation API, in front of Triton server.

    POST /v1/images/generations   {"prompt": "a red bicycle", "n": 1, "size": "1024x1024", "seed": 7}

Each image is a request of its own to Triton server's `generate`, where those that meet are batched. What the bundle
cannot do is refused in that API's shape of errors.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable
from threading import Thread
from types import TracebackType
from typing import Annotated, Literal, Self

from aiohttp import ClientError, ClientSession, ClientTimeout, web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.manifest import size_name
from adatsq_trt.engines.triton_server.parameters import cut
from adatsq_trt.engines.triton_server.server import HOST, require_free
from adatsq_trt.errors import OutputError, UnknownNameError, UserError

_log = logging.getLogger(__name__)
PATH = "/v1/images/generations"
_MAX_REQUEST_BYTES, _MAX_IMAGES = 100_000, 10
_INVALID, _FAILED = "invalid_request_error", "server_error"
_OWN_SIZE = "auto"


class _ImageRequest(BaseModel):
    """Fields of a request; `seed` is ours. Fields with one value have it for clients that name what is the default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=_MAX_IMAGES)] | None = None
    size: str | None = None
    seed: Annotated[int, Field(ge=0, le=(1 << 53) - 1)] | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto"] | None = None
    background: Literal["auto"] | None = None
    moderation: Literal["auto"] | None = None
    stream: Literal[False] | None = None
    user: str | None = None


class _RefusedError(Exception):
    """An answer other than 200, in the shape of the API's errors."""

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field, self.code = status, field, code

    def response(self) -> web.Response:
        kind = _INVALID if self.status < 500 else _FAILED
        error = {"message": str(self), "type": kind, "param": self.field, "code": self.code}
        return web.json_response({"error": error}, status=self.status)


class ImageApi:
    """The endpoint's server, on the loopback address; a context manager that ends it."""

    def __init__(self, port: int, http_port: int, bundle: BundleFiles, name: str) -> None:
        """Prepare; nothing is started yet.

        Args:
            port: of the endpoint.
            http_port: Triton server's.
            bundle: the one that is served.
            name: of the loop model.

        Raises:
            UserError: the port is in use, or the bundle draws videos or does not say how large its pictures are.
        """
        require_free(port)
        image, pixels = bundle.manifest.image, bundle.manifest.pixels
        if image.frames is not None:
            raise UserError(f"--image-api: bundle '{bundle.folder}' draws videos, the API has pictures; leave it out")
        if pixels is None:
            raise UserError(
                f"--image-api: bundle '{bundle.folder}' does not say how many pixels it draws; an earlier version "
                "built it: build it again"
            )
        height, width = pixels
        self._port, self._name, self._size = port, name, size_name((width, height))
        self._target = f"http://{HOST}:{http_port}/v2/models/{name}/generate"
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="image API", daemon=True)
        self._runner: web.AppRunner | None = None

    def __enter__(self) -> Self:
        """Start.

        Raises:
            OutputError: the port has been taken meanwhile.
        """
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        except OSError as error:
            self._end()
            raise OutputError(f"port {self._port} on {HOST} cannot be used: {error}; choose another") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End; requests under way are dropped."""
        self._end()

    def _end(self) -> None:
        if self._runner is not None:
            asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(middlewares=[_answer_errors], client_max_size=_MAX_REQUEST_BYTES)
        app.router.add_post(PATH, self._generate)
        # A client that leaves cancels its handler, and with it the requests to Triton server.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, self._port).start()

    async def _generate(self, request: web.Request) -> web.Response:
        """Draw `n` pictures, whose seeds follow each other."""
        asked = _read(await request.text())
        if asked.model not in (None, self._name):
            message = f"model '{cut(str(asked.model))}': expected '{self._name}'; leave it out, or name that"
            raise _RefusedError(404, message, "model", "model_not_found")
        if asked.size not in (None, _OWN_SIZE, self._size):
            message = f"size: got '{cut(str(asked.size))}', expected '{self._size}'; leave it out, or ask for that"
            raise _RefusedError(400, message, "size")
        first = random.randrange(1 << 31) if asked.seed is None else asked.seed
        seeds = range(first, first + (asked.n or 1))
        async with ClientSession(timeout=ClientTimeout(total=None)) as session:
            pictures = await asyncio.gather(*(self._draw(session, asked.prompt, seed) for seed in seeds))
        data = [
            {"b64_json": base64.b64encode(picture).decode(), "seed": seed}
            for seed, picture in zip(seeds, pictures, strict=True)
        ]
        about = {"created": int(time.time()), "output_format": "png", "size": self._size}
        return web.json_response({**about, "data": data})

    async def _draw(self, session: ClientSession, prompt: str, seed: int) -> bytes:
        """A PNG file, from Triton server.

        Raises:
            _RefusedError: the server refuses the prompt, has failed or is not there.
        """
        body = {"seed": seed, "parameters": {"output": "png", "text": prompt}}
        try:
            async with session.post(self._target, json=body) as answer:
                said = await answer.json(content_type=None)
                status = answer.status
        except (ClientError, json.JSONDecodeError) as error:
            raise _RefusedError(503, f"Triton server does not answer: {error}; try again") from error
        if status != 200:
            message, field = str(said.get("error", said)), None
            if message.startswith("text"):  # the parameter that the prompt is sent in
                message, field = f"prompt{message.removeprefix('text').partition(' ask with ')[0]}", "prompt"
            raise _RefusedError(400 if status < 500 else 500, message.removesuffix(", or").removesuffix(";"), field)
        return bytes(said["png"])


def _read(text: str) -> _ImageRequest:
    """A request's fields.

    Raises:
        _RefusedError: names the field that is wrong or unknown.
    """
    try:
        return _ImageRequest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "extra_forbidden":
            message = str(UnknownNameError("parameter", cut(str(field)), _ImageRequest.model_fields))
            raise _RefusedError(400, message, field, "unknown_parameter") from error
        if first["type"] == "missing" or field is None:
            raise _RefusedError(400, f"{field or 'the request'}: {first['msg']}", field) from error
        got = cut(json.dumps(first["input"]))
        message = f"{field}: got {got}; {first['msg'][:1].lower()}{first['msg'][1:]}"
        raise _RefusedError(400, message, field, "unsupported_value") from error


@web.middleware
async def _answer_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Give every error the API's shape, also those of the framework."""
    try:
        return await handler(request)
    except _RefusedError as refused:
        return refused.response()
    except web.HTTPException as error:
        return _RefusedError(error.status, f"{request.method} {cut(request.path)}: {error.reason}").response()
    except Exception as error:  # the endpoint goes on
        _log.exception("a request failed")
        return _RefusedError(500, f"unexpected {type(error).__name__}: {error}").response()
