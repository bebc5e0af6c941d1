"""Clients of a loop model: HTTP with the standard library, gRPC streams with the vendor's client."""

from __future__ import annotations

import json
import queue
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from adatsq_trt.engines.triton_server.server import HOST, Ports

TYPES = {
    **dict.fromkeys(("prompt", "seed", "steps"), ("INT64", np.int64)),
    "guidance": ("FP32", np.float32),
    **dict.fromkeys(("quantized", "progress", "preview"), ("BOOL", bool)),
}
TIMEOUT_SECONDS = 60  # of an answer, unless a client is told otherwise


class RefusedError(Exception):
    """The server answered with a sentence."""


class GoneError(Exception):
    """There is no server, or it went away before it answered."""


class Client(Protocol):
    """One connection, used by one thread."""

    def latents(self, model: str, **values: Any) -> np.ndarray:
        """Final latents, float32 [samples * ...]."""

    def close(self) -> None:
        """End the connection."""


class HttpClient:
    """Asks through `generate`."""

    def __init__(self, ports: Ports) -> None:
        self._address = f"http://{HOST}:{ports.http}/v2/models"

    def generate(
        self, model: str, output: str = "latents", parameters: Mapping[str, str] = MappingProxyType({}), **values: Any
    ) -> dict[str, Any]:
        """The one message of a generation."""
        body = json.dumps({**values, "parameters": {"output": output, **parameters}}).encode()
        request = urllib.request.Request(f"{self._address}/{model}/generate", data=body)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise RefusedError(json.load(error)["error"]) from error
        except (OSError, json.JSONDecodeError) as error:
            raise GoneError(str(error)) from error

    def latents(self, model: str, **values: Any) -> np.ndarray:
        return np.array(self.generate(model, **values)["latents"], np.float32)

    def close(self) -> None:
        """HTTP keeps no connection."""


class GrpcClient:
    """Asks through a stream, which carries messages until the last."""

    def __init__(self, ports: Ports, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._address, self._timeout_seconds = f"{HOST}:{ports.grpc}", timeout_seconds
        self._client: triton.InferenceServerClient | None = None
        self._messages: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, model: str, output: str = "latents", **values: Any) -> None:
        """Send a request without waiting for its answer."""
        if self._client is None:
            self._client, messages = triton.InferenceServerClient(self._address), queue.SimpleQueue()
            self._messages = messages
            self._client.start_stream(lambda result, error: messages.put((result, error)))
        inputs = []
        for name, value in values.items():
            kind, dtype = TYPES[name]
            array = np.atleast_1d(np.asarray(value, dtype))
            inputs.append(triton.InferInput(name, array.shape, kind).set_data_from_numpy(array))
        try:
            self._client.async_stream_infer(model, inputs, parameters={"output": output})
        except InferenceServerException as error:
            raise self._failed(error) from error

    def messages(self) -> Iterator[Any]:
        """Yield the server's messages, up to the last."""
        while True:
            try:
                result, error = self._messages.get(timeout=self._timeout_seconds)
            except queue.Empty as late:
                raise self._failed(TimeoutError(f"no answer in {self._timeout_seconds} s")) from late
            if error is not None:
                raise self._failed(error)
            yield result
            if result.get_response().parameters["triton_final_response"].bool_param:
                return

    def latents(self, model: str, **values: Any) -> np.ndarray:
        self.start(model, **values)
        return list(self.messages())[-1].as_numpy("latents").ravel()

    def cancel(self) -> None:
        """Give up what runs."""
        if self._client is not None:
            self._client.stop_stream(cancel_requests=True)
        self.close()

    def close(self) -> None:
        """End the stream; the next request makes a new one."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _failed(self, error: Exception) -> Exception:
        message = error.message() if isinstance(error, InferenceServerException) else str(error)
        # A sentence of the server comes through an intact stream; the others are the transport's.
        status = error.status() if isinstance(error, InferenceServerException) else None
        lost = (status is not None and "UNAVAILABLE" in str(status)) or not isinstance(error, InferenceServerException)
        if lost or ("stream" in message.lower() and "no longer" in message.lower()):
            self.close()
            return GoneError(message)
        return RefusedError(message)
