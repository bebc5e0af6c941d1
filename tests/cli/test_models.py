"""The list of shipped models."""

import json

import pytest
import typer
from typer.testing import CliRunner

from adatsq_trt.cli.models import models
from adatsq_trt.errors import DamagedFileError
from adatsq_trt.zoo import list_models


def test_digits_flux_ships_with_weights_of_at_most_two_megabytes() -> None:
    row = {row.name: row for row in list_models()}["digits-flux"]
    assert row.architecture == "FluxTransformer2DModel"
    assert (row.image_size, row.default_steps, row.default_guidance) == (8, 20, 2.0)
    assert 0 < row.weight_bytes <= 2_000_000


def test_command_prints_a_table_or_json() -> None:
    app = typer.Typer()
    app.command()(models)
    assert "digits-flux" in CliRunner().invoke(app, []).output
    listed = json.loads(CliRunner().invoke(app, ["--json"]).output)
    assert [row["name"] for row in listed] == [row.name for row in list_models()]


def test_a_damaged_index_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text('{"image_size": 8')
    monkeypatch.setattr("adatsq_trt.zoo.ZOO_FOLDER", tmp_path)
    with pytest.raises(DamagedFileError, match="model_index"):
        list_models()
