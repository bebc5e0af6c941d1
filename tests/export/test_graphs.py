"""The cpu graphs against the fake-quantized PyTorch model, on the real Flux class."""

import random
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from adatsq_trt.calibration.clips import scale_with
from adatsq_trt.errors import MismatchError, OutputError, UnsupportedFormatError
from adatsq_trt.export import export_graphs
from adatsq_trt.files import read_json_model
from adatsq_trt.formats import FORMATS, format_named
from adatsq_trt.graph_index import CONSTANTS_NAME, INDEX_NAME, GraphIndex
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import (
    QuantizedWeight,
    dequantize_weight,
    fake_quantize_activation,
    quantize_nearest,
)
from tests.export.separated import require_equal_layers

NAMES = (*FORMATS, "w4a4g32")
MIXED = len(NAMES)  # index of the assignment that mixes all formats


@pytest.fixture(scope="module")
def layers(small_flux: FluxAdapter) -> dict[str, nn.Linear]:
    return small_flux.quantizable_layers()


@pytest.fixture(scope="module")
def weights(layers) -> dict[str, dict[str, QuantizedWeight]]:
    return {
        name: {layer: quantize_nearest(module.weight.detach(), format_named(name)) for layer, module in layers.items()}
        for name in NAMES
    }


def make_policy(layers, rows) -> Policy:
    return Policy.from_steps("small-flux", "0" * 64, list(layers), rows)


@pytest.fixture(scope="module")
def policy(layers) -> Policy:
    """Every format alone, then all formats mixed."""
    dice = random.Random(0)
    return make_policy(layers, [*([name] * len(layers) for name in NAMES), [dice.choice(NAMES) for _ in layers]])


@pytest.fixture(scope="module")
def exported(traced_flux, policy, weights, tmp_path_factory) -> tuple[Path, GraphIndex]:
    folder = tmp_path_factory.mktemp("export")
    blocks = ["transformer_blocks.0", "single_transformer_blocks.0"]
    return folder, export_graphs(traced_flux.clone(), policy, weights, folder, "bfloat16", blocks, ("cpu",))


@pytest.fixture(scope="module")
def largest(small_flux, layers, flux_inputs) -> dict[str, Tensor]:
    """Largest magnitude of every layer's input."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].abs().amax()}))
            hooks.callback(hook.remove)
        small_flux.predict(flux_inputs)
    return seen


def fake_quantized(adapter, inputs, layers, formats, weights, scales) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Outputs of all layers and of the model."""
    outputs = {}

    def replace(name):
        fmt = format_named(formats[name])
        weight = dequantize_weight(weights[fmt.name][name], fmt)

        def hook(module, args, _):
            x = fake_quantize_activation(args[0], fmt.activation, scales.get(name))
            output = nn.functional.linear(x, weight, module.bias)
            outputs[name] = output.numpy()
            return output

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(replace(name)).remove)
        predicted = adapter.predict(inputs).numpy()
    return outputs, predicted


@pytest.mark.parametrize("index", range(MIXED + 1), ids=[*NAMES, "mixed"])
def test_cpu_graph_is_the_fake_quantized_model(
    exported, policy, weights, layers, largest, small_flux, flux_inputs, run_cpu, index
):
    folder, table = exported
    formats = dict(zip(policy.layers, policy.assignments[index], strict=True))
    graph = table.find("cpu", index)
    scales = {
        layer: scale_with(0.75, largest[layer], format_named(name).activation)
        for layer, name in formats.items()
        if format_named(name).scaled_activation
    }
    assert set(graph.scale_inputs) == set(scales)
    feed = {name: value.numpy() for name, value in flux_inputs.items()}
    feed |= {graph.scale_inputs[layer].name: scale.numpy() for layer, scale in scales.items()}
    got = run_cpu(str(folder / graph.path), feed)
    outputs, wanted = fake_quantized(small_flux, flux_inputs, layers, formats, weights, scales)
    # Sums in another order can push a value over a rounding border; then a few outputs of the whole graph move.
    assert np.quantile(np.abs(got - wanted), 0.5) < 2e-5 * wanted.std()
    widths = {layer: (format_named(name), layers[layer].in_features) for layer, name in formats.items()}
    require_equal_layers(folder / graph.path, feed, outputs, (graph.outputs[0].name, wanted), widths)


def test_reference_is_the_unquantized_model(exported, small_flux, flux_inputs, run_cpu):
    folder, table = exported
    feed = {name: value.numpy() for name, value in flux_inputs.items()}
    got = run_cpu(str(folder / table.find("reference", None).path), feed)
    with torch.no_grad():
        wanted = small_flux.predict(flux_inputs).numpy()
    # The trace is bfloat16; attention's scale, 32^(-1/4), is not a bfloat16 number and must have come back exactly.
    np.testing.assert_allclose(got, wanted, atol=5e-6 * np.abs(wanted).max())


def test_the_index_describes_the_folder(exported, policy):
    folder, table = exported
    assert read_json_model(folder / INDEX_NAME, GraphIndex) == table
    listed = {graph.path for graph in table.graphs}
    assert {path.name for path in folder.iterdir()} == {*listed, table.weights, INDEX_NAME, CONSTANTS_NAME}
    assert table.weight_bytes == (folder / table.weights).stat().st_size
    assert len(table.graphs) == len(policy.assignments) + 2  # of all assignments, and the reference
    signature = table.find("cpu", 0).inputs[0]
    assert (signature.name, signature.dtype, signature.shape) == ("hidden_states", "float", ("batch", 16, 4))


def places(path: Path) -> set[tuple[str, str]]:
    graph = onnx.load(path, load_external_data=False).graph
    external = [{entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer]
    return {(entry["offset"], entry["length"]) for entry in external if entry}


def test_variants_and_assignments_share_their_bytes(traced_flux, layers, weights, tmp_path):
    """Target and cpu read the same places; a layer and format that two assignments use is stored once."""
    names = list(layers)
    rows = [["fp8"] * len(names), ["fp8"] * (len(names) - 1) + ["nvfp4"], ["nvfp4"] * len(names)]
    told = []
    table = export_graphs(
        traced_flux.clone(),
        make_policy(layers, rows),
        weights,
        tmp_path,
        "bfloat16",
        [],
        ("target", "cpu"),
        lambda done, total: told.append((done, total)),
    )
    target, cpu = ({i: places(tmp_path / table.find(v, i).path) for i in range(3)} for v in ("target", "cpu"))
    assert target == cpu
    assert target[1] <= target[0] | target[2]
    assert len(target[1] & target[0]) > len(names)
    assert told == [(i, 9) for i in range(1, 10)]


def test_the_same_export_gives_the_same_bytes_and_replaces_the_old_one(
    traced_flux, layers, weights, tmp_path, file_bytes
):
    short, long = [["bf16"] * len(layers)], [["bf16"] * len(layers), ["int4wo"] * len(layers)]
    folder = tmp_path / "export"

    def write(rows) -> dict[str, bytes]:
        export_graphs(traced_flux.clone(), make_policy(layers, rows), weights, folder, "bfloat16", [], ("cpu",))
        return file_bytes(folder)

    first = write(short)
    assert "assignment_001.cpu.onnx" in write(long)
    assert write(short) == first


def test_a_simulated_format_has_no_target_graph(traced_flux, layers, weights, tmp_path):
    policy = make_policy(layers, [["w4a4"] * len(layers)])
    with pytest.raises(UnsupportedFormatError, match=r"no TensorRT path holds w4a4.*--simulate"):
        export_graphs(traced_flux.clone(), policy, weights, tmp_path, "bfloat16", [], ("target", "cpu"))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_weight_is_named_and_nothing_half_written_stays(traced_flux, layers, tmp_path):
    policy = make_policy(layers, [["fp8"] * len(layers)])
    with pytest.raises(MismatchError, match=r"no weight in format 'fp8'.*adatsq-trt quantize"):
        export_graphs(traced_flux.clone(), policy, {}, tmp_path, "bfloat16", [], ("cpu",))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_output_error(traced_flux, layers, weights, tmp_path):
    (tmp_path / "file").write_text("in the way")
    policy = make_policy(layers, [["bf16"] * len(layers)])
    with pytest.raises(OutputError, match="choose a folder that is writable"):
        export_graphs(traced_flux.clone(), policy, weights, tmp_path / "file" / "sub", "bfloat16", [], ("cpu",))
