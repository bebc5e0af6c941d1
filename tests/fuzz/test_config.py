"""Odd names and manifests: what Triton server would read is what was meant, or nothing is written."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc.model_config_pb2 import ModelConfig

from adatsq_trt.engines.bundle import BundleFiles, Manifest, PlanFile
from adatsq_trt.engines.triton_server.repository import BackendName, Deployment, write_repository
from adatsq_trt.errors import UserError
from adatsq_trt.files import parse_json_model
from adatsq_trt.graph_index import GraphIndex
from tests.engines.conftest import make_bundle
from tests.fuzz.conftest import FUZZ

# Ends of strings, comments, lists and lines in config.pbtxt, Dockerfile and README.md; placeholders; paths.
HOSTILE = (
    *('"', "\\", "a\nb", "a\r\nb", "#", "}", "]", "$name", "${", "$(id)", "`id`", "1 && id", ";", "|", "\0", "\u2028"),
    *('x"\nbackend: "evil"', 'x" } ] backend: "evil" input [ {', "x\nRUN evil", "../../x", "/etc", "..", ".", "-rf"),
    *("", " ", "ü", "x" * 300, "1\n", "1 ] } ] input [ {"),
)
BACKENDS: tuple[BackendName, ...] = ("onnxruntime", "rtx")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> BundleFiles:
    """One that both backends can serve."""
    files = make_bundle(tmp_path_factory.mktemp("config") / "bundle")
    plan = PlanFile(target="sm120", assignment=None, path="plans/sm120/switch.plan", bytes=1, max_rows=64)
    versions = {"adatsq-trt": "0.2.0", "tensorrt-rtx": "1.7.1"}
    # A repository of links needs no list of files, and of the graphs the one of all assignments alone.
    manifest = files.manifest.model_copy(update={"plans": (plan,), "versions": versions, "files": {}})
    index = files.index.model_copy(update={"graphs": (files.graph("cpu", None),)})
    return replace(files, manifest=manifest, index=index)


def documents(bundle: BundleFiles) -> dict[str, Any]:
    """All that a deployment takes text from."""
    parts = {"manifest": bundle.manifest, "index": bundle.index}
    return {"name": "name", **{part: json.loads(model.model_dump_json()) for part, model in parts.items()}}


def texts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a document whose value is text."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, str):
            yield value, key
        elif isinstance(inner, dict | list):
            yield from texts(inner)


class Repositories:
    """Writes repositories from altered documents and reads them as the server does."""

    def __init__(self, bundle: BundleFiles, folder: Path) -> None:
        self.bundle, self.output = bundle, folder / "repository"
        self.places = len(list(texts(documents(bundle))))
        write_repository([Deployment("sound", bundle, step_model=True)], folder / "sound", link=True)
        self.loop, self.step = (read(folder / "sound" / name) for name in ("sound", "sound_step"))
        self.dockerfile = instructions(folder / "sound")

    def require_sound(self, place: int, text: str, backend: BackendName) -> bool:
        """Put a text in some place; whether anything was written, which then is what was meant."""
        root = documents(self.bundle)
        container, key = list(texts(root))[place]
        container[key] = text
        name = root["name"]
        try:
            manifest = parse_json_model(json.dumps(root["manifest"]), "manifest", Manifest)
            index = parse_json_model(json.dumps(root["index"]), "index", GraphIndex)
            files = replace(self.bundle, manifest=manifest, index=index)
            write_repository([Deployment(name, files, True, backend=backend)], self.output, link=True)
        except UserError:
            assert not self.output.exists()
            return False
        try:
            beside = {"Dockerfile", "README.md", "compose.yaml", "probe.py"}
            assert {path.name for path in self.output.iterdir()} == {name, f"{name}_step", *beside}
            require_meant(read(self.output / name), self.loop, name, backend)
            require_meant(read(self.output / f"{name}_step"), self.step, f"{name}_step", backend)
            for got, expected in zip(instructions(self.output), self.dockerfile, strict=True):
                assert got.split()[:2] == expected.split()[:2]
                assert got.count("&&") == expected.count("&&")
                assert not set(got) & set(";|`$<>\"'")
        finally:
            shutil.rmtree(self.output)
        return True


def read(folder: Path) -> ModelConfig:
    """A model's configuration as the server reads it; its bundle lies in the repository."""
    config = text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), ModelConfig())
    place = folder / config.parameters["bundle"].string_value
    assert place.parent.resolve().is_relative_to(folder.parent.resolve())
    assert (place / "manifest.json").is_file()
    return config


def require_meant(config: ModelConfig, expected: ModelConfig, name: str, backend: str) -> None:
    """All but names is as in the configuration of a sound bundle."""
    assert (config.name, config.backend) == (name, "python")
    assert [field.name for field, _ in config.ListFields()] == [field.name for field, _ in expected.ListFields()]
    assert len(config.input) - len(expected.input) in (0, 1)  # an input that is no longer called timestep
    assert [tensor.dims for tensor in config.output] == [tensor.dims for tensor in expected.output]
    assert config.parameters.keys() == expected.parameters.keys()
    assert config.parameters["backend"].string_value == backend
    assert config.parameters["manifest_sha256"] == expected.parameters["manifest_sha256"]


def instructions(repository: Path) -> list[str]:
    """Lines of the Dockerfile without comments."""
    return [line for line in (repository / "Dockerfile").read_text("utf-8").splitlines() if not line.startswith("#")]


def test_hostile_text_at_every_place(bundle: BundleFiles, tmp_path: Path) -> None:
    repositories = Repositories(bundle, tmp_path)
    written = [
        repositories.require_sound(place, text, "rtx") for place in range(repositories.places) for text in HOSTILE
    ]
    assert 0 < sum(written) < len(written) / 2  # what goes into no other file may be anything


def test_any_text(go_on: Callable, bundle: BundleFiles, tmp_path: Path) -> None:
    repositories = Repositories(bundle, tmp_path)
    text = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=4), max_size=3).map("".join) | st.from_regex(
        r"\A[\w.-]+\Z"
    )

    @FUZZ
    @given(st.integers(0, repositories.places - 1), text, st.sampled_from(BACKENDS))
    def one_round(place: int, text: str, backend: BackendName) -> None:
        repositories.require_sound(place, text, backend)

    go_on(one_round)
