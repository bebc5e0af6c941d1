"""Tools of all writers of model repositories: names, templates, and folders that appear whole or not at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from string import Template
from tempfile import mkdtemp

from adatsq_trt.engines.triton_server.parameters import cut
from adatsq_trt.errors import OutputError, UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Give a folder to write to, which becomes `output` on success and is removed on failure.

    Raises:
        OutputError: `output` exists or cannot be written.
    """
    if output.exists():
        raise OutputError(f"'{output}' exists; pass another --output, or remove it first")
    scratch = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        yield scratch
        scratch.chmod(0o755)
        scratch.rename(output)
    except OSError as error:
        raise OutputError(
            f"cannot write '{output}': {error.strerror or error}; choose a folder that is writable and has room"
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def require_names(names: Sequence[str]) -> None:
    """Refuse names of models that the server does not take.

    Raises:
        UserError: says which.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(f"--name '{cut(name)}': expected letters, digits, '_', '.' and '-'; choose such a name")
        if names.count(name) > 1:
            raise UserError(f"two models would be served as '{cut(name)}'; give each bundle a --name of its own")


def fill(template: str, values: Mapping[str, object]) -> str:
    """One of the templates with its placeholders replaced."""
    text = files("adatsq_trt.engines.triton_server").joinpath("templates", template).read_text(encoding="utf-8")
    return Template(text).substitute(values)


def dims(shape: Sequence[int | str]) -> str:
    """Sizes in config.pbtxt, where -1 stands for any."""
    return ", ".join("-1" if isinstance(size, str) else str(size) for size in shape)
