"""The C++ library: built from the headers that are there, driven through the registry of a real TensorRT runtime.

The kernels are stand-ins. What needs a GPU, that is to say every launch, goes to a driver that records it.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "plugins" / "library"


def runtime() -> Path:
    """libnvinfer_lean.so of the installed wheel."""
    spec = importlib.util.find_spec("tensorrt_lean_libs")
    if spec is None or spec.origin is None:
        pytest.skip("plugin library not tested: no TensorRT lean runtime; pip install 'adatsq-trt[plugins-test]'")
    return next(Path(spec.origin).parent.glob("libnvinfer_lean.so.*"))


def require_same_major(configured: str) -> None:
    """Skip where the wheel is of another major version than the headers."""
    headers = configured.split("TensorRT headers: ")[1].split(".")[0]
    installed = runtime().name.removeprefix("libnvinfer_lean.so.")
    if headers != installed:
        pytest.skip(
            f"plugin library not tested: headers of TensorRT {headers}, lean runtime {installed}; "
            f"pip install 'tensorrt-lean-cu13-libs=={headers}.*' 'tensorrt-lean-cu13-bindings=={headers}.*'"
        )


def build(kernels: Path, folder: Path, *options: str) -> Path:
    """Configure and build the CMake project; skips where its prerequisites are not there."""
    if not shutil.which("cmake") or not shutil.which("g++"):
        pytest.skip("plugin library not tested: no cmake or no g++")
    python = f"-DPython3_EXECUTABLE={sys.executable}"
    command = ["cmake", "-S", PROJECT, "-B", folder, f"-DADATSQ_KERNELS={kernels}", python, *options]
    configured = subprocess.run(command, capture_output=True, text=True, check=False)
    for headers in ("TensorRT", "CUDA"):
        if f"found no {headers} headers" in configured.stderr.replace("\n ", ""):
            pytest.skip(f"plugin library not tested: no {headers} headers; set TENSORRT_ROOT and CUDA_HOME")
    assert configured.returncode == 0, configured.stderr
    require_same_major(configured.stdout)
    built = subprocess.run(["cmake", "--build", folder, "--parallel", "1"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout
    assert "warning:" not in built.stdout
    return folder / "libadatsq_plugins.so"


def configure_with_fetched_headers(folder: Path, tag: str) -> subprocess.CompletedProcess[str]:
    """CMake's first step, while the address of NVIDIA's repository stands for a small one on this disk."""
    (folder / "kernels").mkdir(exist_ok=True)
    (folder / "kernels" / "kernels.json").touch()
    cuda = folder / "cuda" / "include"
    cuda.mkdir(parents=True, exist_ok=True)
    for header in ("cuda.h", "cuda_runtime_api.h"):
        (cuda / header).touch()
    options = [f"-DADATSQ_KERNELS={folder / 'kernels'}", f"-DADATSQ_FETCH_TENSORRT_HEADERS={tag}"]
    options += [f"-DCUDA_INCLUDE_DIR={cuda}", f"-DPython3_EXECUTABLE={sys.executable}"]
    address = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{folder / 'TensorRT'}.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/NVIDIA/TensorRT.git",
    }
    command = ["cmake", "-S", PROJECT, "-B", folder / "build", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **address})


@pytest.mark.skipif(not all(map(shutil.which, ("cmake", "g++", "git"))), reason="no cmake, no g++ or no git")
def test_headers_are_downloaded_and_nothing_else(tmp_path: Path) -> None:
    repository = tmp_path / "TensorRT"
    for name, text in {
        "include/NvInferRuntime.h": "",
        "include/NvInferVersion.h": "#define NV_TENSORRT_MAJOR 10\n#define NV_TENSORRT_MINOR 13\n",
        "samples/large.bin": "not wanted",
    }.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(text)
    git = ["git", "-C", repository, "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "headers"], ["tag", "v10.13.3"]):
        subprocess.run([*git, *words], check=True)
    fetched = configure_with_fetched_headers(tmp_path, "v10.13.3")
    assert fetched.returncode == 0, fetched.stderr
    assert "TensorRT headers: 10.13 in" in fetched.stdout
    files = {path.name for path in (tmp_path / "build" / "tensorrt-v10.13.3").iterdir()}
    assert files == {".git", "include"}
    refused = configure_with_fetched_headers(tmp_path, "v99")
    assert refused.returncode != 0
    assert "cannot download the headers of tag 'v99'" in " ".join(refused.stderr.split())


def run_harness(folder: Path, library: Path, way: str, driver: bool) -> str:
    path = str(folder / "test" / "driver") if driver else ""
    environment = {**os.environ, "LD_LIBRARY_PATH": path}
    command = [folder / "test" / "harness", runtime(), library, way]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert (done.returncode, failed, done.stderr) == (0, [], ""), done.stderr or done.stdout[-3000:]
    return done.stdout


def test_calls_bad_input_and_mutations_under_sanitizers(kernels: Path, tmp_path: Path) -> None:
    library = build(kernels, tmp_path, "-DADATSQ_TESTS=ON", "-DADATSQ_SANITIZE=address,undefined")
    loaded = run_harness(tmp_path, library, "load", driver=True)
    assert "10000 mutations" in loaded
    assert loaded.count("enqueue on stream") == 44  # 11 profiles, 6 and 100 tokens, 2 streams
    dlopened = run_harness(tmp_path, library, "dlopen", driver=False)
    assert "dlopen: the library has registered itself" in dlopened
    assert "enqueue on stream" not in dlopened


DRIVE_FROM_PYTHON = """
import ctypes, os, sys
import tensorrt_lean_bindings as trt
ctypes.CDLL(sys.argv[1])  # what polygraphy does with --plugins
creator = trt.get_plugin_registry().get_creator("AdatsqLinear", "1", "adatsq")
text = lambda name, value: trt.PluginField(name, value.encode(), trt.PluginFieldType.CHAR)
fields = [text("profiles", "w8a8,w4a8"), text("inputs", "x,selector,w4,w4_scale,lo,w8_scale")]
plugin = creator.create_plugin("layer", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
print([plugin.get_capability_interface(kind) is not None for kind in trt.PluginCapabilityType.__members__.values()])
print([field.name for field in creator.field_names])
sys.stdout.flush()
os._exit(0)  # the registry and Python disagree about who frees the creator
"""


def test_shipped_build(kernels: Path, tmp_path: Path) -> None:
    library = build(kernels, tmp_path)
    dynamic = subprocess.run(["readelf", "--dynamic", library], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert needed <= {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libdl.so.2", "libc.so.6"}
    command = [sys.executable, "-c", DRIVE_FROM_PYTHON, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[True, True, True]", "['profiles', 'inputs', 'group_size']"], done.stderr
