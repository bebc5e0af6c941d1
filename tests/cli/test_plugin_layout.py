"""Layout `plugin` from the command line: its bundle is built, checked, run and shown."""

import json
import math
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import onnx
import pytest

from adatsq_trt.calibration import nested
from adatsq_trt.engines import accuracy
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.policy import Policy
from adatsq_trt.zoo.loading import load_model
from tests.cli.conftest import CommandLine

FORMATS = ("w4a8", "w8a8", "fp8", "bf16")  # each with a weight of its own


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of two assignments, without --target: its graph is the same for all.

    Formats are paired in all ways, so that some layers have both widths and others one of them.
    """
    folder = tmp_path_factory.mktemp("plugin")
    path = folder / "run"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as told:
        # No layer loses too much when it is nested: otherwise none of this model would be.
        patch.setattr(nested, "LIMIT", math.inf)
        model = load_model("digits-flux")
        layers = list(model.adapter.quantizable_layers())
        rows = [[FORMATS[(i + step * (i // 4)) % 4] for i in range(len(layers))] for step in range(2)]
        Policy.from_steps("digits-flux", model.weights_sha256, layers, rows).save(folder / "policy.json")
        options = ("--layout", "plugin", "--formats", ",".join(FORMATS), "--policy", folder / "policy.json")
        arguments = ("build", "engine", "digits-flux", *options, *CommandLine.small, "--output", path)
        assert CommandLine.here(*arguments) == 0
    for words in ("polygraphy convert", "trtexec --onnx=", "inputs of plugin nodes"):
        assert words in told.getvalue()
    return path


def test_the_bundle_has_graphs_and_commands_and_no_plans(run: Path) -> None:
    bundle = BundleFiles.open(run)
    assert (bundle.manifest.layout, bundle.manifest.backend) == ("plugin", "onnxruntime")
    assert bundle.manifest.targets == ("sm90",)
    assert bundle.manifest.plans == ()
    script = (bundle.folder / "build-plugin-engine.sh").read_text()
    assert "build-plugin-engine.sh" in bundle.manifest.files
    assert script.count("--trt-opt-shapes") == len(bundle.policy.assignments)
    assert f"--profile={len(bundle.policy.assignments) - 1} " in script


def test_formats_are_stored_for_the_layers_that_use_them(run: Path, cli: CommandLine) -> None:
    """A weight input is there once for each layer that the policy gives its format to; the high plane serves two."""
    policy, model = Policy.load(run / "policy.json"), load_model("digits-flux")
    shapes = {layer: module.weight.shape for layer, module in model.adapter.quantizable_layers().items()}
    columns = dict(zip(policy.layers, map(set, zip(*policy.assignments, strict=True)), strict=True))
    both = {layer for layer, column in columns.items() if {"w4a8", "w8a8"} <= column}
    wanted = {
        "w4": (4, {layer for layer, column in columns.items() if "w4a8" in column}),
        "lo": (4, both),
        "w8": (8, {layer for layer, column in columns.items() if "w8a8" in column} - both),
        "w_fp8": (8, {layer for layer, column in columns.items() if "fp8" in column}),
        "w16": (16, {layer for layer, column in columns.items() if "bf16" in column}),
    }
    assert all(layers for _, layers in wanted.values())
    sizes = json.loads(cli("inspect", run, "--json").out)["sizes"]
    got = {row["name"]: (row["layers"], row["bytes"]) for row in sizes["operands"]}
    for name, (bits, layers) in wanted.items():
        assert got[name] == (len(layers), sum(bits * shapes[layer].numel() // 8 for layer in layers))
    assert [row["layout"] for row in sizes["layouts"]] == ["plugin"]


def test_check_and_generate_run_the_plugin_graph(run: Path, cli: CommandLine) -> None:
    report = json.loads(cli("check", run, "--json").out)
    layers = [row for row in report["rows"] if row["layer"] is not None]
    assert report["passed"]
    assert {row["format"] for row in layers} == {
        name for row in Policy.load(run / "policy.json").assignments for name in row
    }
    targets = {(row["assignment"], row["layer"]) for row in layers if row["variant"] == "target"}
    assert targets == {(assignment, row["layer"]) for assignment in (0, 1) for row in layers}
    assert cli("generate", run, "--samples", "1").code == 0


def test_a_wrong_plane_fails_the_check(run: Path, cli: CommandLine, tmp_path: Path) -> None:
    """The selector of another assignment: what a file whose profiles are out of order computes."""
    bundle = BundleFiles.open(run)
    path = bundle.graph_path(bundle.graph("cpu", None))
    before = path.read_bytes()
    model = onnx.load(path, load_external_data=False)
    for function in model.functions:
        for node in function.node:
            if node.op_type == "Constant" and node.attribute[0].t.data_type == onnx.TensorProto.BOOL:
                table = node.attribute[0].t
                table.raw_data = bytes(1 - value for value in table.raw_data)
    path.write_bytes(model.SerializeToString(deterministic=True))
    try:
        files = BundleFiles.open(run, verify=False)
        assert not accuracy.check(files, tmp_path).passed
    finally:
        path.write_bytes(before)


def test_a_defect_in_the_target_graph_is_seen(run: Path, tmp_path: Path) -> None:
    """Of both files that are compiled from: with the local functions and without them."""
    bundle = BundleFiles.open(run)
    path = bundle.graph_path(bundle.graph("target", None))
    before = path.read_bytes()
    model = onnx.load(path, load_external_data=False)
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == "proj_out.bias")
    bias.raw_data = bytes(len(bias.raw_data))
    path.write_bytes(model.SerializeToString(deterministic=True))
    try:
        report = accuracy.check(BundleFiles.open(run, verify=False), tmp_path)
    finally:
        path.write_bytes(before)
    wrong = [(row.variant, row.assignment, row.block) for row in report.rows if not row.passed]
    assert wrong == [("target", 0, "proj_out"), ("target", 1, "proj_out")]
    unequal = {row.subject: row.failure for row in report.exact if not row.passed}
    assert unequal.keys() == {"constants of the target graphs", "plugin.target.plain.onnx"}
    plain = "'plugin.target.plain.onnx' computes 'proj_out' otherwise than 'plugin.target.onnx'"
    assert unequal["plugin.target.plain.onnx"] == plain
