"""One trace for several sizes: the graphs at each are PyTorch's model at each, and TensorRT-RTX compiles them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from adatsq_trt.engines.backends.base import BatchRange, Profile
from adatsq_trt.engines.build import build_plans
from adatsq_trt.engines.bundle import Layout
from adatsq_trt.engines.plan_weights import read_plan
from adatsq_trt.errors import MismatchError
from adatsq_trt.export import export_graphs, trace
from adatsq_trt.formats import FORMATS, TARGETS
from adatsq_trt.graph_index import GraphIndex
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.capture import captured, captured_outputs
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.simulated import SimulatedModel
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import quantize_nearest, static_activation_scale
from tests.export.separated import require_equal_layers
from tests.tiny_chroma import make_tiny_chroma
from tests.tiny_flux import make_tiny_flux
from tests.tiny_flux_2 import make_tiny_flux_2
from tests.tiny_hunyuan_video import make_tiny_hunyuan_video
from tests.tiny_ltx import make_tiny_ltx
from tests.tiny_qwen_image import make_tiny_qwen_image
from tests.tiny_stable_diffusion_3 import make_tiny_stable_diffusion_3
from tests.tiny_wan import make_tiny_wan
from tests.tiny_z_image import make_tiny_z_image, make_z_image_of_several_lengths

# Rows and columns of a latent, and frames; the first is traced, two of Flux have as many tokens.
SIZES = {
    "flux": [(4, 4), (2, 8), (5, 6)],
    "z-image": [(8, 16), (16, 16)],
    "z-image-captions": [(8, 16), (16, 16)],
    "wan": [(4, 4, 3), (6, 8, 2)],
    "qwen-image": [(3, 4), (5, 2)],
    "stable-diffusion-3": [(6, 8), (10, 4)],
    "flux-2": [(3, 4), (5, 2)],
    "chroma": [(3, 4), (2, 6), (5, 2)],
    "ltx": [(3, 2, 2), (2, 3, 2), (4, 5, 1)],
    "hunyuan-video": [(3, 4, 3), (5, 2, 2)],
}
MAKERS = {
    "flux": lambda: make_tiny_flux(32, 4),
    "z-image": make_tiny_z_image,
    "z-image-captions": make_z_image_of_several_lengths,
    "wan": make_tiny_wan,
    "qwen-image": lambda: make_tiny_qwen_image(layers=1),
    "stable-diffusion-3": make_tiny_stable_diffusion_3,
    "flux-2": make_tiny_flux_2,
    "chroma": make_tiny_chroma,
    "ltx": lambda: make_tiny_ltx(layers=1),
    "hunyuan-video": lambda: make_tiny_hunyuan_video(layers=1),
}
SLOW = ("flux-2", "chroma", "ltx", "hunyuan-video")
PARAMETERS = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MAKERS]
NAMES = ("nvfp4", "fp8", "bf16", "int4wo")


@dataclass(frozen=True)
class Exported:
    """Graphs of two assignments, and the model at every size, that of the trace first."""

    folder: Path
    index: GraphIndex
    policy: Policy
    store: CandidateWeights
    adapters: list[ModelAdapter]


@pytest.fixture(scope="module", params=PARAMETERS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    first = MAKERS[request.param]()
    with torch.no_grad():
        for parameter in first.transformer.parameters():
            parameter.copy_(parameter.bfloat16())
    adapters = [first.resized(first.image.resized(*size)) for size in SIZES[request.param]]
    own, layers = adapters[0], first.quantizable_layers()
    weights = {
        name: {n: quantize_nearest(module.weight.detach(), FORMATS[name]) for n, module in layers.items()}
        for name in NAMES
    }
    example = model_inputs(own, 7)
    with captured(layers) as capture, torch.no_grad():
        own.predict(example)
    largest = torch.stack([capture.inputs[layer].abs().amax() for layer in layers])
    static = {name: FORMATS[name] for name in NAMES if FORMATS[name].static_activation}
    store = CandidateWeights(
        weights, {n: static_activation_scale(largest, f.activation)[None] for n, f in static.items()}
    )
    rows = [[NAMES[(i + j) % len(NAMES)] for i in range(len(layers))] for j in range(2)]
    policy = Policy.from_steps("tiny", "0" * 64, list(layers), rows)
    opened = own.any_size()
    inputs = (example, "velocity", torch.bfloat16, own.float32_inputs, opened.positions, opened.axes)
    folder, both = tmp_path_factory.mktemp(request.param), ("target", "cpu")
    traced = trace(opened.module, *inputs)
    index = export_graphs(traced, policy, store.weights, folder / "onnx", "bfloat16", own.blocks(), both)
    return Exported(folder, index, policy, store, adapters)


def model_inputs(adapter: ModelAdapter, rows: int) -> dict[str, torch.Tensor]:
    latent = torch.randn(rows, *adapter.latent_shape, generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        condition = adapter.encode([i % 3 for i in range(rows)]).conditional
        return {name: value.contiguous() for name, value in adapter.model_inputs(latent, 0.7, condition, 2.0).items()}


def feed(adapter: ModelAdapter, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in {**inputs, **adapter.any_size().positions}.items()}


def test_graphs_are_the_fake_quantized_model_at_every_size(exported: Exported) -> None:
    layers, policy = exported.adapters[0].quantizable_layers(), exported.policy
    graph = exported.index.find("cpu", 1)
    formats = {layer: FORMATS[name] for layer, name in zip(policy.layers, policy.assignments[1], strict=True)}
    scales = {layer: exported.store.scales[formats[layer].name][0] for layer in graph.scale_inputs}
    own = {graph.scale_inputs[n].name: scale[policy.layers.index(n)].numpy() for n, scale in scales.items()}
    for adapter in exported.adapters:
        inputs = model_inputs(adapter, 2)
        with SimulatedModel(adapter, exported.store).installed() as model, torch.no_grad():
            model.assign(formats, 0)
            with captured_outputs({name: adapter.transformer.get_submodule(name) for name in layers}) as outputs:
                wanted = adapter.predict(inputs).numpy()
        arrays = {name: value.numpy() for name, value in outputs.items()}
        widths = {layer: (formats[layer], linear.in_features) for layer, linear in layers.items()}
        path, output = exported.folder / "onnx" / graph.path, (graph.outputs[0].name, wanted)
        require_equal_layers(path, feed(adapter, inputs) | own, arrays, output, widths)


def test_the_reference_is_the_model_at_every_size(exported: Exported, run_cpu) -> None:
    path = str(exported.folder / "onnx" / exported.index.find("reference", None).path)
    for adapter in exported.adapters:
        inputs = model_inputs(adapter, 2)
        with torch.no_grad():
            wanted = adapter.predict(inputs).numpy()
        np.testing.assert_allclose(run_cpu(path, feed(adapter, inputs)), wanted, atol=1e-5 * np.abs(wanted).max())


def test_positions_are_apart_from_rows_and_nothing_is_double(exported: Exported) -> None:
    for graph in exported.index.graphs:
        names = [signature.name for signature in graph.position_inputs]
        assert names == list(exported.adapters[0].any_size().positions)
        assert {signature.shape[0] for signature in graph.inputs} == {"batch"}
        proto = onnx.load(exported.folder / "onnx" / graph.path, load_external_data=False)
        types = {value.type.tensor_type.elem_type for value in (*proto.graph.value_info, *proto.graph.input)}
        assert onnx.TensorProto.DOUBLE not in types


def compile_all(exported: Exported, layout: Layout) -> None:
    """For the first and the last size, each with an optimization profile of its own."""
    profiles = []
    for rows, adapter in ((4, exported.adapters[0]), (2, exported.adapters[-1])):
        positions = {name: tuple(value.shape) for name, value in adapter.any_size().positions.items()}
        shapes = {**positions, "hidden_states": (0, *adapter.latent_shape)}
        profiles.append(Profile(1, rows, rows, tuple(shapes.items())))
    batch = BatchRange.of_sizes(profiles)
    plans = build_plans(exported.folder, exported.index, [TARGETS["sm120"]], batch, layout=layout)
    assert len(plans) == (1 if layout == "switch" else 2)
    for plan in plans:
        assert plan.profile_rows == (4, 2)
        assert len(read_plan(exported.folder, plan)) > 10_000


@pytest.mark.parametrize("exported", ["flux"], indirect=True)
def test_plans_over_one_file_of_weights_have_a_profile_for_each_shape(exported: Exported) -> None:
    """Embedded plans for sizes run in engines/gpu_runtime/test_pipelines.py, the plan of all in cli/test_shapes.py."""
    compile_all(exported, "shared")


@pytest.mark.slow
@pytest.mark.parametrize("exported", ["z-image", "wan", "flux-2"], indirect=True)
def test_the_other_architectures_compile(exported: Exported) -> None:
    compile_all(exported, "switch")


def test_sizes_that_z_image_would_have_to_pad_are_refused() -> None:
    adapter = make_tiny_z_image()
    with pytest.raises(MismatchError, match=r"16 tokens.*multiples of 32 tokens.*choose other --shapes"):
        adapter.any_size()


def test_sizes_beyond_a_models_tables_and_of_one_row_are_refused() -> None:
    wan = make_tiny_wan()
    with pytest.raises(MismatchError, match=r"3 x 33 x 2 positions: the model's tables have 32 x 32 x 32"):
        wan.resized(wan.image.resized(66, 4, 3))
    with pytest.raises(MismatchError, match="a size of one in frames"):
        wan.resized(wan.image.resized(4, 4, 1)).any_size()
    z_image = make_tiny_z_image()
    with pytest.raises(MismatchError, match=r"4 x 20 positions: the model's tables have 16 x 16"):
        z_image.resized(z_image.image.resized(8, 40))
