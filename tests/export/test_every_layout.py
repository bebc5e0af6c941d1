"""Every layout for every target that the documents list, with the target's own formats; the real compilers."""

from pathlib import Path

import numpy as np
import pytest

from adatsq_trt.engines.backends.onnxruntime import OnnxRuntimeBackend
from adatsq_trt.engines.build import build_plans
from adatsq_trt.engines.bundle import Layout
from adatsq_trt.engines.plan_weights import read_plan
from adatsq_trt.engines.sizes import LAYOUTS
from adatsq_trt.export import export_graphs
from adatsq_trt.formats import FORMATS, TARGETS, resolve_formats
from adatsq_trt.graph_index import GraphIndex
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import quantize_nearest

GPUS = [name for name, target in TARGETS.items() if target.compute_capability is not None and target.formats]


def export(folder: Path, traced, layers, names: list[str], base: str, variants: tuple[str, ...]) -> GraphIndex:
    """As many assignments as formats: each layer has each format in one of them."""
    rows = [[names[(i + j) % len(names)] for j in range(len(layers))] for i in range(len(names))]
    policy = Policy.from_steps("toy", "0" * 64, list(layers), rows)
    weights = {
        name: {layer: quantize_nearest(m.weight.detach(), FORMATS[name]) for layer, m in layers.items()}
        for name in names
    }
    return export_graphs(traced.clone(), policy, weights, folder / "onnx", base, [], variants)


@pytest.fixture(scope="module", params=GPUS)
def exported(request, traced_toy, toy, toy_inputs, toy_layers, tmp_path_factory) -> tuple[str, Path, GraphIndex, int]:
    """A target, its folder and graphs, and how many assignments there are."""
    import torch

    from adatsq_trt.export import trace

    names = [fmt.name for fmt in resolve_formats(TARGETS[request.param].default_set)]
    half = "fp16" in names
    traced = trace(toy, toy_inputs, "velocity", torch.float16) if half else traced_toy
    folder = tmp_path_factory.mktemp(request.param)
    base = "float16" if half else "bfloat16"
    return request.param, folder, export(folder, traced, toy_layers, names, base, ("target",)), len(names)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_compiles_for_every_target(exported, layout: Layout) -> None:
    name, folder, index, assignments = exported
    plans = build_plans(folder, index, [TARGETS[name]], 8, layout=layout)
    assert len(plans) == (1 if layout == "switch" else assignments)
    assert all(len(read_plan(folder, plan)) > 1000 for plan in plans)


def test_the_cpu_runs_its_own_formats(traced_toy, toy_layers, toy_inputs, tmp_path: Path) -> None:
    names = [fmt.name for fmt in resolve_formats(TARGETS["cpu"].default_set)]
    index = export(tmp_path, traced_toy, toy_layers, names, "bfloat16", ("cpu",))
    together = index.find("cpu", None)
    feed = {name: value.numpy() for name, value in toy_inputs.items()}
    feed |= {signature.name: np.asarray(0.02, np.float32) for signature in together.scale_inputs.values()}
    outputs = []
    with OnnxRuntimeBackend().load(tmp_path / "onnx" / together.path) as runner:
        for assignment in range(len(names)):
            outputs.append(runner.run({**feed, "assignment": np.asarray(assignment, np.int32)})["velocity"])
    assert np.isfinite(outputs).all()
    assert len({output.tobytes() for output in outputs}) == len(names)
