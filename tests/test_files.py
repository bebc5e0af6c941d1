"""Files that appear whole or not at all, and readers that say what is wrong."""

import hashlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from adatsq_trt.errors import DamagedFileError, MissingFileError, OutputError
from adatsq_trt.files import (
    MAX_JSON_BYTES,
    MappedTensors,
    atomic_path,
    read_json_model,
    read_tensors,
    sha256,
    write_bytes,
    write_json_model,
    write_tensors,
)
from adatsq_trt.stages.meter import resident_bytes

FullDisk = Callable[[], AbstractContextManager[None]]


class Note(BaseModel):
    """A small file with a schema version."""

    schema_version: Literal[3] = 3
    text: str


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_halfway(path: Path, error: BaseException) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise error


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(type(error)):
        fail_halfway(path, error)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_writing_makes_folders_and_replaces(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a" / "b" / "file", b"1")
    write_bytes(tmp_path / "a" / "b" / "file", b"2")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"2"
    assert names(tmp_path / "a" / "b") == ["file"]


def test_a_file_where_a_folder_should_be_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_bytes(tmp_path / "file" / "below", b"")


@pytest.mark.parametrize("name", [".", "/", "folder"])
def test_a_folder_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="cannot write"):
        write_bytes(Path(name), b"")
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("kind", ["bytes", "json", "tensors"])
def test_full_disk_is_an_output_error_and_leaves_the_old_file(tmp_path: Path, full_disk: FullDisk, kind: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write() -> None:
        with full_disk():
            if kind == "bytes":
                write_bytes(path, bytes(8192))
            elif kind == "json":
                write_json_model(path, Note(text="x" * 8192))
            else:
                write_tensors(path, {"a": torch.zeros(8192)})

    with pytest.raises(OutputError, match="cannot write"):
        write()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@given(text=st.text())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_round_trip(tmp_path: Path, text: str) -> None:
    write_json_model(tmp_path / "note.json", Note(text=text))
    assert read_json_model(tmp_path / "note.json", Note) == Note(text=text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not complete JSON"),
        (b'{"schema_version": 3, "text": "a', "not complete JSON"),
        (b"[" * 100_000, "not complete JSON"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (b'{"schema_version": 4, "text": "a"}', "schema version 4, this version of adatsq-trt reads 3"),
        (b'{"text": "a"}', "schema version None"),
        (b"[]", "schema version None"),
        (b'{"schema_version": 3}', "text: Field required"),
        (b'{"schema_version": 3, "text": 1}', "text: .*string"),
    ],
)
def test_damaged_json_is_described(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "note.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=message) as caught:
        read_json_model(tmp_path / "note.json", Note)
    assert "note.json" in str(caught.value)
    with pytest.raises(DamagedFileError, match=f"{message}.*; ask its author$"):
        read_json_model(tmp_path / "note.json", Note, "ask its author")


class Figures(BaseModel):
    """A file with numbers at several depths."""

    least: float = 0.0
    errors: dict[str, tuple[float | None, ...]] = {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"least": Infinity}', "least: got inf"),
        ('{"least": "-INF"}', "least: got -inf"),
        ('{"errors": {"fp8": [1.0, null, NaN]}}', "errors.fp8.2: got nan"),
        ('{"errors": {"fp8": [1e999]}}', "errors.fp8.0: got inf"),
    ],
)
def test_numbers_without_end_are_refused_with_their_place(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "figures.json").write_text(content)
    with pytest.raises(DamagedFileError, match=f"{message}, expected a finite number; delete it"):
        read_json_model(tmp_path / "figures.json", Figures)


@pytest.mark.parametrize("content", [b"", b"\x00" * 20])
def test_advice_on_damaged_tensors_can_be_given(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"run the stage that writes it again$"):
        read_tensors(tmp_path / "x.safetensors")
    with pytest.raises(DamagedFileError, match=r"; ask its author$"):
        read_tensors(tmp_path / "x.safetensors", "ask its author")


def test_a_folder_in_place_of_a_file_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError):
        read_json_model(tmp_path, Note)


def test_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "absent"
    for read in (lambda: read_json_model(path, Note), lambda: read_tensors(path), lambda: sha256(path)):
        with pytest.raises(MissingFileError, match="absent"):
            read()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.float8_e4m3fn]
)
def test_tensors_keep_type_shape_and_content(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.arange(12).reshape(3, 4).to(dtype).T  # not contiguous
    write_tensors(tmp_path / "t.safetensors", {"a": value, "scalar": torch.tensor(1.5)})
    read = read_tensors(tmp_path / "t.safetensors")
    assert read["a"].dtype is dtype
    assert torch.equal(read["a"].float(), value.float())
    assert read["scalar"].shape == ()


def test_every_truncation_of_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.arange(4.0)})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedFileError, match=r"t\.safetensors"):
            read_tensors(path)


def test_hash_is_that_of_the_content(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    write_bytes(tmp_path / "file", content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def too_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [(endless, "not a regular file"), (pipe, "not a regular file"), (too_large, "more than 67108864 bytes")],
)
def test_no_more_is_read_than_may_be_parsed(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "file.json")
    with pytest.raises(DamagedFileError, match=message):
        read_json_model(tmp_path / "file.json", Note)


def test_tensors_are_mapped_one_at_a_time(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for file in files:
        write_tensors(file, {file.stem: torch.arange(1 << 24, dtype=torch.float32)})
    tensors, before = MappedTensors(files), resident_bytes()
    assert list(tensors) == ["a", "b"]
    for name in tensors:
        assert tensors[name][-1] == (1 << 24) - 1
        assert float(tensors[name].sum()) > 0
        assert resident_bytes() - before < 1 << 25  # a file has twice as much
    files[1].write_bytes(files[1].read_bytes()[:1000])
    with pytest.raises(DamagedFileError, match=r"b\.safetensors' is not a complete"):
        MappedTensors(files)
    with pytest.raises(MissingFileError, match=r"c\.safetensors' does not exist"):
        MappedTensors([tmp_path / "c.safetensors"])
