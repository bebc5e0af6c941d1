"""Bundles with transforms, over targets, layouts and architectures: `check` passes, and catches what is wrong in them.

What is built are models of the zoo with one block of each kind and a given policy; only one has its plans compiled,
since `tests/export/test_transformed_layouts.py` compiles every transform.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto
from onnx.helper import make_node, make_tensor

from adatsq_trt import zoo
from adatsq_trt.engines.accuracy import CheckReport
from adatsq_trt.engines.bundle import BundleFiles, write_manifest
from tests.one_block import FLUX, WAN, Z_IMAGE, build

MODEL = "one-block"
LAYER = "transformer_blocks.0.ff.net.2"
# A transform, a model, a target, a layout, the formats that take turns.
CASES = {
    "balance-low-rank": (FLUX, "sm120", "switch", ("nvfp4", "fp8")),
    "smooth": (Z_IMAGE, "sm89", "embedded", ("fp8", "fp8a16")),
    "hadamard": (WAN, "cpu", None, ("w8a8s", "w8a32")),
    "low-rank": (FLUX, "cpu", None, ("w8a8s", "fp32")),
    "balance": (Z_IMAGE, "sm120", "switch", ("nvfp4", "nvfp4a16")),
    "hadamard-low-rank": (FLUX, "sm90", "plugin", ("w4a8", "w8a8", "fp8")),
    "smooth in plugin nodes": (FLUX, "sm90", "plugin", ("w4a8", "w8a8")),
}

SELDOM = ("hadamard", "low-rank", "balance", "smooth in plugin nodes")


def make(folder: Path, name: str) -> Path:
    source, target, layout, formats = CASES[name]

    def rows(layers: Sequence[str]) -> list[Sequence[str]]:
        return [[formats[(step + place) % len(formats)] for place in range(len(layers))] for step in range(2)]

    return build(
        folder,
        MODEL,
        source,
        ",".join(formats),
        rows,
        target=target,
        layout=layout,
        transform=name.partition(" ")[0],
    )


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("balanced"), "balance-low-rank")


@pytest.mark.parametrize(
    "name",
    [
        *("smooth", "hadamard-low-rank"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in SELDOM),
    ],
)
def test_graphs_compute_what_pytorch_computes(cli, tmp_path: Path, name: str) -> None:
    run = make(tmp_path, name)
    ended = cli("check", run, "--json")
    assert ended.code == 0, ended.out[-3000:]


def test_a_balanced_bundle_passes(cli, balanced: Path, tmp_path: Path) -> None:
    ended = cli("check", balanced, "--json", "--output", tmp_path)
    assert ended.code == 0, ended.out[-3000:]


# ------------------------------------------------------------------------------------------------------- defects


def node_of(model: ModelProto, end: str) -> NodeProto:
    (found,) = (node for node in model.graph.node if node.name == f"{LAYER}/{end}")
    return found


def insert_before(model: ModelProto, node: NodeProto, index: int, new: NodeProto) -> None:
    """Put a node of one output in front of a node's input; it reads what the input was."""
    new.input.insert(0, node.input[index])
    node.input[index] = new.output[0]
    model.graph.node.insert(list(model.graph.node).index(node), new)


def transpose_rotation(model: ModelProto) -> None:
    new = make_node("Transpose", [], ["defect"], "defect/Transpose", perm=[1, 0])
    insert_before(model, node_of(model, "Rotate"), 1, new)


def drop_branch(model: ModelProto) -> None:
    node = node_of(model, "AddBranch")
    node.op_type, node.input[:] = "Identity", node.input[:1]


def halve_branch(model: ModelProto) -> None:
    """As if its scale were wrong: what the exporter calls the branch is half of it."""
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    kind = TensorProto.BFLOAT16 if TensorProto.BFLOAT16 in types.values() else TensorProto.FLOAT
    model.graph.initializer.append(make_tensor("defect/half", kind, [], [0.5]))
    product, place = node_of(model, "BranchUp"), [node.name for node in model.graph.node].index(f"{LAYER}/BranchUp")
    half = make_node("Mul", ["defect", "defect/half"], [product.output[0]], "defect/Mul")
    product.output[0] = "defect"
    model.graph.node.insert(place + 1, half)


@pytest.mark.parametrize(
    ("defect", "variant"),
    [
        *((transpose_rotation, "cpu"), (drop_branch, "target"), (halve_branch, "target")),
        pytest.param(transpose_rotation, "target", marks=pytest.mark.slow),
        pytest.param(drop_branch, "cpu", marks=pytest.mark.slow),
        pytest.param(halve_branch, "cpu", marks=pytest.mark.slow),
    ],
)
def test_a_defect_is_caught_and_named(
    cli, balanced: Path, tmp_path: Path, monkeypatch, defect: Callable[[ModelProto], None], variant: str
) -> None:
    monkeypatch.setattr(zoo, "ZOO_FOLDER", balanced.parent / "zoo")
    run = Path(shutil.copytree(balanced, tmp_path / "run"))
    bundle = BundleFiles.open(run)
    path = bundle.graph_path(bundle.graph(variant, 0))
    model = onnx.load(path, load_external_data=False)
    defect(model)
    path.write_bytes(model.SerializeToString())
    write_manifest(bundle.folder, bundle.manifest)
    ended = cli("check", run, "--bisect", "--json")
    assert ended.code == 1
    assert ended.out, ended.err
    report = CheckReport.model_validate_json(ended.out)
    assert (variant, 0, LAYER) in {(layer.variant, layer.step, layer.layer) for layer in report.first_layers}
