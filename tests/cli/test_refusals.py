"""Bad input: one clear sentence with the next step, exit code 2, nothing half-written and nothing lost."""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from adatsq_trt.files import read_tensors
from tests.permissions import permissions_hold

SM120 = ("--target", "sm120")


def policy_with(built: Path, file: Path, **changes: object) -> Path:
    """The run's policy with other fields."""
    content = json.loads((built / "policy.json").read_text())
    file.write_text(json.dumps({**content, **changes}))
    return file


# ------------------------------------------------------------------------ requests that do not go together


REQUESTS = {
    "model": (("digit-flux", *SM120), "unknown model 'digit-flux'; did you mean 'digits-flux'?"),
    "target": (("digits-flux", "--target", "sm12"), "unknown target 'sm12'; did you mean 'sm120'?"),
    "second target": (("digits-flux", *SM120, "--target", "h100"), "sm80, sm86, sm89, sm90, sm120, cpu"),
    "set": (("digits-flux", *SM120, "--formats", "blakwell"), "did you mean 'blackwell'?"),
    "format": (("digits-flux", *SM120, "--formats", "fp8,nvfp5"), "unknown format 'nvfp5'; did you mean 'nvfp4'?"),
    "no format": (("digits-flux", *SM120, "--formats", ","), "unknown format ''; choose one of: "),
    "formats of no target": (("digits-flux", "--formats", "paper"), "target 'sm120' does not accelerate w3a3"),
    "not accelerated": (
        ("digits-flux", "--target", "sm89", "--formats", "blackwell"),
        "target 'sm89' does not accelerate nvfp4, nvfp4a16; it accelerates bf16, fp16, fp8, fp8a16, int4wo; "
        "choose among these",
    ),
    "not accelerated by one of two": (("digits-flux", *SM120, "--target", "sm80", "--formats", "fp8"), "target 'sm80'"),
    "layout": (
        ("digits-flux", "--target", "sm90"),
        "target 'sm90' does not accelerate w4a8, fp8, w8a8, int4wo, w8a16, bf16 in this layout; it accelerates "
        "nothing; choose among these with --formats, or --layout plugin, or pass --simulate",
    ),
    "two types": (
        ("digits-flux", *SM120, "--formats", "fp8,bf16,fp16"),
        "--formats with both bf16 and fp16: a model has one 16-bit type for all that is not quantized",
    ),
    "simulated layout": (
        ("digits-flux", "--layout", "plugin", "--simulate"),
        "--simulate builds nothing that has a layout",
    ),
    "layout of a simulation": (
        ("digits-flux", "--layout", "shared", "--simulate"),
        "--layout shared: --simulate builds nothing that has a layout",
    ),
    "layout of a processor": (
        ("digits-flux", "--target", "cpu", "--layout", "embedded"),
        "--layout embedded: target 'cpu' runs graphs, not plans, so nothing of it has a layout; leave it out or add",
    ),
    "targets without a common format": (
        ("digits-flux", *SM120, "--target", "cpu"),
        "targets sm120, cpu accelerate no format of their sets in common in layout embedded; build for each in a run",
    ),
    "huge picture": (
        ("some/hub-id", *SM120, "--height", "1000000"),
        "--height: got 1000000, expected at most 32768; pass",
    ),
    "expansions without a beam": (
        ("digits-flux", *SM120, "--expansions", "4"),
        "--expansions 4: there is no beam search that it could shorten; add --beam 4, or leave it out",
    ),
    "huge guidance": (
        ("digits-flux", *SM120, "--guidance", "1e300"),
        "--guidance: got 1e+300, expected at most 1000; pass",
    ),
    "budget": (("digits-flux", *SM120, "--budget-bits", "3.99"), "cheapest is nvfp4 everywhere with a mean of 4 bits"),
    "negative budget": (("digits-flux", *SM120, "--budget-bits", "-6"), "cheapest is nvfp4 everywhere"),
    "NaN budget": (("digits-flux", *SM120, "--budget-bits", "nan"), "--budget-bits: got nan, expected a finite number"),
    "infinite budget": (("digits-flux", *SM120, "--budget-bits", "inf"), "--budget-bits: got inf"),
    "no guidance": (
        ("scenes-flux-schnell", *SM120, "--guidance", "2"),
        "--guidance 2: model 'scenes-flux-schnell' takes no guidance; leave it out",
    ),
    "option of another backend": (
        ("digits-flux", *SM120, "--version-compatible", "--weight-streaming"),
        "--version-compatible, --weight-streaming: only enterprise TensorRT has this; add --backend tensorrt",
    ),
    "nothing to compile": (
        ("digits-flux", "--simulate", "--backend", "tensorrt"),
        "--backend tensorrt: this request compiles no plans; leave it out",
    ),
    "no TensorRT": (
        ("digits-flux", *SM120, "--backend", "tensorrt"),
        "or build with --backend rtx, which needs neither",
    ),
    "memory limit": (
        ("digits-flux", *SM120, "--memory-limit", "100MB"),
        "--memory-limit 0.1 GB: stage 'calibrate' needs ",
    ),
    "no memory limit": (("digits-flux", *SM120, "--memory-limit", "12 XB"), "--memory-limit '12 XB': expected a size"),
    "guidance": (("digits-flux", *SM120, "--guidance", "nan"), "--guidance: got nan, expected a finite number"),
}


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is installed."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)


@pytest.mark.usefixtures("no_tensorrt")
@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("command", [("build", "engine"), ("search",)], ids=" ".join)
def test_impossible_requests_leave_an_existing_run_alone(
    cli, built: Path, name: str, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = REQUESTS[name]
    before = cli.state(built)
    assert message in cli(*command, *arguments, "--output", built).refusal
    assert cli.state(built) == before
    # Nor is a new one begun, or anything else written.
    assert message in cli(*command, *arguments, "--output", tmp_path / "new").refusal
    assert message in cli(*command, *arguments).refusal
    assert list(tmp_path.iterdir()) == []


def test_the_console_script_refuses_likewise(cli, tmp_path: Path) -> None:
    ended = cli.process("build", "engine", "digit-flux", *SM120, "--output", tmp_path / "new")
    assert "did you mean 'digits-flux'?" in ended.refusal
    assert ended.out == ""
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- policy files


def other_weights(built: Path, file: Path) -> None:
    policy_with(built, file, weights_sha256="0" * 64)


def other_layers(built: Path, file: Path) -> None:
    layers = json.loads((built / "policy.json").read_text())["layers"]
    policy_with(built, file, layers=[f"x{name}" for name in layers])


def unknown_format(built: Path, file: Path) -> None:
    rows = json.loads((built / "policy.json").read_text())["assignments"]
    policy_with(built, file, assignments=[["nvfp5", *row[1:]] for row in rows])


def format_of_another_set(built: Path, file: Path) -> None:
    rows = json.loads((built / "policy.json").read_text())["assignments"]
    policy_with(built, file, assignments=[["w4a8", *row[1:]] for row in rows])


def truncated(built: Path, file: Path) -> None:
    file.write_text((built / "policy.json").read_text()[:200])


def another_version(built: Path, file: Path) -> None:
    policy_with(built, file, schema_version=9)


def binary(_built: Path, file: Path) -> None:
    file.write_bytes(b"\x7fELF\xff\xfe\x00")


def folder(_built: Path, file: Path) -> None:
    file.mkdir()


def without_layers(built: Path, file: Path) -> None:
    content = json.loads((built / "policy.json").read_text())
    del content["layers"]
    file.write_text(json.dumps(content))


def missing(_built: Path, _file: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            other_weights,
            "policy was searched for model 'digits-flux' with weights 000000000000, this model has weights",
        ),
        (other_layers, "the policy has a layer 'xtransformer_blocks.0"),
        (unknown_format, "unknown format 'nvfp5'"),
        (
            format_of_another_set,
            "--policy uses w4a8, the formats of this run are nvfp4, fp8, bf16; pass",
        ),
        (truncated, "is not complete JSON"),
        (truncated, "; check the file or search again"),
        (without_layers, "is not a valid Policy: layers: Field required; check the file or search again"),
        (another_version, "schema version 9"),
        (another_version, "; check the file or search again"),
        (binary, "cannot be read as text"),
        (folder, "cannot be read as text"),
        (missing, "does not exist"),
    ],
)
def test_unsuitable_policy_files_are_refused(
    cli, built: Path, tmp_path: Path, spoil: Callable[[Path, Path], None], message: str
) -> None:
    file = tmp_path / "policy.json"
    spoil(built, file)
    before = cli.state(built)
    assert message in cli(*cli.build, "--policy", file, "--output", built).refusal
    assert cli.state(built) == before


def test_policy_for_other_steps_is_refused_with_the_option_that_helps(cli, built: Path) -> None:
    ended = cli(*cli.build, "--steps", "3", "--policy", built / "policy.json", "--output", built)
    assert "the policy has 2 steps, the run has 3; pass --steps 2" in ended.refusal


# ------------------------------------------------------------------------------------------ output folders


def test_read_only_output_is_refused(cli) -> None:
    with TemporaryDirectory() as parent:
        Path(parent).chmod(0o555)
        with permissions_hold():
            message = cli(*cli.build, "--output", Path(parent) / "run").refusal
        assert "Permission denied" in message
        assert "choose a folder that is writable" in message
        Path(parent).chmod(0o755)
        assert list(Path(parent).iterdir()) == []


@pytest.mark.parametrize("below", [".", "below"])
def test_a_file_in_the_way_of_the_output_is_refused(cli, tmp_path: Path, below: str) -> None:
    file = tmp_path / "thesis.tex"
    file.write_text("years of work")
    assert "--output" in cli(*cli.build, "--output", file / below).refusal
    assert file.read_text() == "years of work"


def test_a_folder_that_is_no_run_is_refused(cli, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "is not empty and is not a run directory" in cli(*cli.build, "--output", tmp_path).refusal
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_full_disk_is_one_sentence_and_the_same_command_goes_on(cli, tmp_path: Path, full_disk) -> None:
    calibrate = ("calibrate", *cli.build[2:], "--output", tmp_path / "run")
    with full_disk():
        ended = cli(*calibrate)
    assert "cannot" in ended.refusal
    assert "room" in ended.refusal
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in left if path.suffix == ".part"]
    for path in left:
        if path.suffix == ".safetensors":
            read_tensors(path)  # whole
    assert cli(*calibrate).code == 0


# --------------------------------------------------------------------------- runs and bundles to be read


def another_run_version(run: Path) -> None:
    (run / "run.json").write_text('{"schema_version": 9}')


def truncated_run(run: Path) -> None:
    (run / "run.json").write_text('{"schema_')


def truncated_settings(run: Path) -> None:
    (run / "settings.json").write_text((run / "settings.json").read_text()[:99])


def search_for_other_settings(run: Path) -> None:
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps({**settings, "budget_bits": 7.0}))


def search_removed(run: Path) -> None:
    shutil.rmtree(run / "search")


def hessians_truncated(run: Path) -> None:
    file = run / "calibrate" / "hessians" / "transformer_blocks.0.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def manifest_of_another_version(run: Path) -> None:
    file = run / "bundle" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema_version": 9}))


def manifest_truncated(run: Path) -> None:
    file = run / "bundle" / "manifest.json"
    os.truncate(file, file.stat().st_size // 2)


def plan_altered(run: Path) -> None:
    file = run / "bundle" / "plans" / "sm120" / "assignment_000.plan"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def weights_truncated(run: Path) -> None:
    file = run / "bundle" / "onnx" / "weights.data"
    os.truncate(file, file.stat().st_size // 2)


def prompts_removed(run: Path) -> None:
    (run / "bundle" / "prompts.safetensors").unlink()


def no_bundle(run: Path) -> None:
    shutil.rmtree(run / "bundle")


def empty(run: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()


def absent(run: Path) -> None:
    shutil.rmtree(run)


def a_file(run: Path) -> None:
    shutil.rmtree(run)
    run.write_text("")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (manifest_of_another_version, "schema version 9"),
        (manifest_truncated, "is not complete JSON"),
        (plan_altered, "assignment_000.plan' was altered: got sha256"),
        (weights_truncated, "weights.data' was altered: got sha256"),
        (prompts_removed, "prompts.safetensors' is gone; run 'adatsq-trt build engine' again"),
        (no_bundle, "is not a bundle and holds none"),
        (empty, "is not a bundle and holds none"),
        (absent, "is not a bundle and holds none"),
        (a_file, "is not a bundle and holds none"),
    ],
)
def test_unsound_bundles_are_refused(cli, copy: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(copy)
    before = cli.state(copy)
    for command in ("check", "generate", "inspect"):
        assert message in cli(command, copy).refusal
    assert cli.state(copy) == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (another_run_version, "schema version 9"),
        (truncated_run, "is not complete JSON"),
        (truncated_settings, "is not complete JSON"),
        (search_for_other_settings, "has no finished search for the settings in its settings.json"),
        (search_removed, "has no finished search"),
        (hessians_truncated, "hessians/transformer_blocks.0.safetensors' is not a complete safetensors file"),
        (empty, "is not a run directory; 'adatsq-trt build engine MODEL"),
        (absent, "is not a run directory"),
        (a_file, "is not a run directory"),
    ],
)
def test_unsound_runs_are_not_compared(cli, copy: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(copy)
    before = cli.state(copy)
    assert message in cli("compare", copy).refusal
    assert cli.state(copy) == before


def test_run_of_another_version_is_not_built_into(cli, copy: Path) -> None:
    another_run_version(copy)
    before = cli.state(copy)
    message = cli(*cli.build, "--output", copy).refusal
    assert "has schema version 9, this version of adatsq-trt reads 1" in message
    assert "a new run directory" in message
    assert cli.state(copy) == before


def test_what_generate_is_asked_for_must_exist(cli, built: Path, tmp_path: Path) -> None:
    assert "prompt 99: the bundle holds prompts 0 to 9" in cli("generate", built, "--prompt", "99").refusal
    assert "ends in .png" in cli("generate", built, "--output", tmp_path / "samples.jpg").refusal
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "samples.png"
    assert "cannot write" in cli("generate", built, "--samples", "1", "--output", output).refusal
    assert "file" in cli("check", built, "--output", tmp_path / "file").refusal
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# -------------------------------------------------------------------------------------------- failures


def test_debug_shows_the_traceback_and_keeps_the_exit_code(cli) -> None:
    ended = cli("--debug", "build", "engine", "digit-flux", *SM120)
    assert ended.code == 2
    assert "Traceback" in ended.err
    assert "UnknownNameError" in ended.err
    assert ended.err.splitlines()[-1].startswith("adatsq-trt: unknown model")


def test_an_unexpected_failure_is_one_sentence_and_exit_code_1(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_name: str) -> None:
        raise ZeroDivisionError("the sky fell")

    monkeypatch.setattr("adatsq_trt.stages.models.find_model", broken)
    ended = cli(*cli.build)
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert "unexpected ZeroDivisionError: the sky fell" in ended.err
    assert "--debug" in ended.err
    assert "Traceback" in cli("--debug", *cli.build).err


def test_a_file_that_may_not_be_read_is_one_sentence(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_name: str) -> None:
        raise PermissionError(13, "Permission denied", "/secret")

    monkeypatch.setattr("adatsq_trt.stages.models.find_model", forbidden)
    assert cli(*cli.build).refusal.startswith("'/secret': Permission denied; check the path")


def test_summary_numbers_are_finite(built: Path) -> None:
    """Bad numbers do not come out either."""
    summary = json.loads((built / "summary.json").read_text())
    assert all(math.isfinite(value) for value in summary["uniform_errors"].values())
