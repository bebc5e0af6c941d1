"""The public face: what a user calls from Python, on a model of the zoo and on diffusers objects in memory."""

import hashlib
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

import adatsq_trt
from adatsq_trt import (
    BuildConfig,
    Bundle,
    CancelledError,
    MismatchError,
    MissingFileError,
    Policy,
    Progress,
    UnknownNameError,
    UserError,
)
from adatsq_trt.amounts import Amount
from tests.tiny_checkpoints import HEIGHT, WIDTH, make_flux_pipeline

pytestmark = pytest.mark.usefixtures("small_zoo")

VERBS = ("build", "calibrate", "check", "export_onnx", "load", "quantize", "search_policy")
SMALL: dict[str, Any] = {
    **{"steps": 2, "beam": 2, "candidates": 2},
    **{"calibration_samples": 2, "selection_samples": 2, "held_out_samples": 2},
}
TINY: dict[str, Any] = {**SMALL, "height": HEIGHT, "width": WIDTH, "prompts": ("a cat", "two dogs")}


def test_verbs_are_callable_after_every_submodule_was_imported() -> None:
    """Importing a submodule binds its name in the package, which would replace a function of that name."""
    for found in pkgutil.walk_packages(adatsq_trt.__path__, "adatsq_trt."):
        try:
            importlib.import_module(found.name)
        except ImportError as error:  # of a library that is not installed here
            if str(error.name).startswith("adatsq_trt"):
                raise
    assert [verb for verb in VERBS if not callable(getattr(adatsq_trt, verb))] == []
    assert set(VERBS) <= set(adatsq_trt.__all__)


def test_no_verb_has_the_name_of_a_module() -> None:
    modules = {found.name for found in pkgutil.iter_modules(adatsq_trt.__path__)}
    assert modules & set(adatsq_trt.__all__) == set()
    for name in adatsq_trt.__all__:
        assert getattr(adatsq_trt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'bild'"):
        _ = adatsq_trt.bild


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, adatsq_trt; print([n for n in ('torch', 'numpy', 'pydantic', 'diffusers') if n in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize("model", ["'digit-flux'", "'digits-flux', height=64"])
def test_a_model_that_cannot_be_is_refused_before_anything_heavy_is_imported(model: str) -> None:
    code = (
        "import sys, adatsq_trt\n"
        f"try:\n    adatsq_trt.build({model}, target='cpu')\n"
        "except adatsq_trt.UserError:\n    print([name for name in ('torch', 'diffusers') if name in sys.modules])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": -1}, "--beam: got -1, expected at least 0"),
        ({"beam": 1.5}, "--beam: got 1.5, expected a whole number"),
        ({"steps": True}, "--steps: got True, expected a whole number"),
        ({"layout": "shred"}, "unknown --layout 'shred'; did you mean 'shared'?"),
        ({"guidance": float("nan")}, "--guidance: got nan, expected a finite number"),
        ({"simulate": 1}, "--simulate: got 1, expected true or false"),
        ({"batch": (1, 0)}, "--batch: got 0, expected at least 1"),
        ({"bean": 4}, "unknown option 'bean'; did you mean 'beam'?"),
        ({"target": "cpu", "budget_size": "many"}, "--budget-size 'many': expected a size"),
        ({"target": "cpu", "budget_ms": 3.0}, "--budget-ms is now --budget-speed, which"),
        ({"target": "cpu", "budget_speed": 3.0}, "--budget-speed '3.0': expected a speed against 16 bits such as 1.8x"),
        ({"target": "sm121x"}, "unknown target 'sm121x'"),
        ({"target": ("sm120", "cpu")}, "accelerate no format of their sets in common"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        adatsq_trt.build("digits-flux", output=tmp_path / "run", **options)
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_configuration_is_a_value() -> None:
    config = BuildConfig(target=["sm120", "sm120"], lora="a.safetensors", batch=4)
    assert (config.targets, config.loras, config.batches) == (("sm120",), ("a.safetensors",), (4,))
    assert BuildConfig(memory_limit="12GB").limit_bytes == 12e9
    assert BuildConfig(budget_size=5000).size == Amount(5000.0, relative=False)
    assert BuildConfig(budget_size="0.3x", budget_speed="12ms").size == Amount(0.3, relative=True)


# ------------------------------------------------------------------------------------- a model of the zoo


@pytest.fixture(scope="module")
def seen() -> list[Progress]:
    """What a callback was told."""
    return []


@pytest.fixture(scope="module")
def bundle(seen: list[Progress], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The snippet of the README, in small."""
    run = tmp_path_factory.mktemp("api") / "run"
    return adatsq_trt.build("digits-flux", target="cpu", output=run, progress=seen.append, **SMALL)


def test_a_build_is_a_bundle_with_its_figures(bundle: Bundle, seen: list[Progress]) -> None:
    assert bundle.summary is not None
    assert bundle.summary.mean_bits == bundle.policy.mean_bits
    assert bundle.summary.final_error > 0
    assert set(bundle.summary.stages) == {"calibrate", "quantize", "search", "export", "bundle"}
    tasks = list(dict.fromkeys(progress.task for progress in seen))
    assert tasks[0] == "calibrate: trajectory"
    assert "search: beam" in tasks
    assert [p.done for p in seen if p.task == "export"] == [*range(seen[-1].total + 1), seen[-1].total]
    assert seen[-1].ended
    images = bundle.decode(bundle.denoise(bundle.noise([7]), bundle.conditioning([3])))
    assert images.shape[0] == 1


def test_a_bundle_is_loaded_checked_and_saved(bundle: Bundle, tmp_path: Path) -> None:
    run = bundle.path.parent
    loaded = adatsq_trt.load(run)
    assert loaded.summary == bundle.summary
    report = adatsq_trt.check(loaded, output=tmp_path / "check")
    assert report.passed
    assert (tmp_path / "check" / "check.json").is_file()
    copy = adatsq_trt.load(bundle.save(tmp_path / "copy"))
    assert copy.summary is None
    assert copy.policy == bundle.policy
    with pytest.raises(UserError, match="exists already"):
        bundle.save(tmp_path / "copy")
    with pytest.raises(MissingFileError):
        adatsq_trt.load(tmp_path)


def test_verbs_go_on_in_one_run_directory(bundle: Bundle) -> None:
    """What the build has done is done for the single verbs too."""
    common: dict[str, Any] = {"target": "cpu", "output": bundle.path.parent, **SMALL}
    again: list[Progress] = []
    calibration = adatsq_trt.calibrate("digits-flux", progress=again.append, **common)
    steps, layers = 2, len(calibration.layers)
    assert calibration.information.shape == calibration.temporal_weights.shape == (steps, layers)
    assert calibration.latents.shape[:2] == (steps + 1, 2)
    weights = adatsq_trt.quantize("digits-flux", progress=again.append, **common)
    assert weights.formats == ("w8a8s", "w8a32", "fp32")
    layer = weights.layers[0]
    exact, rounded = weights.weight(layer, "fp32"), weights.weight(layer, "w8a8s")
    assert 0 < float((exact - rounded).norm() / exact.norm()) < 0.02
    policy = adatsq_trt.search_policy("digits-flux", progress=again.append, **common)
    assert isinstance(policy, Policy)
    assert Policy(**policy.model_dump()) == bundle.policy
    assert bundle.summary is not None
    assert policy.error == bundle.summary.final_error
    assert policy.uniform_errors == bundle.summary.uniform_errors
    graphs = adatsq_trt.export_onnx("digits-flux", progress=again.append, **common)
    file, about = graphs.graph("cpu", 0)
    assert file.is_file()
    assert about.variant == "cpu"
    assert again == []


def test_a_policy_of_one_s_own_is_built(bundle: Bundle, tmp_path: Path) -> None:
    policy = bundle.policy
    rows = [["fp32"] * len(policy.layers), ["w8a8s"] * len(policy.layers)]
    own = Policy.from_steps(policy.model, policy.weights_sha256, policy.layers, rows)
    built = adatsq_trt.build("digits-flux", target="cpu", policy=own, **SMALL)
    assert built.policy == own
    folder = built.path
    assert folder.is_dir()
    del built  # the temporary run directory goes with the last object that knows it
    assert not folder.exists()


def test_excluded_layers_stay_in_full_precision(bundle: Bundle, tmp_path: Path) -> None:
    pattern = "transformer_blocks.0.*"
    common: dict[str, Any] = {"target": "cpu", "output": tmp_path / "run", **SMALL}
    built = adatsq_trt.build("digits-flux", exclude=(pattern, "*.proj_out"), **common)
    left = [n for n in bundle.policy.layers if not n.startswith("transformer_blocks.0.") and not n.endswith("proj_out")]
    assert 0 < len(left) < len(bundle.policy.layers)
    assert list(built.policy.layers) == left
    assert adatsq_trt.check(built, output=tmp_path / "check").passed
    assert len(adatsq_trt.calibrate("digits-flux", exclude=pattern, **common).layers) > len(left)
    with pytest.raises(UserError) as refused:
        adatsq_trt.build("digits-flux", exclude="transformer_blocks.9.*", **common)
    assert "--exclude 'transformer_blocks.9.*': no layer of model 'digits-flux' has such a name" in str(refused.value)
    assert "the nearest are transformer_blocks." in str(refused.value)
    with pytest.raises(UserError, match="no layer is left to quantize"):
        adatsq_trt.build("digits-flux", exclude="*", **common)


def test_some_layers_have_the_formats_that_they_may_have(tmp_path: Path) -> None:
    common: dict[str, Any] = {"target": "sm120", "formats": "nvfp4,fp8,bf16", "output": tmp_path / "run", **SMALL}
    where = ("single_*=fp8,bf16", "*.proj_out=bf16", "transformer_blocks.0.*=nvfp4")
    policy = adatsq_trt.search_policy("digits-flux", formats_for=where, budget_bits=14, **common)
    assert {name for row in policy.assignments for name in row} >= {"nvfp4", "bf16"}
    for layer, names in zip(policy.layers, zip(*policy.assignments, strict=True), strict=True):
        if layer.startswith("transformer_blocks.0."):
            assert set(names) == {"nvfp4"}, layer
        elif layer.endswith("proj_out"):
            assert set(names) == {"bf16"}, layer
        elif layer.startswith("single_"):
            assert set(names) <= {"fp8", "bf16"}, layer
    assert set(policy.uniform_errors) == {"nvfp4", "fp8", "bf16"}  # for comparison
    with pytest.raises(
        MismatchError, match=r"--policy gives layer '.*' the format nvfp4, --formats-for leaves it bf16"
    ):
        adatsq_trt.search_policy("digits-flux", formats_for="transformer_blocks.0.*=bf16", policy=policy, **common)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("transformer_blocks.9.*=fp8", r"--formats-for 'transformer_blocks.9.*': no layer .*; the nearest are transf"),
        ("*=fp9", "unknown format or format set 'fp9'"),
        ("*=w8a8s", "w8a8s is none of the candidates, which are nvfp4, fp8, bf16; add it to --formats"),
        ("*.to_q", r"expected PATTERN=FORMATS"),
        (("*.to_q=fp8", "*.attn.*=bf16"), r"with the others it leaves layer '.*to_q' no format"),
        ("*=bf16", "the cheapest is that with the cheapest format that each layer may have with a mean of 16 bits"),
    ],
)
def test_restrictions_that_cannot_be_followed(tmp_path: Path, where: str | tuple[str, ...], message: str) -> None:
    options: dict[str, Any] = {"formats": "nvfp4,fp8,bf16", "budget_bits": 8.0}
    with pytest.raises(UserError, match=message):
        adatsq_trt.search_policy("digits-flux", formats_for=where, output=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


class _StopError(Exception):
    """Of a callback."""


def test_work_ends_at_the_next_unit_and_goes_on_later(tmp_path: Path) -> None:
    run, cancel = tmp_path / "run", Event()

    def stop(progress: Progress) -> None:
        if (progress.task, progress.done) == ("calibrate: Fisher information", 1):
            raise _StopError

    def set_event(progress: Progress) -> None:
        if progress.task == "calibrate: Hessians":
            cancel.set()

    common: dict[str, Any] = {"target": "cpu", "output": run, **SMALL}
    with pytest.raises(_StopError):
        adatsq_trt.calibrate("digits-flux", progress=stop, **common)
    assert (run / "calibrate" / "fisher" / "step_001.safetensors").is_file()
    with pytest.raises(CancelledError, match="cancelled in 'calibrate: Hessians'"):
        adatsq_trt.calibrate("digits-flux", progress=set_event, cancel=cancel, **common)
    seen: list[Progress] = []
    adatsq_trt.calibrate("digits-flux", progress=seen.append, **common)
    assert "calibrate: Fisher information" not in {p.task for p in seen if p.done}  # that was finished


def test_two_builds_in_two_threads_do_not_disturb_each_other(bundle: Bundle, tmp_path: Path) -> None:
    """Each gives, byte for byte, what it gives alone."""

    def build(seed: int, folder: Path) -> Bundle:
        return adatsq_trt.build("digits-flux", target="cpu", output=folder, seed=seed, **SMALL)

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(build, (0, 1), (tmp_path / "0", tmp_path / "1")))
    alone = build(1, tmp_path / "alone")
    for one, other in ((together[0], bundle), (together[1], alone)):
        assert dict(_hashes(one.path)) == dict(_hashes(other.path))
    assert together[0].policy.weights_sha256 == together[1].policy.weights_sha256


def _hashes(folder: Path) -> Iterator[tuple[str, str]]:
    """Of all files of a bundle."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield file.relative_to(folder).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest()


# --------------------------------------------------------------------------------- a pipeline in memory


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    """A tiny Flux of diffusers' own classes, as `from_pretrained` gives it."""
    pipe = make_flux_pipeline()
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        part.eval()
    return pipe


def state(pipe: FluxPipeline) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value.clone()
        for part in ("transformer", "text_encoder", "text_encoder_2", "vae")
        for name, value in getattr(pipe, part).state_dict().items()
    }


def all_modules(pipe: FluxPipeline) -> list[torch.nn.Module]:
    parts = (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae)
    return [module for part in parts for module in part.modules()]


def test_a_pipeline_in_memory_gives_what_its_folder_gives(tmp_path: Path) -> None:
    pipe = make_flux_pipeline()
    pipe.text_encoder_2.train()  # as a pipeline is that was put together by hand
    before, modules = state(pipe), [(type(m), m.training) for m in all_modules(pipe)]
    policy = adatsq_trt.search_policy(pipe, formats="w4a4,w8a8", **TINY)
    after = state(pipe)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [(type(m), m.training) for m in all_modules(pipe)] == modules
    pipe.save_pretrained(tmp_path / "saved")
    other = adatsq_trt.search_policy(tmp_path / "saved", formats="w4a4,w8a8", **TINY)
    assert policy.assignments == other.assignments
    assert policy.step_assignments == other.step_assignments
    assert policy.error == other.error


def test_a_bundle_of_a_pipeline_in_memory_runs_inside_it(pipe: FluxPipeline) -> None:
    exact = draw(pipe)
    bundle = adatsq_trt.build(pipe, target="cpu", **TINY)
    original, pipe.transformer = pipe.transformer, bundle.transformer()
    try:
        quantized = draw(pipe)
    finally:
        pipe.transformer = original
    assert exact.shape == quantized.shape == (1, HEIGHT, WIDTH, 3)
    assert 0 < float(np.abs(exact - quantized).mean()) < 0.05
    assert np.array_equal(draw(pipe), exact)
    # The run cannot be opened again without the object, and says so.
    with pytest.raises(MissingFileError, match="was made of a FluxPipeline in memory"):
        importlib.import_module("adatsq_trt.stages.models").open_run(bundle.path.parent)


def draw(pipe: FluxPipeline) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    images: np.ndarray = pipe(
        "a cat",
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=2,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    return images


def test_a_hub_id_is_a_model_too(pipe: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a snapshot in the hub's cache, without a network."""
    entry, commit = tmp_path / "hub" / "models--somebody--tiny-flux", "0" * 40
    pipe.save_pretrained(entry / "snapshots" / commit)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = adatsq_trt.calibrate("somebody/tiny-flux", simulate=True, **TINY)
    whole = adatsq_trt.calibrate(pipe, simulate=True, **TINY)
    assert found.settings.model == "tiny-flux"
    assert np.array_equal(found.information, whole.information)


def test_a_transformer_in_memory_needs_a_base(pipe: FluxPipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a FluxTransformer2DModel in memory.*pass --base"):
        adatsq_trt.calibrate(pipe.transformer, simulate=True, **TINY)
    pipe.save_pretrained(tmp_path / "saved")
    calibration = adatsq_trt.calibrate(pipe.transformer, base=tmp_path / "saved", simulate=True, **TINY)
    whole = adatsq_trt.calibrate(pipe, simulate=True, **TINY)
    assert np.array_equal(calibration.information, whole.information)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (torch.nn.Linear(2, 2), {}, MismatchError, "the model is a Linear, expected a name, a path"),
        ("pipe", {"base": "somewhere"}, UserError, "a whole pipeline already"),
        ("pipe", {"height": 50}, UserError, "--height 50: expected a multiple of 16"),
        ("digit-flux", {}, UnknownNameError, "did you mean 'digits-flux'?"),
    ],
)
def test_wrong_models_are_refused(
    pipe: FluxPipeline, model: object, options: dict[str, Any], error: type[UserError], message: str
) -> None:
    with pytest.raises(error) as refused:
        adatsq_trt.calibrate(pipe if model == "pipe" else model, simulate=True, **{**TINY, **options})
    assert message in str(refused.value)


def test_a_changed_tensor_is_another_model(pipe: FluxPipeline, tmp_path: Path) -> None:
    first = adatsq_trt.calibrate(pipe, simulate=True, output=tmp_path / "run", **TINY)
    other = make_flux_pipeline()
    with torch.no_grad():
        next(other.transformer.parameters())[0] += 1
    second = adatsq_trt.calibrate(other, simulate=True, output=tmp_path / "run", **TINY)
    assert first.settings.weights_sha256 != second.settings.weights_sha256
    assert first.settings.model_sha256 != second.settings.model_sha256
