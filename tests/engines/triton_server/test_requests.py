"""What a request may ask, and the sentence for what it may not."""

import json
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from adatsq_trt.engines.bundle import BundleFiles, ImageSpec
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.triton_server.requests import read_request, render
from adatsq_trt.errors import AdatsqError, UserError


@pytest.fixture
def bundle(tiny_bundle: BundleFiles) -> Bundle:
    return Bundle.open(tiny_bundle.folder)


def tensors(**values: object) -> dict[str, np.ndarray]:
    kinds = {
        "guidance": np.float32,
        "guidance_2": np.float32,
        "steps": np.int32,
        "progress": bool,
        "preview": bool,
        "quantized": bool,
    }
    given = {"prompt": [0, 2], "seed": [7, 8], **values}
    return {name: np.array(value, kinds.get(name, np.int64)) for name, value in given.items()}


def test_defaults(bundle: Bundle) -> None:
    request = read_request(tensors(), "", bundle, max_samples=2)
    assert (request.output, request.progress, request.preview) == ("png", False, False)
    assert (request.generation.guidance, request.generation.quantized, request.generation.step) == (2.0, True, 0)
    np.testing.assert_array_equal(request.generation.latents, bundle.noise([7, 8]))
    expected = bundle.conditioning([0, 2]).conditional["pooled"]
    np.testing.assert_array_equal(request.generation.conditioning.conditional["pooled"], expected)


def test_what_is_asked_for(bundle: Bundle) -> None:
    asked = tensors(guidance=[1.5], steps=[4], progress=[True], preview=[True], quantized=[False])
    request = read_request(asked, '{"output": "latents"}', bundle, max_samples=2)
    assert (request.output, request.progress, request.preview) == ("latents", True, True)
    assert (request.generation.guidance, request.generation.quantized) == (1.5, False)


def test_a_negative_prompt_takes_the_place_of_the_empty_one(bundle: Bundle) -> None:
    texts = ("zero", "one", "two")
    named = Bundle(replace(bundle.files, manifest=bundle.manifest.model_copy(update={"prompt_texts": texts})))
    request = read_request(tensors(), '{"negative": "one"}', named, max_samples=2)
    own, stored = request.generation.conditioning, bundle.conditioning([1, 1])
    assert own.unconditional is not None
    for name, value in stored.conditional.items():
        np.testing.assert_array_equal(own.unconditional[name], value)
    np.testing.assert_array_equal(own.conditional["pooled"], bundle.conditioning([0, 2]).conditional["pooled"])
    with pytest.raises(UserError, match=r"negative 'ones': not one .* such as 'one'; give one of them, or leave"):
        read_request(tensors(), '{"negative": "ones"}', named, max_samples=2)
    with pytest.raises(UserError, match="negative: got 3, expected words"):
        read_request(tensors(), '{"negative": 3}', named, max_samples=2)


BAD = {
    "unknown prompt": ({"prompt": [0, 3]}, "", "prompt 3: the bundle holds prompts 0 to 2"),
    "negative prompt": ({"prompt": [0, -1]}, "", "prompt -1"),
    "negative seed": ({"seed": [-1, 5]}, "", "seed: got -1, expected 0 to 9223372036854775807"),
    "numbers differ": ({"seed": [1]}, "", "got 2 prompts and 1 seeds, expected one seed for every prompt, 1 to 2"),
    "none": ({"prompt": [], "seed": []}, "", "got 0 prompts"),
    "too many": ({"prompt": [0] * 3, "seed": [0] * 3}, "", "got 3 prompts and 3 seeds, .* 1 to 2"),
    "guidance": (
        {"guidance": [np.nan]},
        "",
        "guidance: got nan, expected 0 to 100; leave it out for the bundle's own, 2",
    ),
    "two guidances": ({"guidance": [1, 2]}, "", "guidance: got 2 values, expected one"),
    "a second transformer's": ({"guidance_2": [1]}, "", "guidance_2: the bundle has one transformer; leave it out"),
    "steps": ({"steps": [20]}, "", "steps: got 20, the bundle's policy is for 4"),
    "output": ({}, '{"output": "latent"}', "unknown output 'latent'; did you mean 'latents'"),
    "output of another type": ({}, '{"output": 3}', "unknown output '3'"),
    "large guidance": ({"guidance": [1e30]}, "", "guidance: got 1e\\+30, expected 0 to 100"),
    "negative guidance": ({"guidance": [-1]}, "", "guidance: got -1, expected 0 to 100"),
    "unknown field": ({}, '{"guidence": 9}', "unknown request field 'guidence'; did you mean 'guidance'?"),
    "an input as parameter": ({}, '{"guidance": 9}', "'guidance' is an input, not a parameter"),
    "twice": ({}, '{"output": "png", "output": "latents"}', "parameter 'output' is given twice"),
    "preview": ({"preview": [True]}, "", "preview: there are messages to carry it with progress only"),
    "long output": ({}, f'{{"output": "{"x" * 10_000}"}}', f"unknown output '{'x' * 80}\\.\\.\\.'; choose"),
    "long field": ({}, f'{{"{"x" * 10_000}": 1}}', f"unknown request field '{'x' * 80}\\.\\.\\.'; choose"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(bundle: Bundle, name: str) -> None:
    values, parameters, message = BAD[name]
    with pytest.raises(UserError, match=message):
        read_request(tensors(**values), parameters, bundle, max_samples=2)


@pytest.mark.parametrize("own", [-3.0, 500.0])
def test_guidance_of_the_bundle_may_be_said(bundle: Bundle, own: float) -> None:
    """The web page always says it; `build` takes -1000 to 1000."""
    built = Bundle(replace(bundle.files, manifest=bundle.manifest.model_copy(update={"guidance": own})))
    assert read_request(tensors(guidance=[own]), "", built, max_samples=2).generation.guidance == own
    with pytest.raises(UserError, match=f"expected 0 to 100; leave it out for the bundle's own, {own:g}"):
        read_request(tensors(guidance=[2 * own]), "", built, max_samples=2)


def test_texts_of_stored_prompts(bundle: Bundle) -> None:
    manifest = bundle.manifest.model_copy(update={"prompt_texts": ("a 7", "a 9 above a 3", "two 4")})
    known, seeds = Bundle(replace(bundle.files, manifest=manifest)), {"seed": np.array([7, 8])}
    got = read_request(seeds, '{"text": "two 4"}', known, max_samples=2).generation.conditioning
    expected = bundle.conditioning([2, 2]).conditional["pooled"]
    np.testing.assert_array_equal(got.conditional["pooled"], expected)
    for text, message in (
        ("a 8", "text 'a 8': not one of the bundle's 3 texts, such as 'a 7'; give one of them, or ask with 'prompt'"),
        ("wxyz", "such as 'a 7', 'a 9 above a 3', 'two 4'; give one of them, or ask with 'prompt', 0 to 2"),
    ):
        with pytest.raises(UserError, match=message):
            read_request(seeds, json.dumps({"text": text}), known, max_samples=2)
    with pytest.raises(UserError, match="got neither, expected the parameter 'text' or 'prompt', 0 to 2"):
        read_request(seeds, "", known, max_samples=2)


def test_a_bundle_without_guidance_takes_none(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = {name: value for name, value in bundle.files.prompts.items() if name.startswith("conditional")}
    monkeypatch.setitem(bundle.files.__dict__, "prompts", prompts)
    with pytest.raises(UserError, match="guidance: got 3, the bundle was built without guidance; leave it out"):
        read_request(tensors(guidance=[3]), "", bundle, max_samples=2)
    assert read_request(tensors(guidance=[2]), "", bundle, max_samples=2).generation.guidance == 2.0


def test_images_that_are_not_finite(bundle: Bundle) -> None:
    for output in ("image", "png"):
        with pytest.raises(AdatsqError, match="the decoded images have NaN or infinity"):
            render(lambda _: np.full((1, 2, 2, 3), np.nan, np.float32), bundle.noise([1]), output)


def test_no_seed(bundle: Bundle) -> None:
    with pytest.raises(UserError, match="the request has no seed; give one, 0 or more"):
        read_request({"prompt": np.array([1])}, "", bundle, max_samples=2)


@pytest.mark.parametrize("name", ["prompt", "seed", "guidance"])
def test_large_requests_are_refused_by_their_size_alone(bundle: Bundle, name: str) -> None:
    endless = np.broadcast_to(np.int64(0), (10**15,))
    for others in ({}, {"prompt": endless, "seed": endless}):
        with pytest.raises(UserError, match=r"got .*1000000000000000"):
            read_request({**tensors(), **others, name: endless}, "", bundle, max_samples=2)


def test_latents_that_are_no_picture(bundle: Bundle) -> None:
    image = ImageSpec(patches=1, channels=16)
    files = replace(bundle.files, manifest=bundle.manifest.model_copy(update={"image": image}))
    assert read_request(tensors(), "", Bundle(files), max_samples=2).output == "image"
    with pytest.raises(UserError, match="unknown output 'png'; choose one of: image, latents"):
        read_request(tensors(), '{"output": "png"}', Bundle(files), max_samples=2)


def test_outputs(bundle: Bundle) -> None:
    latents = bundle.noise([1, 2, 3])
    assert render(bundle.decode, latents, "latents") is latents
    images = render(bundle.decode, latents, "image")
    np.testing.assert_array_equal(images, bundle.decode(latents))
    picture = np.asarray(Image.open(BytesIO(render(bundle.decode, latents, "png").tobytes())))
    np.testing.assert_array_equal(picture, np.round(np.concatenate(images, axis=1) * 255).astype(np.uint8))


def test_videos_are_strips_of_their_frames() -> None:
    videos = np.random.default_rng(0).random((2, 3, 4, 5, 3), dtype=np.float32)
    picture = np.asarray(Image.open(BytesIO(render(lambda _: videos, videos, "png").tobytes())))
    assert picture.shape == (2 * 4, 3 * 5, 3)
    np.testing.assert_array_equal(picture[4:, 5:10], np.round(videos[1, 1] * 255).astype(np.uint8))
    assert render(lambda _: videos, videos, "image") is videos
