"""`build engine`, the commands of single stages, and what is reused, replaced and mended, on a real run."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from adatsq_trt import zoo
from adatsq_trt.engines.accuracy import CheckReport, CheckRow
from adatsq_trt.engines.accuracy.report import LoopReport
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.files import read_json_model, read_tensors, write_tensors
from adatsq_trt.policy import Policy
from adatsq_trt.report.summary import Summary
from adatsq_trt.search.select import SearchResult
from adatsq_trt.settings import Settings
from adatsq_trt.stages import calibrate, export, quantize, search
from adatsq_trt.stages.graph import STAGES as NODES
from adatsq_trt.stages.models import OpenedModel, open_run
from adatsq_trt.stages.run_directory import RunDirectory, StageRecord
from adatsq_trt.zoo.loading import LoadedModel

STAGES = tuple(
    name for name in NODES if name not in ("embed", "refine")
)  # models of the zoo have no such stage; not asked for


def records(run: Path) -> dict[str, StageRecord]:
    return {
        name: RunDirectory.existing(run).record(name) for name in STAGES if (run / "stages" / f"{name}.json").exists()
    }


# --------------------------------------------------------------------------------------- what a run holds


def test_run_holds_all_that_was_promised(built: Path) -> None:
    policy = Policy.load(built / "policy.json")
    settings = Settings.model_validate_json((built / "settings.json").read_text())
    assert (settings.model, settings.targets, settings.formats) == ("digits-flux", ("sm120",), ("nvfp4", "fp8", "bf16"))
    assert (settings.steps, settings.beam, settings.guidance, settings.budget_bits) == (2, 2, 2.0, 6.0)
    assert set(records(built)) == set(STAGES)
    assert (built / "bundle" / "policy.json").read_bytes() == (built / "policy.json").read_bytes()
    for index in range(len(policy.assignments)):
        for variant in ("cpu", "target"):
            assert (built / "bundle" / "onnx" / f"assignment_{index:03d}.{variant}.onnx").stat().st_size
        assert (built / "bundle" / "plans" / "sm120" / f"assignment_{index:03d}.plan").stat().st_size
    assert not list(built.rglob("*.part"))


def test_summary_has_the_figures_of_the_run(built: Path) -> None:
    summary = Summary.model_validate_json((built / "summary.json").read_text())
    policy = Policy.load(built / "policy.json")
    assert (summary.schema_version, summary.model, summary.steps) == (3, "digits-flux", 2)
    assert (summary.buckets, summary.assignments) == (len(policy.buckets), len(policy.assignments))
    assert summary.mean_bits == policy.mean_bits <= 6.0
    assert 4.0 < summary.mean_weight_bits < 17
    assert 4.0 < summary.mean_activation_bits < 17
    assert set(summary.uniform_errors) == {"nvfp4", "fp8", "bf16"}
    result = read_json_model(built / "search" / search.RESULT, SearchResult)
    errors = {point.name: point.held_out_error for point in result.points if point.kind == "uniform"}
    assert summary.uniform_errors == errors
    assert 10 * summary.uniform_errors["bf16"] < summary.uniform_errors["nvfp4"]
    chosen, by_layer, by_step = result.chosen, result.layer_only, result.time_only
    assert by_layer is not None
    assert by_step is not None
    # On the samples that it was chosen on; a rival that was told from the best has seen fewer.
    own, rivals = result.points[chosen], [result.points[rival] for rival in (by_layer, by_step)]
    assert all(own.rank_error <= rival.rank_error for rival in rivals if rival.samples == own.samples)
    assert all(rival.samples <= own.samples for rival in rivals)
    assert summary.final_error == result.points[chosen].held_out_error
    assert summary.static_errors.layer_only == result.points[by_layer].held_out_error
    assert summary.static_errors.time_only == result.points[by_step].held_out_error
    assert (summary.base_type, summary.rounding_error) == ("bfloat16", 0)
    assert summary.denoiser_calls > 0
    assert set(summary.stages) == set(STAGES)
    assert all(figures.seconds > 0 and figures.peak_bytes > 1 << 20 for figures in summary.stages.values())
    plans = sum(path.stat().st_size for path in (built / "bundle" / "plans").rglob("*.plan"))
    assert summary.engine_bytes == plans
    assert summary.weight_bytes == (built / "bundle" / "onnx" / "weights.data").stat().st_size
    assert summary.onnx_bytes == sum(path.stat().st_size for path in (built / "bundle" / "onnx").glob("*.onnx"))
    assert {"adatsq-trt", "torch", "onnx", "tensorrt-rtx"} <= set(summary.versions)


def test_held_out_seeds_are_not_those_of_the_calibration(built: Path) -> None:
    summary = Summary.model_validate_json((built / "summary.json").read_text())
    assert summary.held_out_seeds[0] > 2  # calibration has 0 and 1
    assert summary.held_out_seeds[1] - summary.held_out_seeds[0] + 1 == summary.held_out_samples == 2


# ------------------------------------------------------------------------------------------- what is reused


def test_second_build_runs_no_stage(cli, copy: Path) -> None:
    before, summary = records(copy), (copy / "summary.json").read_bytes()
    plans = cli.state(copy / "bundle")
    ended = cli(*cli.build, "--output", copy)
    assert ended.warnings == []
    assert "budget_bits" in ended.out  # the settings, defaults included
    assert "of the chosen" in ended.out  # the figures
    assert str(copy / "bundle") in ended.out
    assert records(copy) == before
    assert cli.state(copy / "bundle") == plans
    assert (copy / "summary.json").read_bytes() == summary


def test_plans_are_made_again_without_loading_the_model(cli, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = sorted((copy / "bundle" / "plans").rglob("*.plan"))
    plans[0].unlink()

    def load(_opened: OpenedModel, _run: RunDirectory, _settings: Settings) -> LoadedModel:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(OpenedModel, "load", load)
    assert cli(*cli.build, "--output", copy).code == 0
    assert plans[0].is_file()


@pytest.mark.parametrize("stage", STAGES[:-1])
def test_command_of_a_stage_finds_what_the_build_did(cli, copy: Path, stage: str) -> None:
    before = cli.state(copy / stage)
    ended = cli(stage, *cli.build[2:], "--output", copy)
    assert ended.warnings == []
    assert str(copy / stage) in ended.out
    assert cli.state(copy / stage) == before


def test_command_of_a_stage_stops_there_and_the_next_goes_on(cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = {}
    for index, stage in enumerate(STAGES[:3]):
        assert cli(stage, *cli.build[2:], "--output", run).warnings == []
        assert set(records(run)) == set(STAGES[: index + 1])
        made[stage] = records(run)[stage]
    assert records(run) == made


def test_changed_settings_replace_what_depends_on_them_and_say_so(cli, copy: Path) -> None:
    before, bundle = records(copy), cli.state(copy / "bundle")
    ended = cli("search", *cli.build[2:], "--budget-bits", "8", "--output", copy)
    assert ended.warnings == [
        "stage 'search': replacing its earlier result, because its settings or inputs changed",
    ]
    after = records(copy)
    assert after["search"].key != before["search"].key
    assert {name: after[name] for name in STAGES if name != "search"} == {
        name: before[name] for name in STAGES if name != "search"
    }
    assert cli.state(copy / "bundle") == bundle  # until a build replaces it
    assert Policy.load(copy / "search" / "policy.json").mean_bits <= 8
    assert "search" in cli("search", *cli.build[2:], "--output", copy).warnings[0]


def test_another_declared_type_is_another_model_for_every_stage(built: Path) -> None:
    """With `cpu` alone weights are float32; no other setting of these stages tells that."""
    context = open_run(built)
    other = replace(context, settings=context.settings.model_copy(update={"targets": ("cpu",)}))
    assert (context.settings.base_type, other.settings.base_type) == ("bfloat16", "float32")
    for stage in (calibrate, quantize, search, export):
        assert stage.stage(context).done
        assert stage.stage(other).key != stage.stage(context).key


def test_a_class_that_calibration_never_asked_for_still_makes_another_model(
    cli, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calibration samples show classes 0 and 1 only, so no file of the stage would tell the models apart."""
    folder = shutil.copytree(zoo.find_model("digits-flux"), tmp_path / "zoo" / "digits-flux")
    file = folder / "class_embedding" / "model.safetensors"
    table = read_tensors(file)["weight"]
    table[9] = 0
    write_tensors(file, {"weight": table})
    monkeypatch.setattr(zoo, "ZOO_FOLDER", tmp_path / "zoo")
    warnings = cli("calibrate", *cli.build[2:], "--output", copy).warnings
    assert warnings == ["stage 'calibrate': replacing its earlier result, because its settings or inputs changed"]


def test_few_assignments_have_a_price(cli, copy: Path, tmp_path: Path) -> None:
    before = Summary.model_validate_json((copy / "summary.json").read_text())
    assert before.unlimited is not None
    assert before.unlimited.assignments == before.assignments  # of two steps, where four are allowed
    limited = ("--max-assignments", "1", "--batch", "4", "--batch", "1")
    ended = cli(*cli.build, *limited, "--output", copy)
    assert ended.code == 0, ended.err
    summary = Summary.model_validate_json((copy / "summary.json").read_text())
    assert (summary.assignments, len(Policy.load(copy / "policy.json").assignments)) == (1, 1)
    assert summary.unlimited is not None
    result = read_json_model(copy / "search" / search.RESULT, SearchResult)
    assert result.unlimited is not None
    unlimited = result.points[result.unlimited]
    assert (summary.unlimited.assignments, summary.unlimited.error) == (unlimited.assignments, unlimited.held_out_error)
    assert unlimited.assignments > 1 or result.unlimited == result.chosen
    assert ("without limit" in ended.out) == (result.unlimited != result.chosen)
    assert summary.mean_bits <= 6.0
    # Each --batch is an optimization profile; guidance has two branches.
    (plan,) = BundleFiles.open(copy).manifest.plans
    assert (plan.profile_rows, plan.max_rows) == ((2, 8), 8)
    assert cli("report", copy).code == 0
    assert "At most 1 were allowed" in (copy / "report.html").read_text()
    # A given policy is not merged.
    mixed = Policy.load(copy / "policy.json")
    rows = [["fp8", *mixed.assignments[0][1:]], ["bf16", *mixed.assignments[0][1:]]]
    Policy.from_steps(mixed.model, mixed.weights_sha256, mixed.layers, rows).save(tmp_path / "two.json")
    refused = cli(*cli.build, *limited, "--policy", tmp_path / "two.json", "--output", copy)
    assert "--policy has 2 assignments, --max-assignments is 1; leave out one of them" in refused.refusal


def test_given_policy_replaces_the_search(cli, copy: Path, tmp_path: Path) -> None:
    policy = Policy.load(copy / "policy.json")
    rows = [["fp8"] * len(policy.layers)] * policy.steps
    own = Policy.from_steps(policy.model, policy.weights_sha256, policy.layers, rows)
    own.save(tmp_path / "own.json")
    ended = cli("search", *cli.build[2:], "--policy", tmp_path / "own.json", "--output", copy)
    assert len(ended.warnings) == 1
    assert Policy.load(copy / "search" / "policy.json") == own
    assert not (copy / "search" / "columns").exists()


# -------------------------------------------------------------------------------------------- what is mended


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def test_damaged_outputs_up_to_the_search_are_made_again(cli, copy: Path) -> None:
    damaged = [
        "calibrate/hessians/transformer_blocks.0.safetensors",
        "calibrate/fisher/step_001.safetensors",
        "quantize/fp8/transformer_blocks.0.safetensors",
        "search/columns/column_001.safetensors",
        "search/policy.json",
    ]
    contents = {name: (copy / name).read_bytes() for name in damaged}
    for name in damaged:
        halve(copy / name)
    ended = cli("search", *cli.build[2:], "--output", copy)
    assert ended.warnings == [
        f"stage '{name.partition('/')[0]}': making '{name}' again, because it was altered or removed"
        for name in sorted(damaged)
    ]
    assert {name: (copy / name).read_bytes() for name in damaged} == contents


def test_damaged_and_removed_bundle_files_are_made_again(cli, copy: Path) -> None:
    contents = {name: (copy / "bundle" / name).read_bytes() for name in ("prompts.safetensors", "manifest.json")}
    halve(copy / "bundle" / "prompts.safetensors")
    (copy / "bundle" / "manifest.json").unlink()
    (copy / "summary.json").unlink()
    (copy / "settings.json").write_text("{")
    plans = cli.state(copy / "bundle" / "plans" / "sm120")
    assert len(cli(*cli.build, "--output", copy).warnings) == 2
    assert {name: (copy / "bundle" / name).read_bytes() for name in contents} == contents
    assert cli.state(copy / "bundle" / "plans" / "sm120") == plans
    assert Settings.model_validate_json((copy / "settings.json").read_text()).steps == 2
    assert cli("inspect", copy).code == 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("export/onnx/assignment_000.cpu.onnx", marks=pytest.mark.slow),
        "bundle/plans/sm120/assignment_000.plan",
    ],
)
def test_damaged_graphs_and_plans_are_made_again(cli, copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    halve(copy / name)
    assert len(cli(*cli.build, "--output", copy).warnings) == 1
    assert (copy / name).read_bytes() == content


@pytest.mark.parametrize("name", ["stages/search.json", "stages/bundle.json", "run.json"])
def test_truncated_records_are_named_and_nothing_is_changed(cli, copy: Path, name: str) -> None:
    halve(copy / name)
    before = cli.state(copy / "bundle") | cli.state(copy / "search")
    message = cli(*cli.build, "--output", copy).refusal
    assert f"{copy / name}' is not complete JSON" in message
    assert cli.state(copy / "bundle") | cli.state(copy / "search") == before


def test_lost_hash_cache_costs_only_time(cli, copy: Path) -> None:
    (copy / "stages" / "hashes.json").write_text("{")
    before = records(copy)
    assert cli(*cli.build, "--output", copy).warnings == []
    assert records(copy) == before


# ------------------------------------------------------------------------- commands that read a run or bundle


@pytest.fixture
def moved(built: Path, tmp_path: Path) -> Path:
    """The bundle alone, away from its run."""
    return Path(shutil.copytree(built / "bundle", tmp_path / "moved" / "bundle"))


@pytest.mark.parametrize("layout", ["shared", "switch"])
def test_another_layout_replaces_plans_only(cli, copy: Path, layout: str) -> None:
    before = records(copy)
    # Engines of the first layout were at most four.
    ended = cli(*cli.build, "--layout", layout, "--max-assignments", "4", "--output", copy)
    assert ended.warnings == ["stage 'bundle': replacing its earlier result, because its settings or inputs changed"]
    assert {name: record for name, record in records(copy).items() if name != "bundle"} == {
        name: record for name, record in before.items() if name != "bundle"
    }
    names = {path.name for path in (copy / "bundle" / "plans").rglob("*") if path.is_file() and path.suffix != ".json"}
    assignments = len(Policy.load(copy / "policy.json").assignments)
    own = {f"assignment_{i:03d}.plan.xz" for i in range(assignments)} | {"store.safetensors"}
    assert names == ({"switch.plan"} if layout == "switch" else own)
    assert "of the least" in ended.out
    assert cli("generate", copy, "--samples", "1").code == 0


def test_inspect_shows_buckets_or_the_manifest(cli, built: Path, moved: Path) -> None:
    for place in (built, built / "bundle", moved):
        shown = cli("inspect", place)
        assert shown.code == 0
        assert "digits-flux" in shown.out
        assert "sm120" in shown.out
        assert "one column per step" in shown.out
        assert "onnxruntime: runs here" in shown.out
        seen = json.loads(cli("inspect", place, "--json").out)
        assert seen["manifest"]["model"] == "digits-flux"
        assert "policy.json" in seen["manifest"]["files"]
        assert seen["here"]["onnxruntime"] is None


def test_generate_writes_a_contact_sheet_beside_the_bundle(cli, moved: Path) -> None:
    refused = cli("generate", moved, "--offload", "expert")
    assert refused.code == 2
    assert "--offload expert: the bundle" in refused.err
    ended = cli("generate", moved, "--samples", "2", "--prompt", "3")
    assert ended.code == 0
    sheet = moved.parent / "samples.png"
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert str(sheet) in ended.out


def test_check_passes_and_writes_its_report(cli, copy: Path) -> None:
    ended = cli("check", copy)
    assert ended.code == 0, ended.err
    assert "ok" in ended.out
    report = CheckReport.model_validate_json((copy / "check" / "check.json").read_text())
    assert report.passed
    assert {row.variant for row in report.rows} == {"cpu", "target", "reference"}
    assert "has passed before" in cli("check", copy).err


def test_failed_check_says_where_and_ends_with_1(
    cli, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = CheckRow(
        bucket=0,
        step=1,
        assignment=0,
        variant="cpu",
        block=None,
        layer=None,
        format=None,
        computed_by="onnxruntime",
        reference="PyTorch",
        median_error=None,
        median_tolerance=1e-5,
        relative_error=0.5,
        relative_tolerance=0.1,
        passed=False,
        failure=None,
        command="polygraphy run",
    )
    loop = LoopReport(rows=(), fail_above=None, passed=False, failure="no loop", command="polygraphy run")
    report = CheckReport(
        model="digits-flux", manifest_sha256="", passed=False, exact=(), buckets=((0, 1),), rows=(row,), loop=loop
    )
    monkeypatch.setattr("adatsq_trt.engines.accuracy.check", lambda *_: report)
    ended = cli("check", built, "--again", "--json", "--junit", tmp_path / "check.xml")
    assert ended.code == 1
    assert CheckReport.model_validate_json(ended.out) == report
    assert "check failed at step 1 (cpu) and in the denoising loop; see '" in ended.err.splitlines()[-1]
    assert "no loop" in (tmp_path / "check.xml").read_text()
    shown = cli("check", built, "--again").out
    assert "FAILED" in shown
    assert "step 1, cpu graph of assignment 0: median none" in shown
    assert "polygraphy run" in " ".join(shown.split())


def test_compare_prints_the_solvers(cli, built: Path) -> None:
    before = cli.state(built)
    errors = json.loads(cli("compare", built, "--json").out)
    assert list(errors) == ["policy"]  # blackwell has no grouped integer format
    solvers = errors["policy"]
    assert list(solvers) == ["GPTQ, Fisher-weighted Hessian", "GPTQ, unweighted Hessian", "round to nearest"]
    summary = Summary.model_validate_json((built / "summary.json").read_text())
    # The same weights and samples; where sums are taken in another order, single numbers round to their neighbours.
    assert solvers["GPTQ, Fisher-weighted Hessian"] == pytest.approx(summary.final_error, rel=1e-2)
    assert cli.state(built) == before
