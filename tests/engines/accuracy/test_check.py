"""The check passes what is right and fails what is wrong: seeded defects, one at a time."""

import contextlib
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper
from polygraphy.comparator import AccuracyResults
from polygraphy.json import load_json
from polygraphy.tools import main
from safetensors.numpy import save_file

from adatsq_trt.engines.accuracy import REPORT_NAME, CheckReport, bisect, check, passed_before, work_units
from adatsq_trt.engines.accuracy.references import Reference
from adatsq_trt.engines.bundle import REFERENCE_NAME, SCALES_NAME, BundleFiles, read_arrays
from adatsq_trt.errors import DamagedFileError
from adatsq_trt.files import read_json_model, write_json_model


def failed(report: CheckReport) -> list[tuple[str, int, int]]:
    """Graphs with a wrong output."""
    return list(dict.fromkeys((row.variant, row.step, row.assignment) for row in report.rows if not row.passed))


def first_layers(bundle: BundleFiles, report: CheckReport, folder: Path) -> list[tuple[str, int, str]]:
    return [(layer.variant, layer.step, layer.layer) for layer in bisect(bundle, report, folder).first_layers]


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
    assert report.buckets == ((0, 0), (1, 1), (2, 2), (3, 3))
    layers = ("blocks.0.linear", "blocks.1.linear")
    blocks = (("embed", None), ("blocks.0", layers[0]), ("blocks.0", None), ("blocks.1", layers[1]), ("blocks.1", None))
    cpu = [
        ("cpu", step, assignment, None, separated, layer)
        for step, assignment in enumerate((0, 1, 2, 0))
        for separated, layer in (*((True, name) for name in layers), (True, None), (False, None))
    ]
    target = [("target", step, step, block, False, layer) for step in range(3) for block, layer in blocks]
    got = [(row.variant, row.step, row.assignment, row.block, row.separated, row.layer) for row in report.rows]
    whole = [("reference", step, assignment, None, False, None) for step, assignment in enumerate((0, 1, 2, 0))]
    assert sorted(got, key=str) == sorted([*cpu, *target, *whole], key=str)
    assert got[:10] == [*cpu[:4], whole[0], *target[:5]]  # by bucket, layers in the order of execution
    assert {row.format for row in report.rows if row.step == 2} == {"bf16", "fp8", None}
    assert [row.step for row in report.loop.rows] == [0, 1, 2, 3]
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
    told: list[None] = []
    check(tiny_bundle, tmp_path, on_unit=lambda: told.append(None))
    assert len(told) == work_units(tiny_bundle)


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
    report = check(own_bundle, tmp_path)
    assert ("cpu", 1, 1) in failed(report)
    assert ("cpu", 1, layer) in first_layers(own_bundle, report, tmp_path)


def test_a_dropped_bias(own_bundle: BundleFiles, tmp_path: Path) -> None:
    edit_graph(own_bundle, "cpu", 0, multiply("blocks.1.linear.bias", 0.0))
    report = check(own_bundle, tmp_path)
    assert {("cpu", 0, 0), ("cpu", 3, 0)} <= set(failed(report))
    # The target blocks are compared with the cpu graph, so they differ at the same place.
    named = [("cpu", 0, "blocks.1.linear"), ("target", 0, "blocks.1.linear"), ("cpu", 3, "blocks.1.linear")]
    assert first_layers(own_bundle, report, tmp_path) == named


def test_exchanged_graphs(own_bundle: BundleFiles, tmp_path: Path) -> None:
    exchange(own_bundle, "cpu")
    report = check(own_bundle, tmp_path)
    assert {("cpu", 0, 0), ("cpu", 1, 1), ("cpu", 3, 0)} <= set(failed(report))
    assert ("cpu", 1, "blocks.0.linear") in first_layers(own_bundle, report, tmp_path)


def test_a_reference_for_any_step_finds_the_layer(own_bundle: BundleFiles, tmp_path: Path) -> None:
    """A step that is not the first of its bucket has no layers in the bundle."""
    edit_graph(own_bundle, "cpu", 0, multiply("blocks.1.linear.bias", 0.0))
    report = check(own_bundle, tmp_path)
    rows = tuple(row for row in report.rows if row.variant == "cpu" and row.step == 3 and row.layer is None)
    alone = report.model_copy(update={"rows": rows})
    assert bisect(own_bundle, alone, tmp_path).first_layers == ()
    complete = bisect(own_bundle, alone, tmp_path, Reference(own_bundle).layers)
    assert [(layer.step, layer.layer) for layer in complete.first_layers] == [(3, "blocks.1.linear")]
    assert read_json_model(tmp_path / REPORT_NAME, CheckReport) == complete
    (layer,) = complete.first_layers
    scale = read_arrays(own_bundle.folder / SCALES_NAME)["w8a8s"][3, 1]
    assert (layer.format, layer.activation_scale) == ("w8a8s", float(scale))
    assert f"layer 'blocks.1.linear', format w8a8s, scale {scale:.6g}" in layer.sentence


def test_a_defect_in_a_few_rows_only(own_bundle: BundleFiles, tmp_path: Path) -> None:
    """The median does not see it, the relative error does."""
    reference = dict(own_bundle.reference)
    output = reference["step_001.output"].copy()
    output[0] += 3.0
    save_file({**reference, "step_001.output": output}, own_bundle.folder / REFERENCE_NAME)
    report = check(BundleFiles.open(own_bundle.folder, verify=False), tmp_path)
    assert failed(report) == [("cpu", 1, 1)]
    behind, whole = (row for row in report.rows if not row.passed)
    assert (behind.separated, whole.separated) == (True, False)
    assert behind.median_error is not None
    assert behind.median_tolerance is not None
    assert behind.median_error < behind.median_tolerance


def test_a_wrong_layer_does_not_make_others_wrong(own_bundle: BundleFiles, tmp_path: Path) -> None:
    """Every layer is given PyTorch's outputs of the layers before it."""
    edit_graph(own_bundle, "cpu", 1, multiply("blocks.0.linear.bias", 0.0))
    rows = [row for row in check(own_bundle, tmp_path).rows if (row.variant, row.step) == ("cpu", 1)]
    assert [(row.separated, row.layer) for row in rows if not row.passed] == [(True, "blocks.0.linear"), (False, None)]
    assert [row.layer for row in rows if row.passed] == ["blocks.1.linear", None]


def test_one_wrong_output_of_a_layer_is_seen(own_bundle: BundleFiles, tmp_path: Path) -> None:
    """A sixteenth of the elements, in the coarsest format of the bundle; the median does not see it."""

    def change(model: ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name == "blocks.0.linear.bias")
        bias = numpy_helper.to_array(tensor).copy()
        bias[3] = -bias[3]
        tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))

    edit_graph(own_bundle, "cpu", 0, change)
    row = next(row for row in check(own_bundle, tmp_path).rows if not row.passed)
    assert (row.layer, row.format) == ("blocks.0.linear", "fp8")
    assert row.median_error is not None
    assert row.median_tolerance is not None
    assert row.median_error < row.median_tolerance


@pytest.mark.parametrize("numbers", [[0.1], [0.1, 0.1, np.nan, 0.1], [0.1, 0.1, -1.0, 0.1]])
def test_a_spread_that_is_no_limit(own_bundle: BundleFiles, tmp_path: Path, numbers: list[float]) -> None:
    changed = {**own_bundle.reference, "spread.loop": np.array(numbers, np.float32)}
    save_file(changed, own_bundle.folder / REFERENCE_NAME)
    with pytest.raises(DamagedFileError, match=r"'spread\.loop' must hold 4 numbers from 0"):
        check(BundleFiles.open(own_bundle.folder, verify=False), tmp_path)


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


@pytest.mark.parametrize("layer", ["blocks.0.linear", "blocks.1.linear"])
@pytest.mark.parametrize(("part", "factor"), [("weight_scale", 2.0), ("bias", 0.0)])
def test_a_defect_in_a_target_graph(
    own_bundle: BundleFiles, tmp_path: Path, layer: str, part: str, factor: float
) -> None:
    edit_graph(own_bundle, "target", 1, multiply(f"{layer}.{part}", factor))
    report = check(own_bundle, tmp_path)
    assert failed(report) == [("target", 1, 1)]
    assert first_layers(own_bundle, report, tmp_path) == [("target", 1, layer)]


@pytest.mark.parametrize("factor", [0.0, 1.1])
def test_a_defect_outside_of_the_blocks_of_a_target_graph(
    own_bundle: BundleFiles, tmp_path: Path, factor: float
) -> None:
    def scale_the_shift(model: ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(factor, ml_dtypes.bfloat16), "factor"))
        place, node = next((i, n) for i, n in enumerate(model.graph.node) if n.output[0] == "shift")
        scaled = onnx.helper.make_node("Mul", ["before", "factor"], ["shift"])
        scaled.metadata_props.extend(node.metadata_props)
        node.output[0] = "before"
        model.graph.node.insert(place + 1, scaled)

    edit_graph(own_bundle, "target", 1, scale_the_shift)
    report = check(own_bundle, tmp_path)
    wrong = [(row.variant, row.step, row.block, row.layer) for row in report.rows if not row.passed]
    assert wrong == [("target", 1, "embed", None)]
    assert not report.passed


@pytest.mark.parametrize("layer", ["blocks.0.linear", "blocks.1.linear"])
def test_a_dropped_bias_in_the_full_precision_graph(own_bundle: BundleFiles, tmp_path: Path, layer: str) -> None:
    path = own_bundle.graph_path(own_bundle.graph("reference", None))
    model = onnx.load(path, load_external_data=False)
    multiply(f"{layer}.bias", 0.0)(model)
    path.write_bytes(model.SerializeToString())
    report = check(own_bundle, tmp_path)
    assert [(variant, step) for variant, step, _ in failed(report)] == [("reference", step) for step in range(4)]
    assert not report.passed
    assert bisect(own_bundle, report, tmp_path).first_layers == ()


def test_an_exact_difference_alone_fails(own_bundle: BundleFiles, tmp_path: Path) -> None:
    manifest = own_bundle.manifest.model_copy(update={"prompt_texts": ("one", "two", "three")})
    report = check(replace(own_bundle, manifest=manifest), tmp_path)
    assert all(row.passed for row in report.rows)
    assert report.loop.passed
    assert [row.subject for row in report.exact if not row.passed] == ["prompts' texts"]
    assert not report.passed


def test_exchanged_target_graphs(own_bundle: BundleFiles, tmp_path: Path) -> None:
    exchange(own_bundle, "target")
    assert {("target", 0, 0), ("target", 1, 1)} <= set(failed(check(own_bundle, tmp_path)))


def test_a_step_without_reference(own_bundle: BundleFiles, tmp_path: Path) -> None:
    rest = {name: value for name, value in own_bundle.reference.items() if name != "step_001.output"}
    save_file(rest, own_bundle.folder / REFERENCE_NAME)
    with pytest.raises(DamagedFileError, match=r"step_001\.output"):
        check(BundleFiles.open(own_bundle.folder, verify=False), tmp_path)


@pytest.mark.parametrize("variant", ["cpu", "target"])
def test_a_graph_that_does_not_load(own_bundle: BundleFiles, tmp_path: Path, variant: str) -> None:
    path = own_bundle.graph_path(own_bundle.graph(variant, 1))
    path.write_bytes(b"no graph")
    report = check(own_bundle, tmp_path)
    wrong = [row for row in report.rows if not row.passed]
    assert {row.assignment for row in wrong} == {1}
    assert all(path.name in (row.failure or "") for row in wrong)
    assert not report.passed
    assert bisect(own_bundle, report, tmp_path).first_layers == ()
    assert report.loop.passed  # it runs the graph of all assignments


def test_a_graph_of_all_assignments_that_does_not_load(own_bundle: BundleFiles, tmp_path: Path) -> None:
    path = own_bundle.graph_path(own_bundle.graph("cpu", None))
    path.write_bytes(b"no graph")
    report = check(own_bundle, tmp_path)
    assert all(row.passed for row in report.rows)
    assert path.name in (report.loop.failure or "")
    assert not report.passed


def test_the_commands_repeat_the_rows(checked: tuple[CheckReport, Path]) -> None:
    """By hand, from the saved files, with the same figures."""
    report, folder = checked
    rows = {(row.variant, row.separated, row.layer is None): row for row in report.rows if row.assignment == 2}
    assert len(rows) == 6
    for row in rows.values():
        code, ((median, relative),) = run_command(row.command, folder)
        assert code == 0
        assert relative == pytest.approx(row.relative_error, rel=1e-6)
        assert (median is None) == (row.median_tolerance is None) == (row.median_error is None)
        if median is not None:
            assert median == pytest.approx(row.median_error, rel=1e-6)


def test_the_command_of_a_failed_row_fails_with_its_figures(own_bundle: BundleFiles, tmp_path: Path) -> None:
    edit_graph(own_bundle, "cpu", 1, multiply("blocks.0.linear.bias", 0.0))
    row = next(row for row in check(own_bundle, tmp_path).rows if not row.passed)
    code, (figures,) = run_command(row.command, tmp_path)
    assert code != 0
    assert figures == pytest.approx((row.median_error, row.relative_error), rel=1e-6)


def test_the_command_of_the_loop_repeats_it(checked: tuple[CheckReport, Path]) -> None:
    report, folder = checked
    program = Path(sys.executable).with_name("polygraphy")  # itself, once
    code, figures = run_command(
        report.loop.command, folder, lambda words: subprocess.run([program, *words], check=False).returncode
    )
    assert code == 0
    assert [relative for _, relative in figures] == pytest.approx([row.error for row in report.loop.rows])


def run_command(
    command: str, folder: Path, polygraphy: Callable[[list[str]], int] = main
) -> tuple[int, list[tuple[float | None, float]]]:
    """Exit code, and median and relative error of each output, as polygraphy wrote them down."""
    program, *words = shlex.split(command)
    assert program == "polygraphy"
    words += ["--save-accuracy-results", "accuracy.json"]
    with contextlib.chdir(folder):
        code = polygraphy(words)
    results = AccuracyResults.load(str(folder / "accuracy.json"))
    outputs = [next(iter(result.values()))[0] for result in results]
    medians = {name: row.median_absdiff for name, row in outputs[0].items()} if len(outputs) == 2 else {}
    place = words.index("--load-outputs") + (1 if "--onnxrt" in words else 2)
    expected = load_json(str(folder / words[place]))[0][1][0]
    relatives = {name: 10 ** (-row.snr / 20) for name, row in outputs[-1].items()}
    sizes = {name: float(np.sqrt(np.mean(np.square(expected[name], dtype=np.float64)))) for name in relatives}
    return code, [(medians[name] / sizes[name] if medians else None, relative) for name, relative in relatives.items()]
