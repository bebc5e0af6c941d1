"""The store of layout `shared` and the graphs that are bound to it."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from safetensors import safe_open
from safetensors.numpy import load_file

from adatsq_trt.engines.accuracy.references import Reference
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.plan_weights import ALIGNMENT_BYTES, Weight, name_weights, without_weights, write_store
from adatsq_trt.errors import DamagedFileError
from tests.engines.conftest import ASSIGNMENTS, LAYERS


def target(bundle: BundleFiles, assignment: int | None) -> Path:
    return bundle.graph_path(bundle.graph("target", assignment))


@pytest.fixture
def names(tiny_bundle: BundleFiles) -> dict[Weight, str]:
    return name_weights(target(tiny_bundle, None))


def test_every_layer_and_format_has_one_name(names: dict[Weight, str]) -> None:
    pairs = {(layer, row[i]) for row in ASSIGNMENTS for i, layer in enumerate(LAYERS)}
    assert sorted(names.values()) == sorted(f"{layer}.weight@{name}" for layer, name in pairs)


def test_store_is_aligned_safetensors_with_the_weight_files_bytes(
    tiny_bundle: BundleFiles, names: dict[Weight, str], tmp_path: Path
) -> None:
    content = (tiny_bundle.folder / "onnx" / tiny_bundle.index.weights).read_bytes()
    total = write_store(tmp_path / "store", tiny_bundle.folder / "onnx" / tiny_bundle.index.weights, names)
    raw = (tmp_path / "store").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % ALIGNMENT_BYTES == 0
    assert total == sum(weight.length for weight in names)
    for weight, name in names.items():
        begin, end = header[name]["data_offsets"]
        assert begin % ALIGNMENT_BYTES == 0
        assert raw[8 + length + begin : 8 + length + end] == content[weight.offset : weight.offset + weight.length]
    with safe_open(tmp_path / "store", "numpy") as opened:
        assert set(names.values()) <= set(opened.keys())


def test_padding_and_four_bit_types(tmp_path: Path) -> None:
    weights = {Weight(3, 8, TensorProto.FLOAT4E2M1, (4, 4)): "a", Weight(11, 8, TensorProto.FLOAT, (2,)): "b"}
    numbers = np.array([1.5, -2.0], np.float32)
    (tmp_path / "data").write_bytes(b"xyz" + bytes(range(8)) + numbers.tobytes())
    assert write_store(tmp_path / "store", tmp_path / "data", weights) == 16
    stored = load_file(tmp_path / "store")
    assert stored["a"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    np.testing.assert_array_equal(stored["b"], numbers)


def test_weights_beyond_the_end_of_their_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(8))
    with pytest.raises(DamagedFileError, match=r"got 8 bytes, its graphs need 4611686018427387908"):
        write_store(tmp_path / "store", tmp_path / "data", {Weight(4, 1 << 62, TensorProto.INT8, (1,)): "a"})
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("assignment", range(len(ASSIGNMENTS)))
def test_a_graph_without_weights_asks_for_them_by_name(
    tiny_bundle: BundleFiles, names: dict[Weight, str], assignment: int
) -> None:
    model = without_weights(target(tiny_bundle, assignment), names)
    onnx.checker.check_model(model, full_check=True)
    own = set(
        onnx.load(target(tiny_bundle, assignment), load_external_data=False).graph.input[i].name for i in range(3)
    )
    asked = {value.name: value.type.tensor_type for value in model.graph.input if value.name in names.values()}
    row = ASSIGNMENTS[assignment]
    assert set(asked) == {f"{layer}.weight@{name}" for layer, name in zip(LAYERS, row, strict=True)}
    assert own <= {value.name for value in model.graph.input}
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_bound_to_the_store_it_computes_the_same(tiny_bundle: BundleFiles, tmp_path: Path) -> None:
    """The cpu graph of w8a8s and fp8, whose weights ONNX Runtime takes as inputs too."""
    path = tiny_bundle.graph_path(tiny_bundle.graph("cpu", 1))
    graph = onnx.load(path, load_external_data=False).graph
    names = {}
    for tensor in graph.initializer:
        place = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
        if place:
            names[Weight(place["offset"], place["length"], tensor.data_type, tuple(tensor.dims))] = f"w:{tensor.name}"
    write_store(tmp_path / "store", tiny_bundle.folder / "onnx" / tiny_bundle.index.weights, names)
    model = without_weights(path, names).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    header = json.loads((tmp_path / "store").read_bytes()[8:].split(b"}}")[0] + b"}}")
    data = (tmp_path / "store").read_bytes()[-header["w:blocks.1.linear.weight"]["data_offsets"][1] :]
    feed = Reference(tiny_bundle).feed(1)
    wanted = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)[0]
    bound = {}
    for weight, name in names.items():
        begin, end = header[name]["data_offsets"]
        kind = helper.tensor_dtype_to_np_dtype(weight.dtype)
        array = np.frombuffer(data[begin:end], kind).reshape(weight.shape)
        bound[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), weight.dtype)
    inputs = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in feed.items()}
    got = session.run_with_ort_values(None, inputs | bound)[0].numpy()
    np.testing.assert_array_equal(got, wanted)
