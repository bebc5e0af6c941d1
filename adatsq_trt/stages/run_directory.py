"""The run directory: where every stage reads and writes, so that work is reused, resumed and never half-written.

    RUN/run.json              schema version of the directory
    RUN/.lock                 held while a command writes
    RUN/stages/NAME.json      key, seconds, peak memory and outputs of a stage
    RUN/stages/hashes.json    content hashes by path, size and time: saves reading large files again
    RUN/NAME/                 the files of a stage

A stage's key is the hash of its name, its settings, the content of its input files and the package's version. Equal
key and untouched outputs: the stage is skipped. Equal key but unfinished: the folder stays and the stage goes on at
the first missing unit. Another key: the folder is emptied first.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from adatsq_trt import __version__
from adatsq_trt.errors import DamagedFileError, MissingFileError, OutputError
from adatsq_trt.files import read_json_model, sha256, write_json_model
from adatsq_trt.stages.meter import Meter

log = logging.getLogger(__name__)
Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM}


class RunInfo(BaseModel):
    """Content of run.json, which makes a folder a run directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1


class StageRecord(BaseModel):
    """The account of a stage.

    Attributes:
        schema_version: of this file.
        name: of the stage.
        key: hash of everything that the stage depends on.
        complete: whether it ran to its end; until then `outputs` is empty.
        seconds: wall-clock time, summed over the attempts that it took.
        peak_bytes: largest resident memory of the process during the stage.
        outputs: path relative to the run directory → sha256.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    name: str
    key: str
    complete: bool
    seconds: float
    peak_bytes: int
    outputs: dict[str, str]


class RunDirectory:
    """One folder with all the files of one run; `open` it to write, `existing` to read.

    Attributes:
        path: the folder, absolute.
    """

    def __init__(self, path: Path, lock: int | None) -> None:
        """Use `RunDirectory.open` or `RunDirectory.existing`.

        Args:
            path: the folder, absolute.
            lock: file descriptor that holds the lock, None for readers.
        """
        self.path = path
        self._lock = lock
        self._hashes = _HashCache(path)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Create or reopen a run directory and keep other writers out until `close`.

        Raises:
            OutputError: the folder cannot be written, is in use, or holds something else.
            DamagedFileError: the directory is of another schema version.
        """
        path = path.absolute()
        info = path / "run.json"
        with _disk_errors(path):
            if not info.exists():
                _require_empty(path)
            lock = _acquire(path)
            try:
                if info.exists():
                    read_json_model(info, RunInfo)
                else:
                    write_json_model(info, RunInfo())
            except BaseException:
                os.close(lock)
                raise
            return cls(path, lock)

    @classmethod
    def existing(cls, path: Path) -> RunDirectory:
        """Open a run directory for reading; takes no lock and writes nothing.

        Raises:
            MissingFileError: there is no run directory.
            OutputError: it may not be read.
            DamagedFileError: the directory is of another schema version.
        """
        path = path.absolute()
        with _disk_errors(path):
            exists = (path / "run.json").is_file()
        if not exists:
            raise MissingFileError(
                f"'{path}' is not a run directory; 'adatsq-trt build engine MODEL --output {path}' makes one"
            )
        read_json_model(path / "run.json", RunInfo)
        return cls(path, None)

    def __enter__(self) -> RunDirectory:
        """Close at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let other writers in."""
        self.close()

    def close(self) -> None:
        """Let other writers in; the object is good for reading afterwards."""
        if self._lock is not None:
            with suppress(OutputError):  # only a cache: the next run hashes again
                self._hashes.save()
            os.close(self._lock)
            self._lock = None

    def stage(self, name: str, inputs: Mapping[str, Json], files: Sequence[Path] = ()) -> Stage:
        """The stage `name` for these inputs.

        Args:
            name: of the stage and of its folder.
            inputs: the settings that its result depends on.
            files: the files that it reads; a folder stands for all files in it. Where they lie does not matter.

        Raises:
            MissingFileError: an input file does not exist.
        """
        identity = {
            "name": name,
            "version": __version__,
            "inputs": inputs,
            "files": [self._content(path) for path in files],
        }
        text = json.dumps(identity, sort_keys=True, allow_nan=False)
        return Stage(self, name, hashlib.sha256(text.encode()).hexdigest())

    def record(self, name: str) -> StageRecord:
        """The record of a finished stage.

        Raises:
            MissingFileError: the stage has not run to its end.
            DamagedFileError: the record is truncated or of another schema version.
        """
        record = self._last_record(name)
        if record is None or not record.complete:
            raise MissingFileError(f"stage '{name}' of '{self.path}' is not finished; run the same command again")
        return record

    def _last_record(self, name: str) -> StageRecord | None:
        path = self._record_path(name)
        return read_json_model(path, StageRecord) if path.exists() else None

    def _record_path(self, name: str) -> Path:
        return self.path / "stages" / f"{name}.json"

    def _content(self, path: Path) -> list[list[str]]:
        """[relative path, hash] of a file or of all files in a folder."""
        if not path.is_dir():
            return [["", self._hashes.of(path)]]
        return [[file.relative_to(path).as_posix(), self._hashes.of(file)] for file in _files(path)]


@dataclass(frozen=True)
class Stage:
    """One step of a run: reads files, writes files, is skipped when nothing that it depends on has changed.

    Attributes:
        directory: the run that it belongs to.
        name: of the stage and of its folder.
        key: hash of everything that it depends on.
    """

    directory: RunDirectory
    name: str
    key: str

    @property
    def folder(self) -> Path:
        """Where the stage's files lie."""
        return self.directory.path / self.name

    def unit(self, name: str) -> Path:
        """Path of a unit of work: written whole (`adatsq_trt.files`), and found again after an interruption."""
        return self.folder / name

    def adopt(self, directory: RunDirectory) -> None:
        """Take over what this stage wrote in another run directory, where it is finished there with the same key."""
        assert self.directory._lock is not None, "a stage runs in a directory that was opened for writing"
        other = Stage(directory, self.name, self.key)
        if self.done or not other.done:
            return
        self.directory._record_path(self.name).unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        shutil.copytree(other.folder, self.folder)
        record = directory._last_record(self.name)
        assert record is not None, "a finished stage has a record"
        self._write(record)

    @property
    def done(self) -> bool:
        """Whether the stage ran to its end with this key and its files are untouched.

        Raises:
            DamagedFileError: the record is truncated or of another schema version.
        """
        record = self.directory._last_record(self.name)
        if record is None or not record.complete or record.key != self.key:
            return False
        return all(self._untouched(path, expected) for path, expected in record.outputs.items())

    def _untouched(self, path: str, expected: str) -> bool:
        file = self.directory.path / path
        return file.is_file() and self.directory._hashes.of(file) == expected

    @contextmanager
    def run(self) -> Iterator[Path]:
        """Give the stage's folder, prepared; at the end write the record, or none when the block fails.

        Raises:
            OutputError: the disk is full or the folder cannot be written.
        """
        assert self.directory._lock is not None, "a stage runs in a directory that was opened for writing"
        with _disk_errors(self.folder):
            before = self._prepare()
            self._write(before)
            with Meter(lambda seconds, peak: self._write(_later(before, seconds, peak))) as meter:
                yield self.folder
            outputs = {self._relative(file): self.directory._hashes.of(file) for file in _files(self.folder)}
            after = _later(before, meter.seconds, meter.peak_bytes)
            self._write(after.model_copy(update={"complete": True, "outputs": outputs}))
            self.directory._hashes.save()

    def _prepare(self) -> StageRecord:
        """Keep what an earlier attempt with this key left behind, remove everything else; the account so far."""
        last = self.directory._last_record(self.name)
        if last is not None and last.key != self.key:
            log.warning("stage '%s': replacing its earlier result, because its settings or inputs changed", self.name)
        if last is None or last.key != self.key:
            # In this order, so that a record never vouches for a folder that is half removed.
            self.directory._record_path(self.name).unlink(missing_ok=True)
            if self.folder.exists():
                shutil.rmtree(self.folder)
            last = None
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.rglob(".*.part"):
            leftover.unlink()
        if last is None:
            return StageRecord(name=self.name, key=self.key, complete=False, seconds=0.0, peak_bytes=0, outputs={})
        for path, expected in last.outputs.items():
            if not self._untouched(path, expected):
                log.warning("stage '%s': making '%s' again, because it was altered or removed", self.name, path)
                (self.directory.path / path).unlink(missing_ok=True)
        return last.model_copy(update={"complete": False, "outputs": {}})

    def _relative(self, file: Path) -> str:
        return file.relative_to(self.directory.path).as_posix()

    def _write(self, record: StageRecord) -> None:
        write_json_model(self.directory._record_path(self.name), record)


def _later(record: StageRecord, seconds: float, peak_bytes: int) -> StageRecord:
    """The account after another attempt."""
    return record.model_copy(
        update={
            "seconds": round(record.seconds + seconds, 3),
            "peak_bytes": max(record.peak_bytes, peak_bytes),
        }
    )


def _files(folder: Path) -> list[Path]:
    """All finished files of a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part")


def _require_empty(path: Path) -> None:
    """Stages remove their folders when their inputs change: never in a folder that is somebody else's."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"'{path}' is a file, expected a folder; choose another --output")
    # Hidden files may be the lock and an unfinished run.json of a run that was killed at once.
    if path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise OutputError(
            f"'{path}' is not empty and is not a run directory; choose a new or empty folder for --output"
        )


def _acquire(path: Path) -> int:
    """Lock the directory for writing; the lock goes with the process, so a killed one leaves none behind."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(
            f"cannot write to '{path}': {error.strerror or error}; choose a folder that is writable for --output"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise OutputError(
            f"'{path}' is in use by another adatsq-trt process; wait until it ends or choose another --output"
        ) from error
    return lock


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn what a disk refuses, in whichever library it came up, into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise OutputError(
            f"cannot read or write '{error.filename or folder}': {error.strerror}; make room and run the "
            "same command again (what is finished stays), or choose another --output"
        ) from error


class _HashEntry(BaseModel):
    model_config = ConfigDict(frozen=True)

    size: int
    mtime_ns: int
    inode: int  # tells a file that was replaced within one tick of the clock
    sha256: str


class _HashTable(BaseModel):
    schema_version: Literal[1] = 1
    files: dict[str, _HashEntry] = {}


class _HashCache:
    """Content hashes of files, looked up by path, size and modification time."""

    def __init__(self, run: Path) -> None:
        self._path = run / "stages" / "hashes.json"
        self._changed = False
        try:
            self._table = read_json_model(self._path, _HashTable)
        except (MissingFileError, DamagedFileError):  # only a cache
            self._table = _HashTable()

    def of(self, path: Path) -> str:
        """Hash of a file's content.

        Raises:
            MissingFileError: no such file.
        """
        name = str(path.absolute())
        try:
            stat = path.stat()
        except FileNotFoundError:
            return sha256(path)  # says what is missing
        known = self._table.files.get(name)
        seen = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if known is not None and (known.size, known.mtime_ns, known.inode) == seen:
            return known.sha256
        entry = _HashEntry(size=seen[0], mtime_ns=seen[1], inode=seen[2], sha256=sha256(path))
        self._table.files[name] = entry
        self._changed = True
        return entry.sha256

    def save(self) -> None:
        """Write the hashes of the files that still exist."""
        if self._changed:
            self._table.files = {name: entry for name, entry in self._table.files.items() if os.path.exists(name)}
            write_json_model(self._path, self._table)
            self._changed = False
