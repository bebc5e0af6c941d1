"""`serve` on the folder of a pipeline, which is built first."""

from pathlib import Path
from typing import NoReturn

import pytest
import typer

from adatsq_trt import api
from adatsq_trt.checkpoints.source import INDEX
from adatsq_trt.cli.serve import _built
from adatsq_trt.errors import UserError


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    (tmp_path / INDEX).write_text("{}")
    return tmp_path


def interrupt(*_: object, **__: object) -> NoReturn:
    raise KeyboardInterrupt


def test_ctrl_c_and_help_end_as_they_do_in_a_build(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(typer.Exit) as ended:
        _built(pipeline, ["--help"])
    assert ended.value.exit_code == 0
    monkeypatch.setattr(api, "prepare", interrupt)
    with pytest.raises(typer.Exit) as ended:
        _built(pipeline, ["--target", "cpu"])
    assert ended.value.exit_code == 130


def test_what_is_built_already_takes_no_options_of_a_build(tmp_path: Path) -> None:
    assert _built(tmp_path, []) == tmp_path
    with pytest.raises(UserError, match="got '--steps' after '--'"):
        _built(tmp_path, ["--steps", "2"])
