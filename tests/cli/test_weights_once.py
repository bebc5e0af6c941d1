"""Policies with weights once, given and built by the real compilers: `check` passes, and still finds what is wrong.

The model is digits-flux cut down to one block of each kind. Its first and last step have 16-bit activations (float32 on
the processor), the step between them has quantized ones, over the same weights.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from adatsq_trt import zoo
from adatsq_trt.engines.accuracy import CheckReport
from adatsq_trt.engines.build import build_plans
from adatsq_trt.engines.bundle import BundleFiles, write_manifest
from adatsq_trt.engines.plan_weights import STORE_NAME
from adatsq_trt.engines.sizes import size_report
from adatsq_trt.formats import FORMATS, TARGETS
from tests.cli.test_seeded_defects import change
from tests.one_block import FLUX, build

DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
# Target → formats with wide and with quantized activations, for most layers and for one of them.
PAIRS = {
    "sm120": (("nvfp4a16", "nvfp4"), ("fp8a16", "fp8")),
    "sm89": (("fp8a16", "fp8"), ("int4wo", "int4wo")),
    "cpu": (("w8a32", "w8a8s"), ("fp32", "fp32")),
    "plugin": (("w8a16", "w8a8"), ("int4wo", "w4a8")),
}
STEPS = (0, 1, 0)  # which of a pair


@pytest.fixture(scope="module", params=PAIRS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A target and its run."""
    most, one = PAIRS[request.param]

    def rows(layers: Sequence[str]) -> list[list[str]]:
        return [[(one if layer == f"{SINGLE}.attn.to_q" else most)[i] for layer in layers] for i in STEPS]

    formats, in_plugin = ",".join(dict.fromkeys((*most, *one))), request.param == "plugin"
    target, layout = ("sm90", "plugin") if in_plugin else (request.param, None)
    base = tmp_path_factory.mktemp(request.param)
    return request.param, build(base, "once", FLUX, formats, rows, target=target, layout=layout, with_plans=True)


@pytest.fixture
def own_bundle(built: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BundleFiles:
    """A copy of the bundle, to do harm to."""
    monkeypatch.setattr(zoo, "ZOO_FOLDER", built[1].parent / "zoo")
    return BundleFiles.open(Path(shutil.copytree(built[1], tmp_path / "run")))


on_blackwell = pytest.mark.parametrize("built", ["sm120"], indirect=True)


def test_the_bundle_passes_its_check(cli, built: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = built
    monkeypatch.setattr(zoo, "ZOO_FOLDER", run.parent / "zoo")
    ended = cli("check", run, "--json")
    assert ended.code == 0, ended.err
    report = CheckReport.model_validate_json(ended.out)
    assert report.passed
    assert {row.subject for row in report.rows}  # layers, blocks, graphs and the loop against PyTorch


def test_a_layer_has_one_weight_and_assignments_follow_activations(built: tuple[str, Path]) -> None:
    target, run = built
    files = BundleFiles.open(run)
    assert len(files.policy.assignments) == 2
    most, _ = PAIRS[target]
    assert FORMATS[most[0]].weight == FORMATS[most[1]].weight
    assert files.manifest.layout == {"cpu": "embedded", "plugin": "plugin"}.get(target, "shared")
    assert len(files.manifest.plans) == (2 if target.startswith("sm") else 0)
    report = size_report(files)
    if target == "cpu":
        assert report is None
        return
    assert report is not None
    if target == "plugin":
        layers = {operand.name: operand.layers for operand in report.operands}
        assert layers == {"bias": 17, "w8": 16, "w8_scale": 16, "w4": 1, "w4_scale": 1}
        return
    weighed = {row.layout: row.weight_bytes for row in report.layouts}
    assert weighed["shared"] == weighed["switch"] == report.floor_bytes < 0.55 * weighed["embedded"]
    store = run / "bundle" / "plans" / STORE_NAME
    assert store.stat().st_size < 1.2 * report.floor_bytes + 65536  # and alignment


@on_blackwell
def test_the_same_bundle_compiles_to_one_plan(own_bundle: BundleFiles) -> None:
    plans = build_plans(own_bundle.folder, own_bundle.index, [TARGETS["sm120"]], 4, layout="switch")
    assert [plan.assignment for plan in plans] == [None]


@on_blackwell
def test_a_halved_scale_of_a_layer_with_16_bit_activations_is_found(cli, own_bundle: BundleFiles) -> None:
    layer = f"{DOUBLE}.ff.net.2"
    assert own_bundle.policy.formats_at(0)[layer].name == "nvfp4a16"
    change("cpu", 0, f"{layer}.weight_global_scale", lambda content: (content.view(np.float32) / 2).view(np.uint8))(
        own_bundle
    )
    write_manifest(own_bundle.folder, own_bundle.manifest)
    ended = cli("check", own_bundle.folder, "--bisect", "--json")
    assert ended.code == 1
    report = CheckReport.model_validate_json(ended.out)
    assert ("cpu", 0, layer) in {(row.variant, row.step, row.layer) for row in report.first_layers}


@on_blackwell
@pytest.mark.parametrize("variant", ["target", "cpu"])
def test_a_swapped_branch_is_found(cli, own_bundle: BundleFiles, variant: str) -> None:
    layer = f"{DOUBLE}.attn.to_k"
    path = own_bundle.graph_path(own_bundle.graph(variant, None))
    model = onnx.load(path, load_external_data=False)
    (choice,) = (node for node in model.graph.node if node.op_type == "If" and node.name.startswith(f"{layer}/"))
    names = {"then_branch": "else_branch", "else_branch": "then_branch"}
    for attribute in choice.attribute:
        attribute.name = names[attribute.name]
    path.write_bytes(model.SerializeToString())
    write_manifest(own_bundle.folder, own_bundle.manifest)
    ended = cli("check", own_bundle.folder, "--json")
    assert ended.code == 1
    failures = [row for row in CheckReport.model_validate_json(ended.out).exact if not row.passed]
    assert any(row.subject == path.name and layer in str(row.failure) for row in failures)
