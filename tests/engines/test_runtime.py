"""The loop over ONNX Runtime against the same loop in PyTorch, and what is refused before anything is computed."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adatsq_trt.engines.backends import onnxruntime, selection
from adatsq_trt.engines.bundle import PROMPTS_NAME, BundleFiles, ImageSpec
from adatsq_trt.engines.generation import require_inputs
from adatsq_trt.engines.runtime import Bundle, Conditioning, StepResult
from adatsq_trt.errors import DamagedFileError, MismatchError, UserError
from adatsq_trt.files import write_tensors
from adatsq_trt.graph_index import TensorSignature
from adatsq_trt.image_call import ImageCall
from adatsq_trt.models.flux import pack
from adatsq_trt.schedule import initial_noise
from tests.engines.conftest import ASSIGNMENTS, GUIDANCE, SIGMAS, STEP_ASSIGNMENTS, TinyModel


@pytest.fixture
def bundle(tiny_bundle: BundleFiles) -> Bundle:
    return Bundle.open(tiny_bundle.folder)


def loop(bundle: Bundle, prompts: list[int], seeds: list[int], quantized: bool) -> np.ndarray:
    """The denoising loop, written down once more."""
    model, x = TinyModel(), initial_noise(seeds, bundle.manifest.latent_shape)
    stored = bundle.files.prompts
    pooled = np.concatenate(
        [stored["conditional.pooled"][prompts], np.repeat(stored["unconditional.pooled"], len(seeds), axis=0)]
    )
    for step, assignment in enumerate(STEP_ASSIGNMENTS):
        time = np.full(2 * len(seeds), SIGMAS[step], np.float32)
        both = {"hidden_states": np.concatenate([x, x]), "pooled": pooled, "timestep": time}
        row, scales = (ASSIGNMENTS[assignment], fixed_scales(bundle, step)) if quantized else (None, None)
        first, second = np.split(model.run(both, row, scales)[0], 2)
        velocity = second + np.float32(GUIDANCE) * (first - second)
        x = x + np.float32(SIGMAS[step + 1] - SIGMAS[step]) * velocity
    return x


def fixed_scales(bundle: Bundle, step: int) -> list[float]:
    scales = bundle.files.scales(step)
    return [float(scales.get(f"{layer}.scale", 0.0)) for layer in bundle.policy.layers]


def test_only_one_of_two_transformers_can_be_given_back(tiny_bundle: BundleFiles) -> None:
    with pytest.raises(UserError, match=r"--offload expert: .* has one transformer"):
        Bundle.open(tiny_bundle.folder, offload="expert")
    with pytest.raises(UserError, match="unknown --offload 'model'; choose one of: none, expert"):
        Bundle.open(tiny_bundle.folder, offload="model")


@pytest.mark.parametrize("quantized", [True, False])
def test_follows_the_policy(bundle: Bundle, quantized: bool) -> None:
    with bundle:
        got = bundle.denoise(bundle.noise([7, 8, 9]), bundle.conditioning([0, 1, 2]), quantized=quantized)
    expected = loop(bundle, [0, 1, 2], [7, 8, 9], quantized)
    assert got.dtype == np.float32
    assert np.median(np.abs(got - expected)) < 1e-5
    assert np.linalg.norm(got - expected) < 1e-2 * np.linalg.norm(expected)


def test_a_sample_does_not_depend_on_its_batch(bundle: Bundle) -> None:
    together = bundle.denoise(bundle.noise([7, 8, 9]), bundle.conditioning([0, 1, 2]))
    alone = bundle.denoise(bundle.noise([8]), bundle.conditioning([1]))
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-4, atol=1e-4)


def test_same_seed_same_bytes_whatever_ran_before(bundle: Bundle) -> None:
    condition = bundle.conditioning([0])
    first = bundle.denoise(bundle.noise([3]), condition)
    assert not np.array_equal(first, bundle.denoise(bundle.noise([4]), condition))
    assert not np.array_equal(first, bundle.denoise(bundle.noise([3]), bundle.conditioning([1])))
    assert first.tobytes() == bundle.denoise(bundle.noise([3]), condition, steps=4).tobytes()


def test_callback_is_told_of_every_step_and_can_end_the_loop(bundle: Bundle) -> None:
    told: list[StepResult] = []
    last = bundle.denoise(bundle.noise([3]), bundle.conditioning([0]), callback=told.append)
    assert [(r.step, r.steps, r.bucket) for r in told] == [(i, 4, i) for i in range(4)]
    np.testing.assert_array_equal(told[-1].latents, last)

    def cancel(_: StepResult) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundle.denoise(bundle.noise([3]), bundle.conditioning([0]), callback=cancel)


def test_without_guidance_there_is_one_branch(bundle: Bundle) -> None:
    both = bundle.conditioning([0, 1])
    one = bundle.denoise(bundle.noise([1, 2]), Conditioning(both.conditional))
    np.testing.assert_allclose(one, bundle.denoise(bundle.noise([1, 2]), both, guidance=1.0), rtol=1e-4, atol=1e-5)


def test_one_session_serves_all_steps(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = onnxruntime.OnnxRuntimeBackend.load
    monkeypatch.setattr(
        onnxruntime.OnnxRuntimeBackend,
        "load",
        lambda self, path: loaded.append(path.name) or load(self, path),
    )
    for _ in range(2):
        bundle.denoise(bundle.noise([3]), bundle.conditioning([0]))
    assert loaded == ["switch.cpu.onnx"]


def test_formats_and_buckets(bundle: Bundle) -> None:
    assert [fmt.name for fmt in bundle.formats(2).values()] == list(ASSIGNMENTS[2])
    assert [bundle.bucket(step) for step in range(4)] == [0, 1, 2, 3]
    assert {signature.name for signature in bundle.inputs} == {"hidden_states", "pooled", "timestep"}
    assert bundle.latent_input == "hidden_states"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 20}, "steps: got 20, the bundle's policy is for 4"),
        ({"latents": np.zeros((2, 4, 15), np.float32)}, r"'hidden_states': got float32 \[2, 4, 15\]"),
        ({"latents": np.zeros((2, 4, 16))}, "'hidden_states': got float64"),
        ({"latents": np.zeros((0, 4, 16), np.float32)}, r"got float32 \[0, 4, 16\].*at least one"),
        ({"latents": np.zeros((3, 4, 16), np.float32)}, "as many rows"),
        ({"conditioning": Conditioning({"pooled": np.zeros((2, 15), np.float32)})}, r"'pooled': got float32 \[2, 15\]"),
        ({"conditioning": Conditioning({"text": np.zeros((2, 16), np.float32)})}, "expected .*'pooled'"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_loaded(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    monkeypatch.setattr(selection, "OnnxRuntimeSteps", None)
    request = {"latents": bundle.noise([1, 2]), "conditioning": bundle.conditioning([0, 1])}
    with pytest.raises(MismatchError if "steps" in change else UserError, match=message):
        bundle.denoise(**{**request, **change})


def test_prompts_and_steps_that_do_not_exist(bundle: Bundle) -> None:
    with pytest.raises(UserError, match="prompts 0 to 2"):
        bundle.conditioning([3])
    with pytest.raises(UserError, match="steps 0 to 3"):
        bundle.predict(4, {})


def test_prompts_by_another_name(bundle: Bundle) -> None:
    bundle.files.__dict__["prompts"] = {"pooled": np.zeros(3)}
    with pytest.raises(DamagedFileError, match=r"'conditional\.'"):
        bundle.conditioning([0])


def test_a_guidance_scale_is_an_input_where_the_graph_asks_for_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, conditioning = bundle.noise([1, 2]), Conditioning(bundle.conditioning([0, 1]).conditional)
    assert "guidance" not in bundle.step_inputs(0, latents, conditioning, 3.5)
    own = (*bundle.inputs, TensorSignature(name="guidance", dtype="float", shape=("rows",)))
    monkeypatch.setattr(Bundle, "inputs", own)
    given = bundle.step_inputs(0, latents, conditioning, 3.5)
    assert given["guidance"].tolist() == [3.5, 3.5]
    require_inputs(own, given)


@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_decode_is_the_inverse_of_pack(patch_size: int) -> None:
    images = np.random.default_rng(0).random((2, 3 * patch_size, 3 * patch_size, 3), dtype=np.float32)
    latent = pack(torch.from_numpy(images), patch_size).numpy()
    spec = ImageSpec(patches=3, channels=3, patch_size=patch_size)
    np.testing.assert_allclose(spec.decode(latent), images, atol=1e-6)
    assert spec.decode(latent * 5).max() == 1.0


def test_texts_that_are_encoded_with_their_image(bundle: Bundle, tmp_path: Path) -> None:
    """The unguided branch has a row for each prompt, and no image is taken without the texts that see it."""
    call = ImageCall(pipeline="QwenImageEditPipeline", inputs=("image",), texts=("pooled",))
    manifest = bundle.manifest.model_copy(update={"image_call": call})
    folder, stored = shutil.copytree(bundle.files.folder, tmp_path / "bundle"), bundle.files.prompts
    bundle.files = replace(bundle.files, folder=folder, manifest=manifest)
    with pytest.raises(DamagedFileError, match=r"'unconditional.pooled': got float32 \[1, 16\], expected 3 rows"):
        bundle.conditioning([0])
    own = {name: torch.from_numpy(value) for name, value in stored.items()}
    own["unconditional.pooled"] = negatives = torch.arange(48.0).reshape(3, 16)
    own["conditional.image"] = torch.arange(6.0).reshape(3, 2)
    write_tensors(folder / PROMPTS_NAME, own)
    bundle.files = replace(bundle.files)
    held = bundle.conditioning([2, 0])
    assert held.unconditional is not None
    np.testing.assert_array_equal(held.unconditional["pooled"], negatives[[2, 0]])
    np.testing.assert_array_equal(held.unconditional["image"], [[4.0, 5.0], [0.0, 1.0]])

    image, texts, negative = np.full((1, 2), 9.0), np.ones((2, 16)), np.zeros((1, 16))
    shown = bundle.conditioning([2, 0], {"image": image, "pooled": texts}, {"pooled": negative})
    assert shown.unconditional is not None
    np.testing.assert_array_equal(shown.conditional["pooled"], texts)
    np.testing.assert_array_equal(shown.unconditional["pooled"], np.zeros((2, 16)))
    for branch in (shown.conditional, shown.unconditional):
        np.testing.assert_array_equal(branch["image"], np.full((2, 2), 9.0))
    for images, unguided, message in (
        ({"image": image}, {"pooled": negative}, "images: got image, expected image, pooled"),
        ({"image": image, "pooled": texts}, None, "unguided: got nothing, expected pooled"),
        (None, {"pooled": negative}, "unguided: got pooled, expected nothing"),
    ):
        with pytest.raises(UserError, match=message):
            bundle.conditioning([2, 0], images, unguided)
