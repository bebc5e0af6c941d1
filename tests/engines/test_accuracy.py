"""The check passes what is right and fails what is wrong: seeded defects, one at a time."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper
from safetensors.numpy import save_file

from adatsq_trt.engines.accuracy import (
    FLOAT32_MEDIAN,
    REPORT_NAME,
    CheckReport,
    block_tolerance,
    check,
    coarsest_step,
    passed_before,
    step_tolerance,
)
from adatsq_trt.engines.bundle import REFERENCE_NAME, SCALES_NAME, BundleFiles, read_arrays
from adatsq_trt.errors import AdatsqError, DamagedFileError
from adatsq_trt.files import read_json_model, write_json_model


def failed(report: CheckReport) -> list[tuple[str, int, int]]:
    return [(row.variant, row.step, row.assignment) for row in report.rows if not row.passed]


def edit_graph(bundle: BundleFiles, variant: str, assignment: int, change: Callable[[ModelProto], None]) -> None:
    path = bundle.graph_path(bundle.graph(variant, assignment))
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def multiply(name: str, factor: float) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((array * factor).astype(array.dtype), name))

    return change


def exchange(bundle: BundleFiles, variant: str) -> None:
    first, second = (bundle.graph_path(bundle.graph(variant, i)) for i in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


@pytest.fixture(scope="module")
def checked(tiny_bundle: BundleFiles, tmp_path_factory: pytest.TempPathFactory) -> tuple[CheckReport, Path]:
    folder = tmp_path_factory.mktemp("check")
    return check(tiny_bundle, folder), folder


def test_a_sound_bundle_passes(checked: tuple[CheckReport, Path]) -> None:
    report, folder = checked
    assert report.passed
    assert [(row.variant, row.step, row.assignment) for row in report.rows] == [
        *(("cpu", step, assignment) for step, assignment in enumerate((0, 1, 2, 0))),
        *(("target", step, step) for step in range(3)),
    ]
    assert {row.block for row in report.rows} == {None, "blocks.0", "blocks.1"}
    assert read_json_model(folder / REPORT_NAME, CheckReport) == report


def test_only_the_same_bundle_that_passed_is_not_checked_again(
    checked: tuple[CheckReport, Path], tiny_bundle: BundleFiles, tmp_path: Path
) -> None:
    report, folder = checked
    assert passed_before(tiny_bundle, folder) == report
    assert passed_before(tiny_bundle, tmp_path) is None
    for change in ({"passed": False}, {"manifest_sha256": "0" * 64}):
        write_json_model(tmp_path / REPORT_NAME, report.model_copy(update=change))
        assert passed_before(tiny_bundle, tmp_path) is None


def test_two_different_computations_are_compared(checked: tuple[CheckReport, Path]) -> None:
    """The target blocks compute in bfloat16, so an error of nothing would mean that something ran against itself."""
    for row in checked[0].rows:
        if row.variant == "target":
            assert row.median_error is not None
            assert row.median_error > 1e-4
            assert row.median_error < row.median_tolerance / 4


def test_progress(tiny_bundle: BundleFiles, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    check(tiny_bundle, tmp_path, on_row=lambda done, rows: told.append((done, rows)))
    assert told == [(i, 7) for i in range(1, 8)]


@pytest.mark.parametrize(("format_name", "factor"), [("w8a8s", 2.0), ("w8a8s", 0.5), ("fp8", 0.5)])
def test_an_activation_scale_off_by_two(
    own_bundle: BundleFiles, tmp_path: Path, format_name: str, factor: float
) -> None:
    """Doubling fp8's scale is left out: a floating grid moved by a power of two is the same grid."""
    tables = read_arrays(own_bundle.folder / SCALES_NAME)
    column = own_bundle.policy.assignments[1].index(format_name)
    tables[format_name][1, column] *= factor
    save_file(tables, own_bundle.folder / SCALES_NAME)
    assert failed(check(own_bundle, tmp_path)) == [("cpu", 1, 1)]


@pytest.mark.parametrize("layer", ["blocks.0.linear", "blocks.1.linear"])
def test_a_weight_scale_off_by_two(own_bundle: BundleFiles, tmp_path: Path, layer: str) -> None:
    edit_graph(own_bundle, "cpu", 1, multiply(f"{layer}.weight_scale", 2.0))
    assert ("cpu", 1, 1) in failed(check(own_bundle, tmp_path))


def test_a_dropped_bias(own_bundle: BundleFiles, tmp_path: Path) -> None:
    edit_graph(own_bundle, "cpu", 0, multiply("blocks.1.linear.bias", 0.0))
    assert {("cpu", 0, 0), ("cpu", 3, 0)} <= set(failed(check(own_bundle, tmp_path)))


def test_exchanged_graphs(own_bundle: BundleFiles, tmp_path: Path) -> None:
    exchange(own_bundle, "cpu")
    assert {("cpu", 0, 0), ("cpu", 1, 1), ("cpu", 3, 0)} <= set(failed(check(own_bundle, tmp_path)))


def test_a_defect_in_a_few_rows_only(own_bundle: BundleFiles, tmp_path: Path) -> None:
    """The median does not see it, the relative error does."""
    reference = dict(own_bundle.reference)
    output = reference["step_001.output"].copy()
    output[0] += 3.0
    save_file({**reference, "step_001.output": output}, own_bundle.folder / REFERENCE_NAME)
    report = check(BundleFiles.open(own_bundle.folder, verify=False), tmp_path)
    assert failed(report) == [("cpu", 1, 1)]
    (row,) = (row for row in report.rows if not row.passed)
    assert row.median_error is not None
    assert row.median_error < row.median_tolerance


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_outputs_that_are_no_numbers(own_bundle: BundleFiles, tmp_path: Path, value: float) -> None:
    edit_graph(own_bundle, "cpu", 2, multiply("blocks.1.linear.bias", value) if value else _zero_output)
    report = check(own_bundle, tmp_path)
    assert ("cpu", 2, 2) in failed(report)
    assert not report.passed


def _zero_output(model: ModelProto) -> None:
    (last,) = (node for node in model.graph.node if "velocity" in node.output)
    last.op_type = "Sub"
    last.input[1] = last.input[0]


def test_an_output_of_another_shape(own_bundle: BundleFiles, tmp_path: Path) -> None:
    reference = {name: value for name, value in own_bundle.reference.items() if name != "step_002.output"}
    other = {**reference, "step_002.output": own_bundle.reference["step_002.output"][:, :2].copy()}
    save_file(other, own_bundle.folder / REFERENCE_NAME)
    assert ("cpu", 2, 2) in failed(check(BundleFiles.open(own_bundle.folder, verify=False), tmp_path))


@pytest.mark.parametrize("defect", ["weight_scale", "bias"])
def test_a_defect_in_a_target_graph(own_bundle: BundleFiles, tmp_path: Path, defect: str) -> None:
    (row,) = (r for r in check(own_bundle, tmp_path).rows if (r.variant, r.assignment) == ("target", 1))
    name = f"{row.block}.linear.{defect}"
    edit_graph(own_bundle, "target", 1, multiply(name, 2.0 if defect == "weight_scale" else 0.0))
    assert failed(check(own_bundle, tmp_path)) == [("target", 1, 1)]


def test_exchanged_target_graphs(own_bundle: BundleFiles, tmp_path: Path) -> None:
    exchange(own_bundle, "target")
    assert {("target", 0, 0), ("target", 1, 1)} <= set(failed(check(own_bundle, tmp_path)))


def test_a_step_without_reference(own_bundle: BundleFiles, tmp_path: Path) -> None:
    rest = {name: value for name, value in own_bundle.reference.items() if name != "step_001.output"}
    save_file(rest, own_bundle.folder / REFERENCE_NAME)
    with pytest.raises(DamagedFileError, match=r"step_001\.output"):
        check(BundleFiles.open(own_bundle.folder, verify=False), tmp_path)


def test_a_graph_that_does_not_load(own_bundle: BundleFiles, tmp_path: Path) -> None:
    own_bundle.graph_path(own_bundle.graph("cpu", 1)).write_bytes(b"no graph")
    with pytest.raises(AdatsqError, match=r"cannot run .*assignment_001\.cpu\.onnx"):
        check(own_bundle, tmp_path)


@pytest.mark.parametrize("variant", ["cpu", "target"])
def test_the_command_repeats_the_row(checked: tuple[CheckReport, Path], variant: str) -> None:
    report, folder = checked
    row = next(row for row in report.rows if row.variant == variant)
    assert run_command(row.command, folder) == 0


def test_the_command_of_a_failed_row_fails(own_bundle: BundleFiles, tmp_path: Path) -> None:
    edit_graph(own_bundle, "cpu", 1, multiply("blocks.0.linear.bias", 0.0))
    row = next(row for row in check(own_bundle, tmp_path).rows if not row.passed)
    assert run_command(row.command, tmp_path) != 0


def run_command(command: str, folder: Path) -> int:
    words = shlex.split(command)
    words[0] = str(Path(sys.executable).with_name(words[0]))
    return subprocess.run(words, cwd=folder, capture_output=True, check=False).returncode


def test_tolerances() -> None:
    assert coarsest_step(["fp32"]) == 0
    assert coarsest_step(["w8a8", "w3a3"]) == pytest.approx(1 / 3)
    assert coarsest_step(["bf16", "fp8"]) == 2**-4
    assert coarsest_step(["int4wo"]) == 2**-8
    assert step_tolerance(["fp32"]).median == FLOAT32_MEDIAN
    assert step_tolerance(["fp32", "nvfp4"]).relative == 0.25
    assert step_tolerance(["nvfp4", "fp8"]).median < step_tolerance(["nvfp4", "bf16"]).median
    assert block_tolerance(["fp8"], "float16").relative < block_tolerance(["fp8"], "bfloat16").relative
    assert block_tolerance(["fp8"], "float32") == step_tolerance(["fp8"])
