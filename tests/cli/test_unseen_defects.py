"""`adatsq-trt check` covers a bundle: what lies outside of the blocks, other graphs, numbers and bits; by architecture.

Each bundle gets all defects at once. They do not meet: a piece of a target graph is given its inputs, the other graphs
are compared by themselves, and the rest bit for bit.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from adatsq_trt import zoo
from adatsq_trt.engines.accuracy import CheckReport
from adatsq_trt.engines.accuracy.block_cut import GraphView, find_cut, find_pieces
from adatsq_trt.engines.bundle import MANIFEST_NAME, SCALES_NAME, BundleFiles, Manifest, write_manifest
from adatsq_trt.files import read_json_model, read_tensors, write_tensors
from adatsq_trt.formats import FORMATS
from tests.one_block import FLUX, WAN, Z_IMAGE, build

SOURCES = {"flux": FLUX, "wan": WAN, "z-image": Z_IMAGE}
# Constants outside of the blocks → the piece that they belong to.
OUTSIDE = {
    "flux": {
        "x_embedder.bias": "x_embedder",
        "context_embedder.bias": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1.bias": "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.text_embedder.linear_2.bias": "time_text_embed.text_embedder.linear_2",
        "norm_out.linear.bias": "norm_out.linear",
        "proj_out.bias": "proj_out",
    },
    "wan": {
        "patch_embedding.bias": "model",
        "condition_embedder.time_embedder.linear_1.bias": "condition_embedder.time_embedder.linear_1",
        "condition_embedder.time_proj.bias": "condition_embedder.time_proj",
        "condition_embedder.text_embedder.linear_2.bias": "condition_embedder.text_embedder.linear_2",
        "proj_out.bias": "proj_out",
    },
    "z-image": {
        "all_x_embedder.2-1.bias": "all_x_embedder.2-1",
        "t_embedder.mlp.0.bias": "t_embedder.mlp.0",
        "cap_embedder.1.bias": "cap_embedder.1",
        "all_final_layer.2-1.adaLN_modulation.1.bias": "all_final_layer.2-1.adaLN_modulation.1",
        "all_final_layer.2-1.linear.bias": "all_final_layer.2-1.linear",
    },
}


@pytest.fixture(scope="module", params=SOURCES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def run(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two buckets: steps 0 and 1, and step 2."""

    def rows(layers: Sequence[str]) -> list[Sequence[str]]:
        late = [("nvfp4", "fp8", "bf16")[place % 3] for place in range(len(layers))]
        return [["fp8"] * len(layers)] * 2 + [late]

    base = tmp_path_factory.mktemp(architecture)
    return build(base, f"small-{architecture}", SOURCES[architecture], "nvfp4,fp8,bf16", rows)


def fill(bundle: BundleFiles, variant: str, assignment: int | None, names: Sequence[str], value: float) -> None:
    """Give constants of a graph, which lie in its file from then on, one value."""
    path = bundle.graph_path(bundle.graph(variant, assignment))
    model = onnx.load(path, load_external_data=False)
    for name in names:
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        tensor.CopyFrom(numpy_helper.from_array(np.full(list(tensor.dims), value, dtype), name))
    path.write_bytes(model.SerializeToString())


def flip_a_block_scale(bundle: BundleFiles) -> None:
    """The lowest bit of one scale of sixteen weights, in both variants' bytes."""
    path = bundle.graph_path(bundle.graph("target", 1))
    layers = [name for name, fmt in bundle.policy.formats_at(2).items() if fmt is FORMATS["nvfp4"]]
    scales = {f"{layer}.weight_scale" for layer in layers}
    constants = onnx.load(path, load_external_data=False).graph.initializer
    tensor = next(t for t in constants if t.name in scales and t.external_data)
    place = {entry.key: entry.value for entry in tensor.external_data}
    weights = path.with_name(place["location"])
    content = bytearray(weights.read_bytes())
    content[int(place["offset"])] ^= 1
    weights.write_bytes(content)


def write_defects(run: Path, architecture: str) -> BundleFiles:
    bundle = BundleFiles.open(run)
    fill(bundle, "target", 1, list(OUTSIDE[architecture]), 1.0)
    fill(bundle, "reference", None, list(OUTSIDE[architecture]), 0.0)
    fill(bundle, "target", None, list(OUTSIDE[architecture])[-1:], 1.0)
    flip_a_block_scale(bundle)
    tables = read_tensors(bundle.folder / SCALES_NAME)
    tables["fp8"][1, 0] *= 1.03
    write_tensors(bundle.folder / SCALES_NAME, tables)
    manifest = read_json_model(bundle.folder / MANIFEST_NAME, Manifest)
    sigmas = list(manifest.schedule.sigmas)
    sigmas[1] = float(np.nextafter(sigmas[1], 2))
    schedule = manifest.schedule.model_copy(update={"sigmas": tuple(sigmas)})
    write_manifest(
        bundle.folder, manifest.model_copy(update={"schedule": schedule, "guidance": manifest.guidance + 0.1})
    )
    return BundleFiles.open(run)


def test_a_sound_bundle_passes(cli, run: Path, tmp_path: Path) -> None:
    ended = cli("check", run, "--json", "--output", tmp_path)
    assert ended.code == 0, (ended.err, ended.out)


def test_all_defects_are_seen(cli, run: Path, architecture: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(zoo, "ZOO_FOLDER", run.parent / "zoo")
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    bundle = write_defects(copy, architecture)
    ended = cli("check", copy, "--json")
    assert ended.code == 1, ended.err
    report = CheckReport.model_validate_json(ended.out)
    wrong = [row for row in report.rows if not row.passed]
    pieces = set(OUTSIDE[architecture].values())
    assert {(row.step, row.block) for row in wrong if row.variant == "target"} == {(2, piece) for piece in pieces}
    assert {row.step for row in wrong if row.variant == "reference"} == {0, 1, 2}
    unequal = {row.subject: row.failure or "" for row in report.exact if not row.passed}
    assert unequal.keys() == {
        "guidance",
        "schedule",
        "activation scales",
        *(f"constants of the {variant} graphs" for variant in ("target", "cpu", "reference")),
        "switch.target.onnx",
    }
    assert unequal["schedule"].startswith("sigmas, step 1: ")
    assert unequal["activation scales"].startswith(f"format fp8, step 1, layer '{bundle.policy.layers[0]}': ")
    assert "weight_scale" in unequal["constants of the cpu graphs"]
    last = list(OUTSIDE[architecture].values())[-1]
    assert unequal["switch.target.onnx"] == (
        f"assignment 0: '{last}' is computed otherwise than in 'assignment_000.target.onnx'"
    )


def test_the_pieces_add_up_to_the_target_graph(run: Path) -> None:
    """Every node is computed in one piece. A Cast that lowering leaves out, and a constant, in all that read it."""
    bundle = BundleFiles.open(run)
    for assignment in range(len(bundle.policy.assignments)):
        target, cpu = (GraphView(bundle.graph_path(bundle.graph(variant, assignment))) for variant in ("target", "cpu"))
        times: Counter[str] = Counter()
        for piece in find_pieces(target, cpu, bundle.index.blocks):
            cut = find_cut(target, cpu, piece)
            times.update(node.output[0] for node in target.needed_nodes(cut.inputs, cut.outputs))
        assert all(times[node.output[0]] for node in target.graph.node)
        several = [node for node in target.graph.node if times[node.output[0]] > 1]
        assert all(
            node.output[0] not in target.varying or (node.op_type == "Cast" and node.output[0] not in cpu.producers)
            for node in several
        )
        assert len(several) <= 2
