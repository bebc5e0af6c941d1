"""The loop over ONNX Runtime against the same loop in PyTorch."""

import numpy as np
import pytest
import torch

from adatsq_trt.engines.bundle import BundleFiles, ImageSpec
from adatsq_trt.engines.denoise import decode_image, denoise
from adatsq_trt.errors import UserError
from adatsq_trt.models.flux import pack
from adatsq_trt.schedule import initial_noise
from tests.engines.conftest import ASSIGNMENTS, GUIDANCE, SIGMAS, STEP_ASSIGNMENTS, TinyModel


def loop(bundle: BundleFiles, prompts: list[int], seeds: list[int], quantized: bool) -> np.ndarray:
    """The denoising loop, written down once more."""
    model, x = TinyModel(), initial_noise(seeds, bundle.manifest.latent_shape)
    conditional, unconditional = bundle.prompts["conditional.pooled"], bundle.prompts["unconditional.pooled"]
    for step, assignment in enumerate(STEP_ASSIGNMENTS):
        branches = []
        for pooled in (conditional[prompts], np.repeat(unconditional, len(seeds), axis=0)):
            time = np.full(len(seeds), SIGMAS[step], np.float32)
            branches.append(model.run({"hidden_states": x, "pooled": pooled, "timestep": time}, None)[0])
        if quantized:
            both = {
                "hidden_states": np.concatenate([x, x]),
                "pooled": np.concatenate([conditional[prompts], np.repeat(unconditional, len(seeds), axis=0)]),
                "timestep": np.full(2 * len(seeds), SIGMAS[step], np.float32),
            }
            output = model.run(both, ASSIGNMENTS[assignment], fixed_scales(bundle, step))[0]
            branches = [output[: len(seeds)], output[len(seeds) :]]
        velocity = branches[1] + np.float32(GUIDANCE) * (branches[0] - branches[1])
        x = x + np.float32(SIGMAS[step + 1] - SIGMAS[step]) * velocity
    return x


def fixed_scales(bundle: BundleFiles, step: int) -> list[float]:
    scales = bundle.scales(step)
    return [float(scales.get(f"{layer}.scale", 0.0)) for layer in bundle.policy.layers]


@pytest.mark.parametrize("quantized", [True, False])
def test_follows_the_policy(tiny_bundle: BundleFiles, quantized: bool) -> None:
    got = denoise(tiny_bundle, [0, 1, 2], [7, 8, 9], quantized)
    expected = loop(tiny_bundle, [0, 1, 2], [7, 8, 9], quantized)
    assert got.dtype == np.float32
    assert np.median(np.abs(got - expected)) < 1e-5
    assert np.linalg.norm(got - expected) < 1e-2 * np.linalg.norm(expected)


def test_a_sample_does_not_depend_on_its_batch(tiny_bundle: BundleFiles) -> None:
    together = denoise(tiny_bundle, [0, 1, 2], [7, 8, 9])
    alone = denoise(tiny_bundle, [1], [8])
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-4, atol=1e-4)


def test_same_seed_same_bytes_and_progress(tiny_bundle: BundleFiles) -> None:
    told: list[tuple[int, int]] = []
    first = denoise(tiny_bundle, [0], [3], on_step=lambda done, steps: told.append((done, steps)))
    assert first.tobytes() == denoise(tiny_bundle, [0], [3]).tobytes()
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not np.array_equal(first, denoise(tiny_bundle, [0], [4]))
    assert not np.array_equal(first, denoise(tiny_bundle, [1], [3]))


def test_bad_requests(tiny_bundle: BundleFiles) -> None:
    with pytest.raises(UserError, match="2 prompts and 1 seeds"):
        denoise(tiny_bundle, [0, 1], [1])
    with pytest.raises(UserError, match="0 prompts"):
        denoise(tiny_bundle, [], [])
    with pytest.raises(UserError, match="prompts 0 to 2"):
        denoise(tiny_bundle, [3], [1])


def test_decode_is_the_inverse_of_pack() -> None:
    images = np.random.default_rng(0).random((2, 6, 6, 3), dtype=np.float32)
    latent = pack(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(decode_image(latent, ImageSpec(patches=3, channels=3)), images, atol=1e-6)
    assert decode_image(latent * 5, ImageSpec(patches=3, channels=3)).max() == 1.0
