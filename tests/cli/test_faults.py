"""Faults of the machine and of people: one sentence, nothing half-written, and the same command goes on."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from adatsq_trt import zoo
from adatsq_trt.files import read_tensors
from adatsq_trt.stages.run_directory import RunDirectory
from tests.cli.conftest import fork_server
from tests.engines.conftest import make_bundle

STAGES = ("calibrate", "quantize", "search", "export", "bundle")


def forget(run: Path, stage: str) -> None:
    """Make a run look as if it had stopped before a stage."""
    for name in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(run / name)
        (run / "stages" / f"{name}.json").unlink()


def require_whole(run: Path) -> None:
    """No leftovers, and what is there can be read."""
    files = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".part"]
    for path in files:
        if path.suffix == ".safetensors":
            read_tensors(path)


# ------------------------------------------------------------------------------------------------ full disk


@pytest.mark.parametrize("stage", ["quantize", "search", pytest.param("export", marks=pytest.mark.slow), "bundle"])
def test_disk_full_in_a_stage(cli, copy: Path, full_disk, stage: str) -> None:
    forget(copy, stage)
    with full_disk():
        message = cli(*cli.build, "--output", copy).refusal
    assert "room" in message
    require_whole(copy)
    assert not (copy / "bundle" / "manifest.json").exists()
    if stage == "quantize":
        assert cli(stage, *cli.build[2:], "--output", copy).warnings == []


@pytest.mark.parametrize("command", ["check", "generate"])
def test_disk_full_in_a_command(cli, copy: Path, full_disk, command: str) -> None:
    with full_disk():
        message = cli(command, copy).refusal
    assert "room" in message
    require_whole(copy)
    assert not (copy / "check" / "check.json").exists()
    assert not (copy / "samples.png").exists()


# ------------------------------------------------------------------------------------------------ memory


def test_not_enough_memory(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path / "bundle")

    def noise(*_: object) -> None:
        raise MemoryError("Unable to allocate 3.64 TiB")

    monkeypatch.setattr("adatsq_trt.engines.runtime.Bundle.noise", noise)
    ended = cli("generate", bundle.folder)
    assert (ended.code, ended.out) == (1, "")
    last = ended.err.splitlines()[-1]
    assert last.startswith("adatsq-trt: not enough memory: Unable to allocate 3.64 TiB; ask for fewer samples")
    assert list(tmp_path.iterdir()) == [bundle.folder]


# -------------------------------------------------------------------------------------------- read-only folders


@pytest.mark.parametrize("command", ["build", "check", "generate"])
def test_a_read_only_run(cli, built: Path, read_only, command: str) -> None:
    with TemporaryDirectory() as parent:
        run = Path(shutil.copytree(built, Path(parent) / "run"))
        before = cli.state(run)
        arguments = (*cli.build, "--output", run) if command == "build" else (command, run)
        with read_only(Path(parent)):
            message = cli(*arguments).refusal
        assert "Permission denied" in message
        assert "choose a folder that is writable" in message
        assert cli.state(run) == before


# ---------------------------------------------------------------------------------------- files that disappear


@pytest.mark.parametrize(
    ("before", "file"),
    [
        ("quantize", "calibrate/hessians/transformer_blocks.0.safetensors"),
        ("search", "quantize/nvfp4/transformer_blocks.0.safetensors"),
        pytest.param("export", "search/policy.json", marks=pytest.mark.slow),
        ("bundle", "export/prompts.safetensors"),
    ],
)
def test_a_file_removed_between_two_stages(
    cli, copy: Path, monkeypatch: pytest.MonkeyPatch, before: str, file: str
) -> None:
    """While the command runs: the stage that wrote the file has ended, the one that reads it begins."""
    from adatsq_trt.stages.run_directory import Stage

    forget(copy, before)
    prepare = Stage._prepare

    def remove_first(stage: Stage) -> Any:
        if stage.name == before:
            (copy / file).unlink()
        return prepare(stage)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "_prepare", remove_first)
        message = cli(*cli.build, "--output", copy).refusal
    # The weights of a format are one thing in many files: of them the format and the layer are named.
    assert (file.rpartition("/")[0] if before == "search" else file) in message
    require_whole(copy)
    assert not (copy / "bundle" / "manifest.json").exists()
    if before == "quantize":
        ended = cli(before, *cli.build[2:], "--output", copy)
        assert ended.warnings == [f"stage 'calibrate': making '{file}' again, because it was altered or removed"]


# ---------------------------------------------------------------------------------------------------- the clock


def test_a_clock_that_goes_backwards_changes_nothing(cli, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tomorrow = time.time() + 86_400
    for path in copy.rglob("*"):
        os.utime(path, (tomorrow, tomorrow))
    before = {name: RunDirectory.existing(copy).record(name) for name in STAGES}
    moments = iter(range(2_000_000_000, 0, -60))
    monkeypatch.setattr(time, "time", lambda: float(next(moments)))
    assert cli(*cli.build, "--output", copy).warnings == []
    assert {name: RunDirectory.existing(copy).record(name) for name in STAGES} == before
    forget(copy, "quantize")
    assert cli("quantize", *cli.build[2:], "--output", copy).warnings == []
    assert RunDirectory.existing(copy).record("quantize").seconds >= 0


# ----------------------------------------------------------------------------------------------- two at once


def run_alone(arguments: tuple[str, ...], models: Path, told: Path) -> None:
    """A command as a process whose standard error is a file."""
    from adatsq_trt.cli import main

    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), 2)
    zoo.ZOO_FOLDER = models
    sys.argv = ["adatsq-trt", *arguments]
    main()


def test_of_two_builds_at_once_one_is_refused(cli, tmp_path: Path) -> None:
    command = ("calibrate", *cli.build[2:], "--output", str(tmp_path / "run"))
    files = [tmp_path / "first.txt", tmp_path / "second.txt"]
    both = [fork_server().Process(target=run_alone, args=(command, zoo.ZOO_FOLDER, told)) for told in files]
    for process in both:
        process.start()
    for process in both:
        process.join()
    ended = [(told.read_text(), process.exitcode) for told, process in zip(files, both, strict=True)]
    refused = [message for message, code in ended if code == 2]
    # Whoever comes after the other has ended finds everything done.
    assert all(code in (0, 2) for _, code in ended)
    assert len(refused) <= 1
    for message in refused:
        assert "is in use by another adatsq-trt process" in message
        assert "Traceback" not in message
    assert RunDirectory.existing(tmp_path / "run").record("calibrate").complete
    require_whole(tmp_path / "run")


# --------------------------------------------------------------------------------------------------- Ctrl-C


def interrupting(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with Ctrl-C when it is called."""

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return function(*args, **kwargs)

    return interrupted


@pytest.mark.parametrize(
    ("place", "command"),
    [
        ("adatsq_trt.stages.quantize.gptq_factored", "quantize"),
        ("adatsq_trt.files.os.fsync", "quantize"),
        ("adatsq_trt.engines.build.write_bytes", "build"),
        ("adatsq_trt.engines.accuracy.rows.compare", "check"),
        ("adatsq_trt.engines.backends.onnxruntime.OnnxRuntimeBackend.load", "generate"),
    ],
)
def test_ctrl_c_is_one_line_and_the_same_command_goes_on(
    cli, copy: Path, monkeypatch: pytest.MonkeyPatch, place: str, command: str
) -> None:
    if command in ("quantize", "build"):
        forget(copy, "quantize" if command == "quantize" else "bundle")
    calls = {
        "build": (*cli.build, "--output", copy),
        "quantize": ("quantize", *cli.build[2:], "--output", copy),
        "check": ("check", copy),
        "generate": ("generate", copy, "--samples", "1"),
    }
    # A shell without job control gives its background processes an ignored Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupting(resolve_name(place)))
            ended = cli(*calls[command])
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.code == 130
    assert ended.err.splitlines()[-1] == "adatsq-trt: interrupted; the same command goes on where this one stopped"
    assert "Traceback" not in ended.err
    require_whole(copy)
    assert cli(*calls[command]).code == 0
