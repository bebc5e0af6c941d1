"""A toy transformer block, traced once, and tools to run graphs."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from adatsq_trt.export import trace
from adatsq_trt.export.lower_quantizers import LowerQuantizers
from adatsq_trt.export.lower_types import LowerTypes
from adatsq_trt.models.flux import FluxAdapter
from tests.tiny_flux import make_tiny_flux

Runner = Callable[[str | bytes, Mapping[str, np.ndarray]], np.ndarray]


class Toy(nn.Module):
    """Modulation (2-D input: Gemm), two linears of a feed-forward network (3-D input: MatMul), a final projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 64)
        self.modulation = nn.Linear(64, 64)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        hidden = self.embed(x) * (1 + self.modulation(condition))[:, None]
        return hidden + self.down(nn.functional.gelu(self.up(hidden), approximate="tanh"))


class ToyTrace(nn.Module):
    """The wrapper that an adapter's trace module is."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = Toy()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.transformer(x, condition)


@pytest.fixture(scope="session")
def toy() -> ToyTrace:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = ToyTrace().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
    return module


@pytest.fixture(scope="session")
def toy_layers(toy: ToyTrace) -> dict[str, nn.Linear]:
    return {name: getattr(toy.transformer, name) for name in ("modulation", "up", "down")}


@pytest.fixture(scope="session")
def toy_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(4, 8, 64, generator=generator),
        "condition": torch.randn(4, 64, generator=generator),
    }


@pytest.fixture(scope="session")
def traced_toy(toy: ToyTrace, toy_inputs: dict[str, Tensor]) -> ir.Model:
    """In bfloat16; tests clone it before they change it."""
    return trace(toy, toy_inputs, "velocity", torch.bfloat16)


@pytest.fixture(scope="session")
def small_flux() -> FluxAdapter:
    """diffusers' own Flux with one block of either kind and weights that bfloat16 holds exactly."""
    adapter = make_tiny_flux(width=32, patches=4)
    with torch.no_grad():
        for parameter in adapter.transformer.parameters():
            parameter.copy_(parameter.bfloat16())
    return adapter


@pytest.fixture(scope="session")
def flux_inputs(small_flux: FluxAdapter) -> dict[str, Tensor]:
    latent = torch.randn(3, *small_flux.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return small_flux.guided_inputs(latent, 0.7, small_flux.encode([1, 2, 3]), 2.0)


@pytest.fixture(scope="session")
def traced_flux(small_flux: FluxAdapter, flux_inputs: dict[str, Tensor]) -> ir.Model:
    return trace(small_flux.trace_module(), flux_inputs, "velocity", torch.bfloat16)


@pytest.fixture(scope="session")
def run_cpu() -> Runner:
    """Run a model, a path or bytes, with ONNX Runtime as `engines` does."""

    def run(model: str | bytes, feed: Mapping[str, np.ndarray]) -> np.ndarray:
        options = ort.SessionOptions()
        # Without VNNI, x86 kernels for u8s8 products saturate unless this is asked for.
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.log_severity_level = 3
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return session.run(None, dict(feed))[0]

    return run


@pytest.fixture
def lowered(run_cpu: Runner) -> Callable[[ir.Model, Mapping[str, np.ndarray]], np.ndarray]:
    """Lower a hand-written target graph to the cpu variant, check it and run it."""

    def run(model: ir.Model, feed: Mapping[str, np.ndarray]) -> np.ndarray:
        LowerTypes()(model)
        LowerQuantizers()(model)
        model.opset_imports.pop("trt", None)
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        return run_cpu(proto.SerializeToString(), feed)

    return run


@pytest.fixture
def file_bytes() -> Callable[[Path], dict[str, bytes]]:
    return lambda folder: {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
