"""Every example runs, with less effort and smaller models than a user gives it; they use the public names alone."""

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import FluxPipeline

import adatsq_trt
from adatsq_trt.formats import FORMAT_SETS
from adatsq_trt.models import families
from examples import build_demo, new_architecture, own_policy, pipeline_in_memory, run_in_a_pipeline
from tests.tiny_checkpoints import HEIGHT, WIDTH, make_flux_pipeline

pytestmark = pytest.mark.usefixtures("small_zoo")

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
SMALL: dict[str, Any] = {
    **{"steps": 3, "beam": 2, "candidates": 2},
    **{"calibration_samples": 2, "selection_samples": 2, "held_out_samples": 2},
}
TINY: dict[str, Any] = {**SMALL, "height": HEIGHT, "width": WIDTH, "prompts": ("a cat", "two dogs")}


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return make_flux_pipeline()


def test_the_demo_is_built(tmp_path: Path) -> None:
    images = build_demo.main(tmp_path / "run", **SMALL)
    assert images.shape[0] == 2
    assert 0 <= images.min() < images.max() <= 1


def test_a_policy_by_hand_is_judged_beside_the_searched_one(tmp_path: Path) -> None:
    own, searched = own_policy.main(tmp_path, **SMALL)
    assert own > 0
    assert searched > 0


def test_a_pipeline_in_memory_gets_a_policy(pipe: FluxPipeline) -> None:
    policy = pipeline_in_memory.main(pipe, **TINY)
    assert policy.steps == 3
    assert set(policy.uniform_errors) == set(FORMAT_SETS["blackwell"])


def test_a_bundle_runs_in_the_pipeline(pipe: FluxPipeline, tmp_path: Path) -> None:
    adatsq_trt.build(pipe, target="cpu", output=tmp_path / "run", **TINY)
    pipe.set_progress_bar_config(disable=True)
    drawn = run_in_a_pipeline.main(tmp_path / "run", pipe, "a cat", height=HEIGHT, width=WIDTH, output_type="np")
    assert drawn.images.shape == (1, HEIGHT, WIDTH, 3)


def test_a_new_architecture_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", list(families.families()))
    bundle = new_architecture.main(output=tmp_path / "run", height=16, width=32, **SMALL)
    assert bundle.manifest.architecture == "LetterTransformer"
    assert bundle.summary is not None
    assert bundle.summary.mean_bits < 32
    with bundle:
        images = bundle.decode(bundle.denoise(bundle.noise([1, 2]), bundle.conditioning([0, 1])))
        assert images.shape == (2, 16, 32, 3)
        assert not np.array_equal(*bundle.denoise(bundle.noise([1, 1]), bundle.conditioning([0, 1])))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_use_the_public_names_alone(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert [alias.name for alias in node.names if alias.name.startswith("adatsq_trt.")] == []
        elif isinstance(node, ast.ImportFrom):
            assert not str(node.module).startswith("adatsq_trt")
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "adatsq_trt":
            assert node.attr in adatsq_trt.__all__
