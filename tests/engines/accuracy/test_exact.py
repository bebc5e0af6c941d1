"""What must be as exported, bit for bit: seeded defects that are smaller than any limit."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper
from safetensors.numpy import save_file

from adatsq_trt.engines.accuracy.exact import check_exactly
from adatsq_trt.engines.bundle import (
    MANIFEST_NAME,
    POLICY_NAME,
    PROMPTS_NAME,
    SCALES_NAME,
    BundleFiles,
    Manifest,
    read_arrays,
    write_manifest,
)
from adatsq_trt.engines.exported import EXPORTED_NAME
from adatsq_trt.engines.plan_weights import STORE_NAME, name_weights, write_store
from adatsq_trt.errors import DamagedFileError
from adatsq_trt.files import read_json_model
from adatsq_trt.graph_index import CONSTANTS_NAME


def differences(bundle: BundleFiles, **update: object) -> dict[str, str]:
    """Subject → first difference, of the bundle as its files are now."""
    manifest = read_json_model(bundle.folder / MANIFEST_NAME, Manifest)
    write_manifest(bundle.folder, Manifest.model_validate({**manifest.model_dump(), **update}))
    rows = check_exactly(BundleFiles.open(bundle.folder))
    assert all(row.passed == (row.failure is None) for row in rows)
    return {row.subject: row.failure for row in rows if row.failure is not None}


def edit_switch(bundle: BundleFiles, variant: str, change: Callable[[ModelProto], None]) -> None:
    path = bundle.graph_path(bundle.graph(variant, None))
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def all_constants(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    branches = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return [*graph.initializer, *(tensor for branch in branches for tensor in all_constants(branch))]


def flip_lowest_bit(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed.reshape(-1).view(np.uint8)[0] ^= 1
    return changed


def test_a_sound_bundle(tiny_bundle: BundleFiles) -> None:
    rows = check_exactly(tiny_bundle)
    assert all(row.passed for row in rows)
    assert {row.subject for row in rows} == {
        "policy",
        "guidance",
        "schedule",
        "sizes",
        "prompts' texts",
        "activation scales",
        PROMPTS_NAME,
        *(f"constants of the {variant} graphs" for variant in ("target", "cpu", "reference")),
        "switch.target.onnx",
        "switch.cpu.onnx",
    }


def test_guidance(own_bundle: BundleFiles) -> None:
    assert differences(own_bundle, guidance=2.1) == {"guidance": "guidance: got 2.1, the exporter had 2.0"}
    said = "rescaled_guidance: got True, the exporter had False"
    assert differences(own_bundle, guidance=2.0, rescaled_guidance=True) == {"guidance": said}


def test_the_last_bit_of_a_sigma(own_bundle: BundleFiles) -> None:
    record = own_bundle.manifest.schedule
    sigmas = (*record.sigmas[:2], float(np.nextafter(record.sigmas[2], 1)), *record.sigmas[3:])
    got = differences(own_bundle, schedule=record.model_copy(update={"sigmas": sigmas}).model_dump())
    assert list(got) == ["schedule"]
    assert got["schedule"].startswith("sigmas, step 2: got 0.6")


def test_a_scale_that_is_three_percent_too_large_is_named(own_bundle: BundleFiles) -> None:
    tables = read_arrays(own_bundle.folder / SCALES_NAME)
    tables["fp8"][3, 0] *= 1.03
    save_file(tables, own_bundle.folder / SCALES_NAME)
    (failure,) = differences(own_bundle).values()
    assert failure.startswith("format fp8, step 3, layer 'blocks.0.linear': got ")


def test_a_scale_of_a_format_that_a_step_does_not_use(own_bundle: BundleFiles) -> None:
    tables = read_arrays(own_bundle.folder / SCALES_NAME)
    tables["w8a8s"][0, 0] = 1.0  # was no number
    save_file(tables, own_bundle.folder / SCALES_NAME)
    assert list(differences(own_bundle)) == ["activation scales"]


def test_a_bit_of_a_prompt(own_bundle: BundleFiles) -> None:
    prompts = read_arrays(own_bundle.folder / PROMPTS_NAME)
    prompts["conditional.pooled"] = flip_lowest_bit(prompts["conditional.pooled"])
    save_file(prompts, own_bundle.folder / PROMPTS_NAME)
    assert differences(own_bundle) == {PROMPTS_NAME: "'conditional.pooled' is not what the exporter had"}


def test_prompts_in_another_order(own_bundle: BundleFiles) -> None:
    assert list(differences(own_bundle, prompt_texts=("one", "two", "three"))) == ["prompts' texts"]


def test_another_assignment_at_a_step(own_bundle: BundleFiles) -> None:
    other = own_bundle.policy.model_copy(update={"step_assignments": (0, 1, 2, 2)})
    other.save(own_bundle.folder / POLICY_NAME)
    assert differences(own_bundle)["policy"] == "step 3, layer 'blocks.0.linear': got 'bf16', the exporter had 'fp8'"


@pytest.mark.parametrize("name", ["weight", "weight_scale"])
@pytest.mark.parametrize("variant", ["target", "cpu"])
def test_the_lowest_bit_of_a_weight_or_its_scale(own_bundle: BundleFiles, variant: str, name: str) -> None:
    path = own_bundle.graph_path(own_bundle.graph(variant, 1))
    model = onnx.load(path, load_external_data=False)
    (tensor,) = (t for t in model.graph.initializer if t.name == f"blocks.1.linear.{name}")
    both = ["target", "cpu"] if tensor.external_data else [variant]
    if tensor.external_data:  # which both variants read
        place = {entry.key: entry.value for entry in tensor.external_data}
        weights = path.with_name(place["location"])
        content = bytearray(weights.read_bytes())
        content[int(place["offset"])] ^= 1
        weights.write_bytes(content)
    else:
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(flip_lowest_bit(array), tensor.name))
        path.write_bytes(model.SerializeToString())
    got = differences(own_bundle)
    constants = [subject for subject in got if subject.startswith("constants")]
    assert constants == [f"constants of the {own} graphs" for own in both]
    assert f"constant 'blocks.1.linear.{name}" in got[constants[0]]


def test_a_constant_that_is_gone(own_bundle: BundleFiles) -> None:
    """It became a node."""
    path = own_bundle.graph_path(own_bundle.graph("reference", None))
    model = onnx.load(path, load_external_data=False)
    (tensor,) = (t for t in model.graph.initializer if t.name == "last")
    node = helper.make_node("Constant", [], ["last"], value=numpy_helper.from_array(numpy_helper.to_array(tensor)))
    model.graph.initializer.remove(tensor)
    model.graph.node.insert(0, node)
    path.write_bytes(model.SerializeToString())
    failure = "no reference graph holds the constant 'last', which the exporter had"
    assert differences(own_bundle) == {"constants of the reference graphs": failure}


# ------------------------------------------------------------------------------------- the graph of all assignments


def double_a_bias(model: ModelProto) -> None:
    tensor = next(t for t in all_constants(model.graph) if t.name.startswith("blocks.1.linear.bias"))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 2, tensor.name))


def exchange_branches(model: ModelProto) -> None:
    choice = next(node for node in model.graph.node if node.op_type == "If")
    first, second = choice.attribute
    first.name, second.name = second.name, first.name


def change_an_operator(model: ModelProto) -> None:
    next(node for node in model.graph.node if node.output[0] == "embedded").op_type = "Sub"


def read_another_scale(model: ModelProto) -> None:
    for node in (n for choice in model.graph.node for a in choice.attribute if a.HasField("g") for n in a.g.node):
        names = ["blocks.0.linear.scale" if name == "blocks.1.linear.scale" else name for name in node.input]
        node.input[:] = names


DEFECTS: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "bias": (double_a_bias, "blocks.1.linear"),
    "branches": (exchange_branches, "blocks.0.linear"),
    "operator": (change_an_operator, "embed"),
    "scale": (read_another_scale, "blocks.1.linear"),
}


@pytest.mark.parametrize("variant", ["target", "cpu"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_in_the_graph_of_all_assignments_is_named(own_bundle: BundleFiles, variant: str, defect: str) -> None:
    change, module = DEFECTS[defect]
    edit_switch(own_bundle, variant, change)
    failure = differences(own_bundle)[f"switch.{variant}.onnx"]
    assert f"'{module}' is computed otherwise than in 'assignment_00" in failure


def test_names_and_the_order_of_nodes_do_not_count(own_bundle: BundleFiles) -> None:
    def reorder(model: ModelProto) -> None:
        place = next(i for i, node in enumerate(model.graph.node) if node.output[0] == "shift")
        for node in model.graph.node[place + 1 :]:
            node.input[:] = ["other" if name == "shift" else name for name in node.input]
        model.graph.node.insert(place + 1, helper.make_node("Identity", ["shift"], ["other"]))
        conditions = [node for node in model.graph.node if node.op_type == "Gather"]
        for node in conditions:
            model.graph.node.remove(node)
        for node in reversed(conditions):
            model.graph.node.insert(1, node)

    edit_switch(own_bundle, "target", reorder)
    assert differences(own_bundle) == {}


def test_a_choice_by_something_else(own_bundle: BundleFiles) -> None:
    def by_a_constant(model: ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
        next(node for node in model.graph.node if node.op_type == "If").input[0] = "always"

    edit_switch(own_bundle, "target", by_a_constant)
    assert "does not choose by the assignment" in differences(own_bundle)["switch.target.onnx"]


# ------------------------------------------------------------------------------------------------ layout `shared`


@pytest.fixture
def shared(own_bundle: BundleFiles) -> BundleFiles:
    """With the store that plans of layout `shared` are bound to; without the plans, which are not read here."""
    weights = own_bundle.folder / "onnx" / own_bundle.index.weights
    names = name_weights(own_bundle.graph_path(own_bundle.graph("target", None)))
    write_store(own_bundle.folder / "plans" / STORE_NAME, weights, names)
    return own_bundle


def test_the_store_of_layout_shared(shared: BundleFiles) -> None:
    assert differences(shared, layout="shared") == {}
    store = shared.folder / "plans" / STORE_NAME
    content = bytearray(store.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1
    store.write_bytes(content)
    got = differences(shared, layout="shared")
    assert list(got) == [f"plans/{STORE_NAME}"]
    assert "is not what 'weights.data' holds" in got[f"plans/{STORE_NAME}"]


def test_a_store_with_another_type(shared: BundleFiles) -> None:
    store = shared.folder / "plans" / STORE_NAME
    store.write_bytes(store.read_bytes().replace(b'"I8"', b'"U8"', 1))
    assert list(differences(shared, layout="shared")) == [f"plans/{STORE_NAME}"]


@pytest.mark.parametrize("content", [b"", b"\x10" + bytes(7) + b"{" * 16, (2).to_bytes(8, "little") + b"[]"])
def test_a_store_that_is_none(shared: BundleFiles, content: bytes) -> None:
    (shared.folder / "plans" / STORE_NAME).write_bytes(content)
    with pytest.raises(DamagedFileError, match="not a complete safetensors file"):
        differences(shared, layout="shared")


@pytest.mark.parametrize("name", [EXPORTED_NAME, f"onnx/{CONSTANTS_NAME}"])
def test_a_bundle_of_an_earlier_version(own_bundle: BundleFiles, name: str) -> None:
    (own_bundle.folder / name).unlink()
    with pytest.raises(DamagedFileError, match=f"no hash for '{name}'.*run 'adatsq-trt build engine' again"):
        differences(own_bundle)
