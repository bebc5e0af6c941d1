"""The plugin on a GPU: every format against PyTorch, on two streams and in a CUDA graph."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adatsq_trt.packing import pack_nibbles

pytestmark = pytest.mark.gpu

N, K, GROUP = 192, 256, 64
LIBRARY = Path(__file__).parents[2] / "plugins" / "library"
SHARED = ("x", "selector", "bias", "smoothing")
NESTED = ("w4", "w4_scale", "lo", "w8_scale")


class Plugin:
    """The library with the kernels of this machine's GPU."""

    def __init__(self, folder: Path) -> None:
        major, minor = torch.cuda.get_device_capability()
        command = [Path(sys.executable).with_name("adatsq-trt"), "build", "plugins", "--targets", f"sm{major}{minor}"]
        subprocess.run([*command, "--output", folder / "plugins"], check=True)
        kernels = f"-DADATSQ_KERNELS={folder / 'plugins' / 'kernels'}"
        subprocess.run(["cmake", "-S", LIBRARY, "-B", folder / "cmake", kernels, "-DADATSQ_TESTS=ON"], check=True)
        subprocess.run(["cmake", "--build", folder / "cmake"], check=True)
        self.path = str(folder / "cmake" / "libadatsq_plugins.so").encode()
        self.run = ctypes.CDLL(str(folder / "cmake" / "test" / "librun_linear.so")).runLinear

    def __call__(self, profile: str, inputs: dict[str, Tensor], workspace: Tensor) -> Tensor:
        """Enqueue on the current stream."""
        x = inputs["x"]
        y = torch.zeros(len(x), N, dtype=x.dtype, device="cuda")
        addresses = (ctypes.c_void_p * len(inputs))(*(tensor.data_ptr() for tensor in inputs.values()))
        sizes = [ctypes.c_int64(size) for size in (1, len(x), N, K)]
        result = self.run(
            self.path, profile.encode(), ",".join(inputs).encode(), GROUP, int(x.dtype == torch.bfloat16), *sizes,
            addresses, *(ctypes.c_void_p(p) for p in (y.data_ptr(), workspace.data_ptr(), stream_address())),
        )  # fmt: skip
        assert result == 0
        return y


def stream_address() -> int:
    return torch.cuda.current_stream().cuda_stream


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Plugin:
    return Plugin(tmp_path_factory.mktemp("plugin"))


def make_inputs(tokens: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """All inputs by name, and the codes of the nested 8-bit and the 4-bit weights."""
    generator = torch.Generator().manual_seed(tokens)
    high = torch.randint(-7, 8, (N, K), generator=generator, dtype=torch.int8)
    low = torch.randint(-8, 8, (N, K), generator=generator, dtype=torch.int8)
    tensors = {
        "x": torch.randn(tokens, K, generator=generator).to(dtype),
        "selector": torch.zeros(1, 1, dtype=torch.int32),
        "bias": torch.randn(N, generator=generator).to(dtype),
        "smoothing": 0.5 + torch.rand(K, generator=generator),
        "w16": torch.randn(N, K, generator=generator).to(dtype),
        "w8": 16 * high + low,
        "w8_scale": 0.001 + 0.001 * torch.rand(N, generator=generator),
        "w4": pack_nibbles(high).view(torch.int8).view(N, K // 2),
        "w4_scale": 0.01 + 0.01 * torch.rand(N, K // GROUP, generator=generator),
        "lo": pack_nibbles(low).view(torch.int8).view(N, K // 2),
        "w_fp8": torch.randn(N, K, generator=generator).to(torch.float8_e4m3fn),
        "w_fp8_scale": 0.01 + 0.01 * torch.rand(N, generator=generator),
        "x_fp8_scale": torch.tensor([0.01]),
    }
    return {name: tensor.cuda() for name, tensor in tensors.items()}, (16 * high.int() + low).cuda(), high.cuda()


def reference(profile: str, inputs: dict[str, Tensor], codes8: Tensor, codes4: Tensor) -> Tensor:
    """Y of the tensors that the plugin was given, in double precision."""
    x = inputs["x"].double()
    if profile in ("w8a8", "w4a8"):
        x = x / inputs["smoothing"].double() if "smoothing" in inputs else x
        scale = x.abs().amax(1, keepdim=True) / 127
        x = (x / scale).round() * scale
    if profile == "fp8":
        scale = inputs["x_fp8_scale"].double()
        x = (x / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scale
    if profile in ("w8a8", "w8a16"):
        weights = codes8 * inputs["w8_scale"].double()[:, None]
    elif profile in ("w4a8", "int4wo"):
        weights = codes4 * inputs["w4_scale"].double().repeat_interleave(GROUP, 1)
    elif profile == "fp8":
        weights = inputs["w_fp8"].double() * inputs["w_fp8_scale"].double()[:, None]
    else:
        weights = inputs["w16"].double()
    return x @ weights.T + inputs["bias"].double()


CASES = {
    "w8a8": (*SHARED, "w8", "w8_scale"),
    "w8a8-nested": (*SHARED, *NESTED),
    "w4a8": (*SHARED, "w4", "w4_scale"),
    "w8a16": (*SHARED[:3], "w8", "w8_scale"),
    "w8a16-nested": (*SHARED[:3], *NESTED),
    "int4wo": (*SHARED[:3], "w4", "w4_scale"),
    "fp16": (*SHARED[:3], "w16"),
    "bf16": (*SHARED[:3], "w16"),
    "fp8": (*SHARED[:3], "w_fp8", "w_fp8_scale", "x_fp8_scale"),
}


@pytest.mark.parametrize("tokens", [6, 100])
@pytest.mark.parametrize("case", CASES)
def test_every_profile(plugin: Plugin, case: str, tokens: int) -> None:
    if case == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs sm89 or later")
    profile = case.removesuffix("-nested")
    dtype = torch.float16 if profile == "fp16" else torch.bfloat16
    everything, codes8, codes4 = make_inputs(tokens, dtype)
    inputs = {name: everything[name] for name in CASES[case]}
    profiles = f"{profile},w4a8" if case.endswith("-nested") else profile
    expected = reference(profile, inputs, codes8, codes4)

    def close(y: Tensor) -> bool:
        # Rounding y to bf16 alone gives 0.0016 here; the rest is for sums in float and the few codes of x that a kernel
        # rounds the other way. A wrong operand gives about 1.
        return float((y.double() - expected).norm() / expected.norm()) < 0.005

    workspaces = [torch.empty(tokens * (K + 4) + 512, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in workspaces]
    torch.cuda.synchronize()
    results = []
    for stream, workspace in zip(streams, workspaces, strict=True):
        with torch.cuda.stream(stream):
            results.append(plugin(profiles, inputs, workspace))
    torch.cuda.synchronize()
    assert all(close(y) for y in results)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = plugin(profiles, inputs, workspaces[0])
    graph.replay()
    torch.cuda.synchronize()
    assert close(captured)
