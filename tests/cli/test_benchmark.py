"""`benchmark bundle`: its table, its files and what it refuses."""

import json
from pathlib import Path

import pytest

from adatsq_trt.engines.benchmark import BundleTimings
from tests.engines.conftest import make_bundle


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("tiny") / "bundle").folder


def test_command(cli, tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "timings.json"
    ended = cli("benchmark", "bundle", tiny_bundle, "--rounds", "1", "--output", file)
    assert ended.code == 0, ended.err
    assert "assignment 2" in ended.out
    written = BundleTimings.model_validate_json(file.read_text())
    assert len(written.timings) == 5
    printed = cli("benchmark", "bundle", tiny_bundle, "--rounds", "1", "--json")
    assert len(json.loads(printed.out)["timings"]) == 5


def test_what_is_no_bundle_is_refused(cli, tmp_path: Path) -> None:
    refusal = cli("benchmark", "bundle", tmp_path, "--output", tmp_path / "timings.json").refusal
    assert "is not a bundle and holds none" in refusal
    assert list(tmp_path.iterdir()) == []
