"""The run directory: what is reused, what is resumed, what is refused."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from adatsq_trt.errors import DamagedFileError, MissingFileError, OutputError
from adatsq_trt.files import write_bytes
from adatsq_trt.stages.run_directory import RunDirectory, Stage
from tests.permissions import permissions_hold

FullDisk = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory.open(tmp_path / "run") as directory:
        yield directory


def write_units(stage: Stage, *names: str) -> None:
    """Run a stage that writes its name into each unit."""
    with stage.run():
        for name in names:
            write_bytes(stage.unit(name), name.encode())


def fail(stage: Stage, name: str, error: BaseException) -> None:
    """Run a stage that writes one unit and then fails."""
    with stage.run():
        stage.unit(name).write_bytes(name.encode())
        time.sleep(0.05)
        raise error


def test_finished_stage_is_done_in_a_new_process(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path) as run:
        stage = run.stage("calibrate", {"seed": 1})
        assert not stage.done
        write_units(stage, "a", "sub/b")
        assert stage.done
    record = RunDirectory.existing(tmp_path).record("calibrate")
    assert RunDirectory.existing(tmp_path).stage("calibrate", {"seed": 1}).done
    assert record.complete
    assert set(record.outputs) == {"calibrate/a", "calibrate/sub/b"}
    assert record.peak_bytes > 1 << 20


def test_a_finished_stage_is_adopted_by_another_run_with_the_same_key(run: RunDirectory, tmp_path: Path) -> None:
    write_units(run.stage("calibrate", {"seed": 1}), "a", "sub/b")
    fail_stage = run.stage("quantize", {})
    with pytest.raises(KeyboardInterrupt):
        fail(fail_stage, "a", KeyboardInterrupt())
    with RunDirectory.open(tmp_path / "other") as other:
        stage = other.stage("calibrate", {"seed": 1})
        write_units(other.stage("calibrate", {"seed": 0}), "old")
        stage.adopt(run)
        assert stage.done
        assert sorted(file.name for file in stage.folder.rglob("*") if file.is_file()) == ["a", "b"]
        for name, seed in (("calibrate", 2), ("quantize", 0)):  # another key, an unfinished one
            missing = other.stage(name, {"seed": seed} if seed else {})
            missing.adopt(run)
            assert not missing.done
        assert stage.done, "what could not be adopted has changed nothing"


def test_another_input_empties_the_folder(run: RunDirectory) -> None:
    write_units(run.stage("search", {"beam": 2}), "step-0", "step-1")
    changed = run.stage("search", {"beam": 3})
    assert not changed.done
    write_units(changed, "step-0")
    assert not changed.unit("step-1").exists()


def test_key_depends_on_content_and_not_on_place(run: RunDirectory, tmp_path: Path) -> None:
    first, second, other = tmp_path / "x", tmp_path / "y", tmp_path / "z"
    for path, text in ((first, b"1"), (second, b"1"), (other, b"2")):
        path.write_bytes(text)
    key = run.stage("s", {}, [first]).key
    assert run.stage("s", {}, [second]).key == key
    assert len({key, run.stage("s", {}, [other]).key, run.stage("t", {}, [first]).key, run.stage("s", {}).key}) == 4
    first.write_bytes(b"3")
    assert run.stage("s", {}, [first]).key != key


def test_key_sees_every_file_of_a_folder(run: RunDirectory) -> None:
    stage = run.stage("quantize", {})
    write_units(stage, "a", "b")
    before = run.stage("search", {}, [stage.folder]).key
    write_bytes(stage.unit("b"), b"other")
    assert run.stage("search", {}, [stage.folder]).key != before


def test_missing_input_file_is_named(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="absent"):
        run.stage("s", {}, [tmp_path / "absent"])


def test_failed_stage_keeps_its_units_and_leaves_no_record(run: RunDirectory) -> None:
    stage = run.stage("search", {})
    with pytest.raises(KeyboardInterrupt):
        fail(stage, "step-0", KeyboardInterrupt())
    assert not stage.done
    with pytest.raises(MissingFileError, match="not finished"):
        run.record("search")
    with stage.run():
        assert stage.unit("step-0").read_bytes() == b"step-0"
    assert run.record("search").seconds >= 0.05


def test_damaged_output_is_made_again_and_the_rest_kept(run: RunDirectory) -> None:
    stage = run.stage("export", {})
    write_units(stage, "a", "b", "c")
    stage.unit("a").write_bytes(b"altered")
    stage.unit("b").unlink()
    assert not stage.done
    with stage.run():
        assert not stage.unit("a").exists()
        assert stage.unit("c").read_bytes() == b"c"


def test_half_written_files_of_a_killed_process_disappear(run: RunDirectory) -> None:
    stage = run.stage("export", {})
    with pytest.raises(RuntimeError):
        fail(stage, ".model.onnx.17.part", RuntimeError())
    with stage.run():
        assert list(stage.folder.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from adatsq_trt.files import write_bytes
from adatsq_trt.stages.run_directory import RunDirectory
run = RunDirectory.open(Path(sys.argv[1]))
stage = run.stage("search", {"beam": 4})
with stage.run():
    write_bytes(stage.unit("step-0"), b"0")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_process_leaves_its_units_and_no_lock(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    with RunDirectory.open(tmp_path) as run:
        stage = run.stage("search", {"beam": 4})
        assert not stage.done
        with stage.run():
            assert stage.unit("step-0").read_bytes() == b"0"
        assert stage.done


def test_second_writer_is_refused_and_readers_are_not(run: RunDirectory) -> None:
    write_units(run.stage("s", {}), "a")
    with pytest.raises(OutputError, match="in use"):
        RunDirectory.open(run.path)
    assert RunDirectory.existing(run.path).stage("s", {}).done
    run.close()
    RunDirectory.open(run.path).close()


def test_other_schema_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"schema_version": 99}')
    for opening in (RunDirectory.open, RunDirectory.existing):
        with pytest.raises(DamagedFileError, match="schema version 99"):
            opening(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text()) == {"schema_version": 99}
    # The failed attempt holds no lock: the same error again, not "in use".
    with pytest.raises(DamagedFileError):
        RunDirectory.open(tmp_path)


def test_truncated_record_is_named(run: RunDirectory) -> None:
    stage = run.stage("s", {})
    write_units(stage, "a")
    path = run.path / "stages" / "s.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(DamagedFileError, match=r"s\.json"):
        _ = stage.done


def test_damaged_hash_cache_is_only_a_cache(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path) as run:
        write_units(run.stage("s", {}), "a")
    (tmp_path / "stages" / "hashes.json").write_text("{")
    assert RunDirectory.existing(tmp_path).stage("s", {}).done


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not empty"):
        RunDirectory.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(OutputError, match="is a file"):
        RunDirectory.open(path)
    with pytest.raises(OutputError, match="cannot write"):
        RunDirectory.open(path / "below")


def test_missing_run_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="not a run directory"):
        RunDirectory.existing(tmp_path)


@pytest.mark.parametrize("mode", [0o000, 0o500])
def test_folder_without_permission_is_refused(mode: int) -> None:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(mode)
        with permissions_hold():
            with pytest.raises(OutputError, match="Permission denied"):
                RunDirectory.open(Path(folder))
            with pytest.raises(OutputError if mode == 0 else MissingFileError):
                RunDirectory.existing(Path(folder))
        Path(folder).chmod(0o700)
        assert list(Path(folder).iterdir()) == []


@pytest.mark.parametrize("atomic", [True, False])
def test_full_disk_is_one_sentence_and_nothing_is_half_written(
    run: RunDirectory, full_disk: FullDisk, atomic: bool
) -> None:
    stage = run.stage("export", {})

    def write() -> None:
        with full_disk(), stage.run():
            write_bytes(stage.unit("small"), b"kept")
            if atomic:
                write_bytes(stage.unit("big"), bytes(8192))
            stage.unit(".big.1.part").write_bytes(bytes(8192))

    with pytest.raises(OutputError, match=r"cannot .*write"):
        write()
    assert not stage.done
    with stage.run():
        assert [path.name for path in stage.folder.iterdir()] == ["small"]


def test_checking_a_finished_run_reads_no_large_file_again(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = run.stage("s", {})
    write_units(stage, "a")
    run.close()
    monkeypatch.setattr("adatsq_trt.stages.run_directory.sha256", lambda path: pytest.fail(f"read {path}"))
    assert RunDirectory.existing(run.path).stage("s", {}).done


def test_writing_without_the_lock_is_a_programming_error(run: RunDirectory) -> None:
    run.close()
    with pytest.raises(AssertionError), RunDirectory.existing(run.path).stage("s", {}).run():
        pass
