"""`build plugins` up to CMake: what it refuses, what it leaves out."""

import json
from pathlib import Path

import pytest

from adatsq_trt.errors import AdatsqError, OutputError, UnknownNameError
from adatsq_trt.plugins import build
from adatsq_trt.plugins.aot import KernelTable
from adatsq_trt.plugins.build import build_plugins
from adatsq_trt.plugins.tiles import load_tiles

TILES = load_tiles()


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation has tests of its own; here it gives an empty table."""

    def write_table(wanted: object, folder: Path, jobs: int, advance: object) -> KernelTable:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernels.json").write_text("{}")
        return KernelTable(kernels=())

    monkeypatch.setattr(build, "compile_kernels", write_table)


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    """A folder that looks like TensorRT's."""
    (tmp_path / "trt" / "include").mkdir(parents=True)
    (tmp_path / "trt" / "include" / "NvInferRuntime.h").touch()
    return tmp_path / "trt"


@pytest.fixture
def cmake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that writes down how it was called, makes the library, and ends as the file `code` says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "cmake"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/calls\n'
        '[ "$1" = -S ] && mkdir -p "$4" && echo lib > "$4/libadatsq_plugins.so"\n'
        f"echo it failed here >&2\nexit $(cat {folder}/code)\n"
    )
    script.chmod(0o755)
    (folder / "code").write_text("0")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    sources = tmp_path / "library"
    sources.mkdir()
    (sources / "CMakeLists.txt").touch()
    monkeypatch.setattr(build, "_SOURCES", sources)
    return folder


@pytest.mark.usefixtures("without_compiler")
def test_library_is_built_where_headers_are(cmake: Path, headers: Path, tmp_path: Path) -> None:
    built = build_plugins(("sm80",), tmp_path / "out", TILES, 3, headers)
    assert built.left_out == ""
    assert built.library == tmp_path / "out" / "libadatsq_plugins.so"
    assert built.library.read_text() == "lib\n"
    configure, compiled = (cmake / "calls").read_text().splitlines()
    assert f"-DADATSQ_KERNELS={tmp_path}/out/kernels" in configure
    assert f"-DTENSORRT_ROOT={headers}" in configure
    assert compiled.startswith(f"--build {tmp_path}/out/cmake --parallel 3")


@pytest.mark.usefixtures("without_compiler")
def test_headers_may_come_from_the_environment(
    cmake: Path, headers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORRT_ROOT", str(headers))
    assert build_plugins(("sm80",), tmp_path / "out", TILES, 1).library


@pytest.mark.usefixtures("without_compiler")
def test_what_is_left_out_is_said_with_the_way_to_get_it(
    cmake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build_plugins(("sm80",), tmp_path / "out", TILES, 1, tmp_path / "nowhere")
    assert built.library is None
    assert "no TensorRT headers (NvInferRuntime.h) in" in built.left_out
    assert "--tensorrt-root" in built.left_out
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "pip install cmake" in build_plugins(("sm80",), tmp_path / "out", TILES, 1).left_out


@pytest.mark.usefixtures("without_compiler")
def test_a_library_that_does_not_build_says_what_cmake_said(cmake: Path, headers: Path, tmp_path: Path) -> None:
    (cmake / "code").write_text("1")
    with pytest.raises(AdatsqError, match="it failed here") as failure:
        build_plugins(("sm80",), tmp_path / "out", TILES, 1, headers)
    assert failure.value.exit_code == 1


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OutputError, match="holds no earlier build"):
        build_plugins(("sm80",), tmp_path, TILES, 1)
    with pytest.raises(OutputError, match="is a file"):
        build_plugins(("sm80",), tmp_path / "thesis.tex", TILES, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'sm89'"):
        build.require_targets(["sm80", "sm88"])
    assert build.require_targets([" sm80", "sm80"]) == ("sm80",)


def test_results_say_whether_a_gpu_was_there() -> None:
    results = json.loads((Path(__file__).parents[2] / "benchmarks/kernels/results.json").read_text())
    assert results["schema_version"] == 1
    assert results["timings"] if results["measured"] else "No GPU" in results["reason"]
