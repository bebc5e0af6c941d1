"""Code that both models of Triton server's Python backend share.

Runs inside the server only, which provides `triton_python_backend_utils`.
"""

from __future__ import annotations

import ctypes
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import triton_python_backend_utils as server

from adatsq_trt.engines.backends.selection import BackendName
from adatsq_trt.engines.bundle import MANIFEST_NAME
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.triton_server.pipeline import Pipeline
from adatsq_trt.errors import AdatsqError, DamagedFileError
from adatsq_trt.files import sha256

log = logging.getLogger(__name__)
_TAKEN = ctypes.c_char_p(b"used_dltensor")


def open_bundle(args: dict[str, str]) -> tuple[Bundle, dict[str, str]]:
    """Open a model's bundle, and read the parameters of its config.pbtxt.

    Args:
        args: given by the server to `initialize`.

    Raises:
        TritonModelException: the bundle is not the one that was deployed, or cannot be opened.
    """
    try:
        parameters = _parameters(args)
        folder = Path(args["model_repository"], parameters["bundle"])
        got = sha256(folder / MANIFEST_NAME)
        if got != parameters["manifest_sha256"]:
            raise DamagedFileError(
                f"'{folder / MANIFEST_NAME}': got sha256 {got}, config.pbtxt expects {parameters['manifest_sha256']}; "
                "run 'adatsq-trt deploy triton' again"
            )
        bundle = Bundle.open(folder, cast(BackendName, parameters["backend"]))
        log.info("'%s' %s", args["model_name"], bundle.choice.sentence)
        return bundle, parameters
    except AdatsqError as error:
        raise server.TritonModelException(str(error)) from error


def open_pipeline(args: dict[str, str], parameters: Mapping[str, str], bundle: Bundle) -> Pipeline | None:
    """Load the text encoders and the VAE that a model was deployed with, if it was.

    Args:
        args: given by the server to `initialize`.
        parameters: of config.pbtxt.
        bundle: the transformer.

    Raises:
        TritonModelException: they are not those that were deployed, or cannot be loaded.
    """
    try:
        if "pipeline" not in parameters:
            raise _incomplete(args, "no parameter 'pipeline'")
        if not parameters["pipeline"]:
            return None
        return Pipeline(Path(args["model_repository"], parameters["pipeline"]), bundle, bundle.device.type)
    except AdatsqError as error:
        raise server.TritonModelException(str(error)) from error


def most_samples(bundle: Bundle, wanted: int) -> int:
    """The most samples of a call: as many as wanted, or as plans take with both branches of guidance."""
    rows = bundle.most_rows(None)
    return wanted if rows is None else max(min(wanted, rows // 2), 1)


def read_tensors(request: Any) -> dict[str, np.ndarray]:
    """A request's inputs by name, copied out of the server's memory, which is gone when the request is.

    Through DLPack, because servers up to 24.10 (the wheel's is one) misread the arrays of NumPy 2.
    """
    return {tensor.name(): np.from_dlpack(tensor).copy() for tensor in request.inputs()}


def make_response(tensors: Mapping[str, np.ndarray]) -> Any:
    """A response with outputs by name; through DLPack, as `read_tensors`."""
    return server.InferenceResponse([_make_tensor(name, value) for name, value in tensors.items()])


def _make_tensor(name: str, value: np.ndarray) -> Any:
    capsule = np.ascontiguousarray(value).__dlpack__()
    tensor = server.Tensor.from_dlpack(name, capsule)
    # The server marks a capsule that it has taken in its own way; NumPy, which expects this one, would complain.
    ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), _TAKEN)
    return tensor


def refusal(message: str, code: int) -> Any:
    """A response that is an error with a sentence; `code` is one of TritonError's."""
    return server.InferenceResponse(error=server.TritonError(message, code))


def failure(what: str, error: Exception) -> Any:
    """A response for what nobody foresaw, be it a library's error or ours: a sentence for the client, the rest logged.

    Args:
        what: has failed.
        error: as it was raised.
    """
    log.error("%s failed", what, exc_info=error)
    reason = str(error) if isinstance(error, AdatsqError) else f"{type(error).__name__}: {error}"
    return refusal(f"{what} failed: {reason}; the server's log says more", server.TritonError.INTERNAL)


def _parameters(args: dict[str, str]) -> dict[str, str]:
    """The parameters of config.pbtxt, without which there is no bundle to open."""
    stated = json.loads(args["model_config"]).get("parameters", {})
    parameters = {name: value.get("string_value", "") for name, value in stated.items()}
    missing = sorted({"bundle", "backend", "manifest_sha256"} - set(parameters))
    if missing or parameters["backend"] not in get_args(BackendName):
        what = f"no parameter '{missing[0]}'" if missing else f"backend '{parameters['backend']}', which there is not"
        raise _incomplete(args, what)
    return parameters


def _incomplete(args: dict[str, str], what: str) -> DamagedFileError:
    return DamagedFileError(f"config.pbtxt of model '{args['model_name']}' has {what}; run 'adatsq-trt deploy triton'")
