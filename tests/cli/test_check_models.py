"""`check` passes on every model of the zoo, for every kind of bundle, with every format that the target has.

test_seeded_defects.py has the same for one small model, in the default run.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from adatsq_trt import zoo
from adatsq_trt.engines.accuracy import CheckReport
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.formats import FORMAT_SETS
from adatsq_trt.policy import Policy
from adatsq_trt.stages import bundle as bundle_stage
from adatsq_trt.zoo import zoo_models
from adatsq_trt.zoo.loading import TRANSFORMER_WEIGHTS, load_model

STEPS = 3
# What is built → its options and the formats that take turns in the policy.
BUNDLES = {
    "sm120": (("--target", "sm120"), FORMAT_SETS["blackwell"]),
    "cpu": (("--target", "cpu"), FORMAT_SETS["cpu"]),
    "plugin": (("--layout", "plugin", "--formats", "hopper"), FORMAT_SETS["hopper"]),
}


@pytest.fixture(scope="module")
def small_zoo() -> None:
    """Models are whole here."""


def write_policy(path: Path, name: str, formats: tuple[str, ...]) -> None:
    """Formats take turns by layer and step, so that each meets every kind of layer."""
    model = load_model(name)
    layers = tuple(model.adapter.quantizable_layers())
    rows = [tuple(formats[(i + step) % len(formats)] for i in range(len(layers))) for step in range(STEPS)]
    Policy.from_steps(name, model.weights_sha256, layers, rows).save(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUNDLES)
@pytest.mark.parametrize("model", zoo_models())
def test_every_model_passes(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, kind: str) -> None:
    if kind != "plugin":  # which compiles nothing, but writes the commands that do
        monkeypatch.setattr(bundle_stage, "_plans", lambda *_: ())  # the check runs none
    options, formats = BUNDLES[kind]
    policy, run = tmp_path / "policy.json", tmp_path / "run"
    write_policy(policy, model, formats)
    small = (*cli.small, "--steps", str(STEPS))
    built = cli("build", "engine", model, *options, *small, "--policy", policy, "--output", run)
    assert built.code == 0, built.err
    ended = cli("check", run, "--json")
    assert ended.code == 0, ended.err
    report = CheckReport.model_validate_json(ended.out)
    bundle = BundleFiles.open(run)
    alone = [row for row in report.rows if row.separated and row.layer is not None]
    assert {row.layer for row in alone} == set(bundle.policy.layers)
    assert {row.format for row in alone} == set(formats)
    assert json.loads((run / "check" / "check.json").read_text())["passed"]


def write_disturbed(folder: Path, name: str, dtype: torch.dtype) -> None:
    """A trained model whose weights lie between the numbers of bfloat16: each is off by up to a quarter of a step."""
    shutil.copytree(zoo.find_model(name), folder)
    generator, file = torch.Generator().manual_seed(0), folder / TRANSFORMER_WEIGHTS
    tensors = {
        key: (value.float() * (1 + 2.0**-10 * torch.rand(value.shape, generator=generator))).to(dtype)
        for key, value in read_tensors(file).items()
    }
    write_tensors(file, tensors)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("model", ["digits-flux", "scenes-flux-schnell"])
def test_trained_weights_that_bfloat16_does_not_hold_pass(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, dtype: torch.dtype
) -> None:
    write_disturbed(tmp_path / "zoo" / model, model, dtype)
    monkeypatch.setattr(zoo, "ZOO_FOLDER", tmp_path / "zoo")
    monkeypatch.setattr(bundle_stage, "_plans", lambda *_: ())
    policy, run = tmp_path / "policy.json", tmp_path / "run"
    write_policy(policy, model, FORMAT_SETS["blackwell"])
    small = ("--target", "sm120", *cli.small, "--steps", str(STEPS))
    built = cli("build", "engine", model, *small, "--policy", policy, "--output", run)
    assert built.code == 0, built.err
    assert cli("check", run).code == 0
    assert json.loads((run / "summary.json").read_text())["rounding_error"] > 0
