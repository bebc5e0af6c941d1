"""`check` passes on checkpoints as people have them: every pipeline, in every type, for every kind of bundle.

Random weights in float32 are not exact in any 16-bit type, as those of the zoo are in bfloat16. Of the first three
pipelines the default run has nine of 36 cells, in which each pipeline meets each type and no two cells of a row or
column have the same bundle; of later ones it has one or two. `make test-matrix` has all.
"""

from functools import partial
from pathlib import Path

import pytest
import torch

from adatsq_trt.base_type import base_type
from adatsq_trt.checkpoints.loading import open_pipeline
from adatsq_trt.engines.accuracy import CheckReport
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.formats import FORMAT_SETS
from adatsq_trt.policy import Policy
from adatsq_trt.report.summary import Summary
from adatsq_trt.settings import PipelineSettings
from adatsq_trt.stages import bundle as bundle_stage
from tests import tiny_ltx
from tests.tiny_checkpoints import (
    HEIGHT,
    WIDTH,
    make_fill_pipeline,
    make_flux_pipeline,
    make_kontext_pipeline,
    make_wan_image_pipeline,
    make_wan_pipeline,
    make_z_image_pipeline,
)
from tests.tiny_chroma import make_chroma_pipeline
from tests.tiny_flux_2 import make_flux_2_pipeline, make_klein_pipeline
from tests.tiny_hunyuan_video import make_hunyuan_video_pipeline
from tests.tiny_qwen_image import make_qwen_image_pipeline
from tests.tiny_qwen_image_edit import SIDE, make_edit_pipeline, make_edit_plus_pipeline
from tests.tiny_stable_diffusion_3 import make_stable_diffusion_3_pipeline

STEPS = 2
PROMPTS = ("a red and green", "three")
LTX_SIZE = (tiny_ltx.HEIGHT, tiny_ltx.WIDTH, tiny_ltx.FRAMES)
PIPELINES = {
    "flux": make_flux_pipeline,
    "z-image": partial(make_z_image_pipeline, heads=6),
    "wan": make_wan_pipeline,
    "qwen-image": make_qwen_image_pipeline,
    "stable-diffusion-3": make_stable_diffusion_3_pipeline,
    "hunyuan-video-15": make_hunyuan_video_pipeline,
    "flux-kontext": make_kontext_pipeline,
    "flux-fill": make_fill_pipeline,
    "wan-image-to-video": make_wan_image_pipeline,
    "qwen-image-edit": make_edit_pipeline,
    "qwen-image-edit-plus": make_edit_plus_pipeline,
    "flux-2": make_flux_2_pipeline,
    "flux-2-klein": make_klein_pipeline,
    "chroma": make_chroma_pipeline,
    "ltx": tiny_ltx.make_ltx_pipeline,
}
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What is built → its options and the formats that take turns in the policy.
BUNDLES = {
    # Without plans there is no store of weights beside them, as layout `shared` has it.
    "sm89": (("--target", "sm89", "--layout", "embedded"), FORMAT_SETS["ada"]),
    "sm120": (("--target", "sm120", "--layout", "embedded"), FORMAT_SETS["blackwell"]),
    "cpu": (("--target", "cpu"), FORMAT_SETS["cpu"]),
    "plugin": (("--layout", "plugin", "--formats", "hopper"), FORMAT_SETS["hopper"]),
}
SQUARE = {
    ("flux", "float32", "sm120"),
    ("flux", "float16", "plugin"),
    ("flux", "bfloat16", "cpu"),
    ("z-image", "float32", "cpu"),
    ("z-image", "float16", "sm89"),
    ("z-image", "bfloat16", "sm120"),
    ("wan", "float32", "plugin"),
    ("wan", "float16", "sm120"),
    ("wan", "bfloat16", "sm89"),
    ("qwen-image", "float32", "cpu"),
    ("qwen-image", "bfloat16", "sm120"),
    ("stable-diffusion-3", "bfloat16", "sm120"),
    ("hunyuan-video-15", "bfloat16", "sm120"),
    ("flux-kontext", "bfloat16", "sm120"),
    ("flux-fill", "bfloat16", "cpu"),
    ("wan-image-to-video", "bfloat16", "sm120"),
    ("qwen-image-edit", "bfloat16", "sm120"),
    ("flux-2", "bfloat16", "sm120"),
    ("flux-2-klein", "float32", "cpu"),
    ("chroma", "bfloat16", "sm120"),
    ("ltx", "bfloat16", "sm120"),
}
CELLS = [
    pytest.param(*cell, id="-".join(cell), marks=() if cell in SQUARE else pytest.mark.matrix)
    for cell in ((pipeline, dtype, bundle) for pipeline in PIPELINES for dtype in TYPES for bundle in BUNDLES)
]


def save(folder: Path, pipeline: str, dtype: str) -> PipelineSettings:
    """A checkpoint as diffusers saves it, and what is drawn."""
    pipe = PIPELINES[pipeline]()
    pipe.transformer.to(TYPES[dtype])
    pipe.save_pretrained(folder)
    frames = 5 if pipeline.startswith(("wan", "hunyuan")) else None
    height, width = (SIDE, SIDE) if "edit" in pipeline else (HEIGHT, WIDTH)
    if pipeline == "ltx":
        height, width, frames = LTX_SIZE
    return PipelineSettings(path=str(folder), height=height, width=width, frames=frames, prompts=PROMPTS)


def write_policy(path: Path, settings: PipelineSettings, formats: tuple[str, ...]) -> None:
    """Formats take turns by layer and step, so that each meets every kind of layer."""
    model = open_pipeline(settings).outline
    layers = tuple(model.adapter.quantizable_layers())
    rows = [tuple(formats[(i + step) % len(formats)] for i in range(len(layers))) for step in range(STEPS)]
    Policy.from_steps(model.name, model.weights_sha256, layers, rows).save(path)


@pytest.mark.parametrize(("pipeline", "dtype", "bundle"), CELLS)
def test_check_passes(cli, tmp_path: Path, monkeypatch, pipeline: str, dtype: str, bundle: str) -> None:
    if bundle != "plugin":  # which compiles nothing, but writes the commands that do
        monkeypatch.setattr(bundle_stage, "_plans", lambda *_: ())  # the check runs none
    options, formats = BUNDLES[bundle]
    settings, policy, run = save(tmp_path / "saved", pipeline, dtype), tmp_path / "policy.json", tmp_path / "run"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    write_policy(policy, settings, formats)
    canvas = ("--height", str(settings.height), "--width", str(settings.width))
    canvas += ("--frames", str(settings.frames)) if settings.frames else ()
    drawn = (*canvas, "--prompts", prompts, *cli.small, "--steps", str(STEPS))
    built = cli("build", "engine", settings.path, *options, *drawn, "--policy", policy, "--output", run)
    assert built.code == 0, built.err
    ended = cli("check", run, "--json")
    assert ended.code == 0, ended.err
    report = CheckReport.model_validate_json(ended.out)
    opened = BundleFiles.open(run)
    alone = [row for row in report.rows if row.separated and row.layer is not None]
    assert {row.layer for row in alone} == set(opened.policy.layers)
    assert {row.format for row in alone} == set(formats)
    assert {row.variant for row in report.rows} >= ({"cpu", "target"} if bundle.startswith("sm") else {"cpu"})

    summary = Summary.model_validate_json((run / "summary.json").read_text(encoding="utf-8"))
    declared = base_type(opened.manifest.targets, formats, simulate=False)
    assert summary.base_type == opened.manifest.base_type == declared
    exact = declared in (dtype, "float32")
    assert summary.rounding_error is not None
    assert (summary.rounding_error == 0) == exact
    assert summary.rounding_error < 1e-3
    told = f"{declared} holds the checkpoint's weights" if exact else f"checkpoint's weights to {declared} costs"
    assert told in " ".join(built.out.split())
