"""Files that appear whole or not at all, and readers that say what is wrong with a file.

JSON carries a schema version; tensors are safetensors. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from adatsq_trt.errors import DamagedFileError, MissingFileError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

ModelT = TypeVar("ModelT", bound=BaseModel)
_CHUNK_BYTES = 1 << 20
# Parsed JSON takes many times its size.
MAX_JSON_BYTES = 1 << 26


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; on success sync it and rename it to `path`, on failure remove it.

    Raises:
        OutputError: the folder cannot be written or is full.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write '{path}': {error.strerror or error}; choose a folder that is writable and has room"
        ) from error
    finally:
        _remove_quietly(temporary)


def _remove_quietly(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # the folder is not writable, so nothing was left in it


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json_model(path: Path, model: BaseModel) -> None:
    """Write a pydantic model as indented JSON; the same model gives the same bytes."""
    write_bytes(path, (model.model_dump_json(indent=2) + "\n").encode())


def read_json_model(path: Path, kind: type[ModelT], advice: str | None = None) -> ModelT:
    """Read a pydantic model.

    Args:
        path: of the file.
        kind: the model's class.
        advice: next step for the user, in messages about a bad file; None for a file that a stage writes.

    Raises:
        MissingFileError: no such file.
        DamagedFileError: too large, not JSON, truncated, of another schema version, or with wrong fields.
    """
    try:
        text = _read_text(path)
    except FileNotFoundError as error:
        todo = advice or "run the stage that writes it, or check the path"
        raise MissingFileError(f"'{path}' does not exist; {todo}") from error
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"'{path}' cannot be read as text: {error}; {advice or 'write it again'}") from error
    return parse_json_model(text, str(path), kind, advice)


def _read_text(path: Path) -> str:
    """A file's text; no more of it than may be parsed, also where it never ends."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES} bytes")
    return content.decode("utf-8")


def parse_json_model(text: str, source: str, kind: type[ModelT], advice: str | None = None) -> ModelT:
    """Read a pydantic model from text.

    Args:
        text: content of a file.
        source: the file, as messages name it.
        kind: the model's class.
        advice: next step for the user, in messages about a bad file; None for a file that a stage writes.

    Raises:
        DamagedFileError: not JSON, truncated, of another schema version, with wrong fields or a number without end.
    """
    _require_schema(source, text, kind, advice)
    todo = advice or "delete it and run the stage again"
    try:
        model = kind.model_validate_json(text)
    except ValidationError as error:
        raise DamagedFileError(f"'{source}' is not a valid {kind.__name__}: {_complaint(error)}; {todo}") from error
    for where, number in _infinities(model.model_dump()):
        raise DamagedFileError(
            f"'{source}' is not a valid {kind.__name__}: {where}: got {number}, expected a finite number; {todo}"
        )
    return model


def _infinities(value: object, where: str = "") -> Iterator[tuple[str, float]]:
    """Numbers that are infinite or none, with their places; pydantic reads them, and JSON cannot say them."""
    if isinstance(value, float) and not math.isfinite(value):
        yield where.removeprefix("."), value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _infinities(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _infinities(item, f"{where}.{index}")


def _complaint(error: ValidationError) -> str:
    """Where a file is wrong first, what is there, and what was expected."""
    first = error.errors()[0]
    where, value = ".".join(str(part) for part in first["loc"]) or "the file", first["input"]
    got = "" if isinstance(value, dict | list) else f"got {reprlib.repr(value)}: "
    return f"{where}: {got}{first['msg'].removeprefix('Value error, ')}"


def _require_schema(source: str, text: str, kind: type[BaseModel], advice: str | None) -> None:
    """Say "schema version" when that is what is wrong, before anything else is looked at."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        todo = advice or "delete it and run the stage that writes it again"
        raise DamagedFileError(f"'{source}' is not complete JSON ({error}); {todo}") from error
    field = kind.model_fields.get("schema_version")
    if field is None:
        return
    got = content.get("schema_version") if isinstance(content, dict) else None
    if got != field.default:
        todo = advice or "use the version that wrote it or a new run directory"
        raise DamagedFileError(
            f"'{source}' has schema version {got}, this version of adatsq-trt reads {field.default}; {todo}"
        )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        try:
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
        except SafetensorError as error:  # how the library reports a full disk
            raise OSError(str(error)) from error


def read_tensors(path: Path, advice: str | None = None) -> dict[str, Tensor]:
    """Read safetensors.

    Args:
        path: of the file.
        advice: next step for the user, in messages about a bad file; None for a file that a stage writes.

    Raises:
        MissingFileError: no such file.
        DamagedFileError: truncated or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _require_file(path, advice)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise _incomplete_tensors(path, advice, error) from error


class MappedTensors(Mapping[str, "Tensor"]):
    """Tensors of safetensors files that may be larger than memory.

    Every lookup maps the tensor's file anew, so its pages leave memory together with the tensor.
    """

    def __init__(self, files: Iterable[Path], advice: str | None = None, prefix: str = "") -> None:
        """Read the headers.

        Args:
            files: no name is in two of them.
            advice: next step for the user, in messages about a bad file; None for a file that a stage writes.
            prefix: of the tensors that are wanted, whose names here are without it.

        Raises:
            MissingFileError: no such file.
            DamagedFileError: truncated or not safetensors.
        """
        self._advice, self._prefix = advice, prefix
        self._places: dict[str, Path] = {}
        for path in files:
            with _opened_tensors(path, advice) as opened:
                names = (name.removeprefix(prefix) for name in opened.keys() if name.startswith(prefix))  # noqa: SIM118
                self._places |= dict.fromkeys(names, path)

    def __getitem__(self, name: str) -> Tensor:
        """One tensor; its pages are read when they are used."""
        with _opened_tensors(self._places[name], self._advice) as opened:
            return opened.get_tensor(f"{self._prefix}{name}")  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._places)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._places)


@contextmanager
def _opened_tensors(path: Path, advice: str | None) -> Iterator[Any]:
    """A safetensors file, its header read.

    Raises:
        MissingFileError: no such file.
        DamagedFileError: truncated or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    _require_file(path, advice)
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (SafetensorError, ValueError, OSError) as error:
        raise _incomplete_tensors(path, advice, error) from error


def _require_file(path: Path, advice: str | None) -> None:
    if not path.is_file():
        raise MissingFileError(
            f"'{path}' does not exist; {advice or 'run the stage that writes it, or check the path'}"
        )


def _incomplete_tensors(path: Path, advice: str | None, error: Exception) -> DamagedFileError:
    todo = advice or "delete it and run the stage that writes it again"
    return DamagedFileError(f"'{path}' is not a complete safetensors file ({error}); {todo}")


def sha256(path: Path) -> str:
    """Hash of a file's content, hexadecimal.

    Raises:
        MissingFileError: no such file.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except FileNotFoundError as error:
        raise MissingFileError(f"'{path}' does not exist; run the stage that writes it again") from error
    return digest.hexdigest()
