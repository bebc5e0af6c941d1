"""Ask the models of a Triton server for an answer: its health pages do not notice that a model's process is dead.

    python3 probe.py [--address localhost:8000] [--timeout 20] [--end-server FILE] [MODEL ...]

Every model gets a request that it refuses itself, which costs no computing. Ends with 0 when all have answered, and
with 1 and a line on stderr when one has not. `--end-server` also ends the server whose process id is in the file, when
a model's process is dead, and only then; whoever started the server starts it again. Models are those in the folder
in which this file lies, unless they are named. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

# What the server says for a model of the Python backend whose process gives no sign of life for a second. One that the
# machine has kept waiting does so when it is asked again.
_DEAD = "is not healthy"
_AGAIN_SECONDS = 3
_BYTES = {"BOOL": 1, "FP16": 2, "BF16": 2, "FP32": 4, "INT32": 4, "INT64": 8}


class SilentError(Exception):
    """A model has not answered; with a sentence."""


class DeadError(SilentError):
    """A model's process is dead."""


def main() -> int:
    """Probe, and give the exit code."""
    parser = argparse.ArgumentParser(description="Asks the models of a Triton server for an answer.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="unless given: those in the folder of this file")
    parser.add_argument("--address", default="localhost:8000", help="of the server's HTTP (%(default)s)")
    parser.add_argument("--timeout", type=float, default=20, help="of each request in seconds (%(default)s)")
    parser.add_argument("--end-server", type=Path, metavar="FILE", help="end the server of this process id, if need be")
    options = parser.parse_args()
    models = options.models or sorted(path.parent.name for path in Path(__file__).parent.glob("*/config.pbtxt"))
    try:
        if not models:
            raise SilentError(f"no models in '{Path(__file__).parent}'; name one")
        for model in models:
            require_answer(f"http://{options.address}/v2/models/{model}", model, options.timeout)
    except SilentError as error:
        sys.stderr.write(f"{error}\n")
        if isinstance(error, DeadError) and options.end_server is not None:
            _end(options.end_server)
        return 1
    return 0


def require_answer(address: str, model: str, timeout: float) -> None:
    """Ask a model for its own refusal.

    Args:
        address: of the model.
        model: its name.
        timeout: of each request, in seconds.

    Raises:
        DeadError: the model's process is dead.
        SilentError: there is no answer, or another one; the model may be loading, or busy for longer than `timeout`.
    """
    try:
        inputs = json.loads(_ask(address, None, {}, timeout)).get("inputs", [])
        if any(tensor["name"] == "step" for tensor in inputs):
            asked, expected = (f"{address}/infer", *_step_request(inputs)), "step: got [-1]"
        else:
            asked, expected = (
                (f"{address}/generate", json.dumps({"prompt": 0, "seed": -1}).encode(), {}),
                "seed: got -1",
            )
        said = _ask(*asked, timeout)
        if _DEAD in said:
            time.sleep(_AGAIN_SECONDS)
            said = _ask(*asked, timeout)
    except (OSError, HTTPException, ValueError) as error:
        raise SilentError(f"model '{model}' does not answer: {error}") from error
    if _DEAD in said:
        raise DeadError(f"the process of model '{model}' is dead: {said}")
    if expected not in said:
        raise SilentError(f"model '{model}' does not answer for itself: {said[:300]}")


def _step_request(inputs: list[dict[str, Any]]) -> tuple[bytes, dict[str, str]]:
    """A call of a step model with one row of zeros at step -1: JSON, then the bytes of all tensors."""
    described, content = [], b""
    for tensor in inputs:
        shape = [1 if size < 0 else size for size in tensor["shape"]]
        length = math.prod(shape) * _BYTES[tensor["datatype"]]
        content += b"\xff" * length if tensor["name"] == "step" else bytes(length)  # all bits are -1
        parameters = {"binary_data_size": length}
        described.append({**tensor, "shape": shape, "parameters": parameters})
    header = json.dumps({"inputs": described}).encode()
    return header + content, {"Inference-Header-Content-Length": str(len(header))}


def _ask(address: str, body: bytes | None, headers: dict[str, str], timeout: float) -> str:
    """Return the server's answer, be it a refusal."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=timeout) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode()


def _end(file: Path) -> None:
    """End a server at once: what a dead process has been given is never answered, and would be waited for."""
    try:
        if (process := int(file.read_text())) <= 1:  # to the system these mean every process, or all of a group
            raise ValueError(f"{process} is no server's process id")
        os.kill(process, signal.SIGKILL)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"cannot end the server of '{file}': {error}\n")


if __name__ == "__main__":
    sys.exit(main())
