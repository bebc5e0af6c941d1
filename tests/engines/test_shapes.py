"""A bundle of several sizes: what its records say, what it refuses, and an unmodified FluxPipeline at each size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.numpy import load_file, save_file

from adatsq_trt.engines.backends.base import BatchRange, Profile
from adatsq_trt.engines.bundle import POSITIONS_NAME, BundleFiles, Manifest, PlanFile
from adatsq_trt.engines.plugin_commands import optimization_profiles
from adatsq_trt.engines.runtime import Bundle, Conditioning
from adatsq_trt.engines.transformer import AdatsqTransformer
from adatsq_trt.errors import DamagedFileError, MismatchError, UserError
from adatsq_trt.graph_index import GraphFile, TensorSignature
from tests.tiny_bundle import STEPS
from tests.tiny_pipeline import make_adapter, make_sized_bundle

OWN, WIDE, LARGE = (8, 8), (4, 16), (10, 12)  # pixels; the first two have as many tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sized_bundle(tmp_path_factory.mktemp("sizes") / "bundle", (2, 8), (5, 6)).folder


@pytest.fixture
def bundle(folder: Path) -> Bundle:
    return Bundle.open(folder)


# ------------------------------------------------------------------------------------------------- the records


def test_the_manifest_lists_the_shapes(bundle: Bundle) -> None:
    assert bundle.sizes == (OWN, WIDE, LARGE)
    assert bundle.manifest.shape() == bundle.manifest.shape(OWN) == bundle.manifest.shapes[0]
    assert bundle.manifest.shape(LARGE).latent_shape == (30, 4)
    assert [bundle.manifest.profiles_of(shape) for shape in bundle.manifest.shapes] == [
        range(2),
        range(2, 4),
        range(4, 6),
    ]


def test_a_call_gets_the_tightest_profile_of_its_size() -> None:
    rows = (2, 8, 2, 4)
    plan = PlanFile(target="sm120", assignment=0, path="a.plan", bytes=1, max_rows=8, profile_rows=rows)
    assert [plan.profile(rows, range(2)) for rows in (1, 2, 3, 8)] == [0, 0, 1, 1]
    assert [plan.profile(rows, range(2, 4)) for rows in (2, 3)] == [2, 3]
    assert (plan.rows_at(range(2)), plan.rows_at(range(2, 4)), plan.rows_at()) == (8, 4, 8)


def test_a_manifest_whose_first_shape_is_another_is_refused(bundle: Bundle) -> None:
    values = bundle.manifest.model_dump()
    values["shapes"] = values["shapes"][::-1]
    with pytest.raises(ValueError, match="the first of 'shapes' differs from the bundle's own size"):
        Manifest.model_validate(values)
    values["shapes"] = values["shapes"][::-1]
    plan = PlanFile(target="sm120", assignment=0, path="a.plan", bytes=1, max_rows=8, profile_rows=(8,))
    with pytest.raises(ValueError, match=r"plan 'a.plan' has 1 profiles, 'shapes' 6"):
        Manifest.model_validate({**values, "plans": [plan.model_dump()]})
    values["shapes"] = ({**bundle.manifest.shapes[0].model_dump(), "latent_shape": (30, 4)},)
    with pytest.raises(ValueError, match="a latent has 120 elements, its image 64"):
        Manifest.model_validate(values)


def test_plugin_commands_have_every_size_for_every_assignment() -> None:
    batched = TensorSignature(name="x", dtype="bfloat16", shape=("batch", "tokens", 4))
    graph = GraphFile(
        path="plugin.target.onnx",
        variant="target",
        assignment=None,
        inputs=(batched, TensorSignature(name="time", dtype="float", shape=("batch",))),
        position_inputs=(TensorSignature(name="rotations", dtype="float", shape=("tokens", 8)),),
        outputs=(batched,),
        scale_inputs={},
        selector_input=TensorSignature(name="selector", dtype="int32", shape=(1, "assignment")),
    )
    sizes = [Profile(1, n, n, (("x", (0, t, 4)), ("rotations", (t, 8)))) for n, t in ((2, 16), (8, 16), (1, 30))]
    profiles = optimization_profiles(graph, 2, BatchRange.of_sizes(sizes))
    assert [shapes[2]["selector"] for shapes in profiles] == [(1, 1)] * 3 + [(1, 2)] * 3
    least, _, most = profiles[4]
    assert least == {"x": (1, 16, 4), "time": (1,), "rotations": (16, 8), "selector": (1, 2)}
    assert most == {"x": (8, 16, 4), "time": (8,), "rotations": (16, 8), "selector": (1, 2)}


# ------------------------------------------------------------------------------------------------- running it


@pytest.mark.parametrize("size", [OWN, WIDE, LARGE])
def test_full_precision_is_the_model_at_that_size(bundle: Bundle, size: tuple[int, int]) -> None:
    """One step against PyTorch; sizes with as many tokens differ by their positions only."""
    model = make_adapter().resized(make_adapter().image.resized(size[0] // 2, size[1] // 2))
    model.trace_module().text_ids = torch.zeros(8, 3)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.copy_(parameter.bfloat16())  # as the bundle holds them
    inputs = bundle.step_inputs(1, bundle.noise([1, 2], size), bundle.conditioning([0, 3]), 2.0, size)
    with torch.no_grad():
        wanted = model.predict({name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()
    got = bundle.predict(1, inputs, quantized=False, size=size)
    assert np.linalg.norm(got - wanted) < 1e-5 * np.linalg.norm(wanted)
    if size == WIDE:
        assert np.linalg.norm(bundle.predict(1, inputs, quantized=False) - wanted) > 1e-3 * np.linalg.norm(wanted)
    assert bundle.decode(bundle.noise([1], size), size).shape == (1, *size, 1)


def test_other_sizes_are_refused_before_anything_is_loaded(bundle: Bundle) -> None:
    message = r"size 24x24: the bundle has 8x8, 4x16, 10x12; choose among these"
    condition, noise = bundle.conditioning([0]), bundle.noise([1], LARGE)
    for refused in (
        lambda: bundle.noise([1], (24, 24)),
        lambda: bundle.decode(noise, (24, 24)),
        lambda: bundle.denoise(noise, condition, size=(24, 24)),
    ):
        with pytest.raises(MismatchError, match=message):
            refused()
    with pytest.raises(UserError, match=r"'hidden_states': got float32 \[1, 30, 4\], expected .* 16, 4\]"):
        bundle.denoise(noise, condition)
    assert not bundle._runners


def test_a_bundle_of_one_size_says_so(tiny_bundle: BundleFiles) -> None:
    with pytest.raises(MismatchError, match="size 8x8: the bundle has one size only, which needs no name"):
        tiny_bundle.manifest.shape((8, 8))


def test_positions_of_another_shape_are_refused(folder: Path) -> None:
    files = BundleFiles.open(folder)
    stored = load_file(folder / POSITIONS_NAME)
    kept = (folder / POSITIONS_NAME).read_bytes()
    try:
        save_file({**stored, "10x12.rotations": stored["10x12.rotations"][:, :3].copy()}, folder / POSITIONS_NAME)
        with pytest.raises(DamagedFileError, match=r"'10x12\.rotations': got float32 \[30, 3\]"):
            files.positions(files.graph("cpu", None), LARGE)
    finally:
        (folder / POSITIONS_NAME).write_bytes(kept)


# --------------------------------------------------------------------------------------- in a diffusers pipeline


@pytest.mark.parametrize("size", [OWN, WIDE, LARGE])
def test_a_pipeline_draws_every_size(folder: Path, bundle: Bundle, size: tuple[int, int]) -> None:
    got = run_pipeline(folder, bundle, size)
    wanted = bundle.denoise(
        bundle.noise([1, 2], size), Conditioning(bundle.conditioning([4, 5]).conditional), size=size
    )
    assert np.linalg.norm(got - wanted) < 1e-4 * np.linalg.norm(wanted)


def test_a_pipeline_is_told_which_sizes_there_are(folder: Path, bundle: Bundle) -> None:
    with pytest.raises(MismatchError, match=r"got 24 image tokens.*4 x 4 and 2 x 8 and 5 x 6.*8x8, 4x16, 10x12"):
        run_pipeline(folder, bundle, (8, 12), np.zeros((2, 24, 4), np.float32))


def run_pipeline(folder: Path, bundle: Bundle, size: tuple[int, int], noise: np.ndarray | None = None) -> np.ndarray:
    """Latents of two samples, without guidance; the pipeline calls a pixel of ours eight."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(bundle.manifest.schedule.scheduler_config)
    pipe = FluxPipeline(scheduler, None, None, None, None, None, make_adapter().transformer)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = AdatsqTransformer.from_bundle(folder)
    condition = bundle.conditioning([4, 5]).conditional
    return pipe(
        prompt_embeds=torch.from_numpy(condition["encoder_hidden_states"]),
        pooled_prompt_embeds=torch.from_numpy(condition["pooled_projections"]),
        latents=torch.from_numpy(bundle.noise([1, 2], size) if noise is None else noise),
        height=8 * size[0],
        width=8 * size[1],
        num_inference_steps=STEPS,
        output_type="latent",
    ).images.numpy()
