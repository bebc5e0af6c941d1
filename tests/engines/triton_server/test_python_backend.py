"""What a model reads back from its config.pbtxt, as the server hands it over; tests/serving has the server itself."""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from adatsq_trt.engines.bundle import MANIFEST_NAME, BundleFiles
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository

OpenBundle = Callable[[dict[str, str]], Any]


class TritonModelException(Exception):  # noqa: N818  (the server's name)
    """What a model raises in the server."""


@pytest.fixture
def open_bundle(monkeypatch: pytest.MonkeyPatch) -> OpenBundle:
    """The models' function, with the one thing that it takes from the server when it opens a bundle."""
    server = ModuleType("triton_python_backend_utils")
    monkeypatch.setitem(sys.modules, server.__name__, server)
    module = import_module("adatsq_trt.engines.triton_server.python_backend")
    monkeypatch.setattr(module.server, "TritonModelException", TritonModelException, raising=False)
    return module.open_bundle


@pytest.fixture
def repository(tiny_bundle: BundleFiles, tmp_path: Path) -> Path:
    write_repository([Deployment("tiny", tiny_bundle, step_model=True)], tmp_path / "repository")
    return tmp_path / "repository"


def arguments(repository: Path, model: str) -> dict[str, str]:
    """What the server gives to a model."""
    config = text_format.Parse((repository / model / "config.pbtxt").read_text(), ModelConfig())
    content = json_format.MessageToJson(config, preserving_proto_field_name=True)
    return {"model_config": content, "model_repository": str(repository / model), "model_name": model}


@pytest.mark.parametrize("model", ["tiny", "tiny_step"])
def test_models_open_the_bundle_that_was_deployed(
    open_bundle: OpenBundle, repository: Path, tiny_bundle: BundleFiles, model: str
) -> None:
    bundle, parameters = open_bundle(arguments(repository, model))
    assert bundle.files.folder.resolve() == repository / "tiny" / "1" / "bundle"
    assert bundle.manifest == tiny_bundle.manifest
    assert parameters["backend"] == "auto"
    assert bundle.choice.name == "onnxruntime"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bundle", None, "config.pbtxt of model 'tiny' has no parameter 'bundle'"),
        ("manifest_sha256", None, "has no parameter 'manifest_sha256'"),
        ("backend", "tpu", "has backend 'tpu', which there is not"),
        ("manifest_sha256", "0" * 64, f"config.pbtxt expects {'0' * 64}"),
        ("bundle", "../..", "does not exist"),
    ],
)
def test_parameters_of_something_else(
    open_bundle: OpenBundle, repository: Path, name: str, value: str | None, message: str
) -> None:
    given = arguments(repository, "tiny")
    config = json.loads(given["model_config"])
    config["parameters"][name] = {"string_value": value}
    if value is None:
        del config["parameters"][name]
    with pytest.raises(TritonModelException, match=message):
        open_bundle({**given, "model_config": json.dumps(config)})


def test_a_bundle_that_was_changed(open_bundle: OpenBundle, repository: Path) -> None:
    with (repository / "tiny" / "1" / "bundle" / MANIFEST_NAME).open("a") as manifest:
        manifest.write(" ")
    with pytest.raises(TritonModelException, match=r"manifest\.json': got sha256"):
        open_bundle(arguments(repository, "tiny_step"))
