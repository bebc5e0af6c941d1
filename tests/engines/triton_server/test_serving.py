"""What is refused before anything is built or started, and whose text encoders are taken without being asked for."""

import logging
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from adatsq_trt.engines.triton_server import serving
from adatsq_trt.errors import DependencyError, MismatchError, UserError

WITH_TEXT, WITHOUT = (SimpleNamespace(manifest=SimpleNamespace(text=text)) for text in ("encoders", None))


def accept(*_: object) -> None:
    """As for the pipeline that a bundle was built from."""


def refuse(*_: object) -> NoReturn:
    raise MismatchError("'text_encoder/config.json' is not the file that the bundle's prompts were encoded with")


@pytest.mark.parametrize(
    ("files", "folder", "require", "found"),
    [
        (WITH_TEXT, Path("mine"), accept, Path("mine")),
        (WITH_TEXT, Path("mine"), refuse, None),
        (WITH_TEXT, None, refuse, None),
        (WITHOUT, Path("mine"), refuse, None),
    ],
)
def test_encoders_that_nobody_named_are_taken_only_if_they_are_the_bundles(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    files: Any,
    folder: Path | None,
    require: Callable[..., None],
    found: Path | None,
) -> None:
    monkeypatch.setattr(serving, "require_pipeline", require)
    with caplog.at_level(logging.WARNING):
        assert serving.known_pipeline(folder, files) == found
    told = files is WITH_TEXT and folder is not None and found is None
    assert ("requests cannot be text" in caplog.text) is told


def test_pages_that_cannot_be_served_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    serving.require_pages(None, None)
    with socket.socket() as busy:
        busy.bind((serving.HOST, 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on"):
            serving.require_pages(port, None)
        with pytest.raises(UserError, match=f"port {port} on"):
            serving.require_pages(None, port)
    monkeypatch.setattr(serving, "find_spec", lambda _: None)
    with pytest.raises(DependencyError, match=r"pip install 'adatsq-trt\[image-api\]'"):
        serving.require_pages(None, port)
