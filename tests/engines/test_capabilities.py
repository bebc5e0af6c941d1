"""What is found on a machine, and that nothing missing or broken stops the look."""

import platform
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

from adatsq_trt.engines.capabilities import Capability, diagnose


@pytest.fixture(scope="module")
def found() -> dict[str, Capability]:
    return {capability.name: capability for capability in diagnose()}


def test_reports_what_this_machine_has(found: dict[str, Capability]) -> None:
    assert found["Python"].detail == platform.python_version()
    assert found["torch"].detail == torch.__version__
    assert found["GPU"].found == torch.cuda.is_available()
    for provider in onnxruntime.get_available_providers():
        assert provider.removesuffix("ExecutionProvider") in found["ONNX Runtime"].detail
    assert found["TensorRT-RTX"].found
    assert found["polygraphy"].found


def test_everything_missing_comes_with_advice(found: dict[str, Capability]) -> None:
    for capability in found.values():
        assert capability.found == (not capability.advice), capability
        assert capability.needed_for


def test_no_advice_asks_an_index_for_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["adatsq_trt.engines.capabilities"], "_versions", lambda _: iter(()))
    monkeypatch.setattr("torch.cuda.is_available", lambda: 1 / 0)
    missing = {c.name: c.advice for c in diagnose() if not c.found}
    assert missing["torch"] == missing["GPU"] == "pip install -e ."
    assert missing["TensorRT (enterprise)"] == "pip install -e '.[tensorrt]'"
    assert not any("adatsq" in advice for advice in missing.values())


def test_a_library_that_does_not_load_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)  # makes the import fail
    broken = next(c for c in diagnose() if c.name == "TensorRT-RTX")
    assert not broken.found
    assert "does not load" in broken.detail
    assert "--force-reinstall" in broken.advice


def test_compilers_are_looked_for_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good, bad = tmp_path / "g++", tmp_path / "cmake"
    good.write_text("#!/bin/sh\necho 'g++ 99.1'\n")
    bad.write_text("#!/bin/sh\nexit 1\n")
    for path in (good, bad):
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {capability.name: capability for capability in diagnose()}
    assert found["g++"].detail == "g++ 99.1"
    assert "does not run" in found["cmake"].detail
    assert not found["cmake"].found


def test_the_server_is_found_where_its_make_target_puts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("adatsq_trt.engines.triton_server.server.APART", tmp_path)
    monkeypatch.setattr("adatsq_trt.engines.triton_server.server._INSTALLED", tmp_path / "none")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    def server() -> Capability:
        return next(c for c in diagnose() if c.name == "Triton server")

    assert (server().found, server().detail) == (False, "no Triton server in this environment")
    assert server().advice == "pip install --no-deps nvidia-pytriton==0.7.0"
    binary = tmp_path / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    binary.parent.mkdir(parents=True)
    binary.touch()
    assert not server().found  # `serve` would not find what it copies
    assert server().detail == f"the Triton server in '{tmp_path}' has no 'backends/python'"
    (binary.parents[1] / "backends" / "python").mkdir(parents=True)
    stub = f"python_backend_stubs/3.{sys.version_info.minor}/triton_python_backend_stub"
    assert server().detail == f"the Triton server in '{tmp_path}' has no '{stub}'"
    (binary.parents[1] / stub).mkdir(parents=True)
    assert server().detail == f"unknown version in {tmp_path}"
    metadata = tmp_path / "nvidia_pytriton-0.7.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    assert server().detail == f"unknown version in {tmp_path}"  # pip was interrupted
    metadata.write_text("Metadata-Version: 2.1\nName: nvidia-pytriton\nVersion: 0.7.0\n")
    assert (server().found, server().detail) == (True, f"0.7.0 in {tmp_path}")


def test_a_folder_that_does_not_exist_has_no_disk(tmp_path: Path) -> None:
    disk = next(c for c in diagnose(tmp_path / "absent") if c.name == "disk")
    assert not disk.found
