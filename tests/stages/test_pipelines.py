"""Bundles of pipelines as they come, from the pipeline in memory to a loop that ends in its latents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline
from PIL import Image

import adatsq_trt
from adatsq_trt.engines.runtime import Bundle, Conditioning
from adatsq_trt.engines.transformer import AdatsqTransformer
from adatsq_trt.errors import MismatchError, UserError
from adatsq_trt.schedule import UNIPC
from tests import tiny_ltx
from tests.tiny_checkpoints import HEIGHT, WIDTH, make_wan_pipeline, make_z_image_pipeline
from tests.tiny_chroma import make_chroma_pipeline
from tests.tiny_flux_2 import make_distilled_klein_pipeline, make_flux_2_pipeline, make_klein_pipeline, tokens_of_klein
from tests.tiny_hunyuan_video import make_hunyuan_video_pipeline
from tests.tiny_qwen_image import make_qwen_image_pipeline
from tests.tiny_stable_diffusion_3 import make_stable_diffusion_3_pipeline

EFFORT: dict[str, Any] = {"calibration_samples": 2, "selection_samples": 2, "held_out_samples": 2}
SIZE: dict[str, Any] = {"height": HEIGHT, "width": WIDTH}
FRAMES = 5
WORDS = ("red", "and", "seven", "a")
# Tokens of each caption: its words, of one token each, a beginning and an end.
LENGTHS = (5, 33, 70)
CAPTIONS = tuple(" ".join(WORDS[(i * i + length) % 4] for i in range(length - 2)) for length in LENGTHS)


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Without progress bars and dropout."""
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.eval()
    pipe.transformer.eval()
    return pipe


def distance(ours: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(ours - wanted) / np.linalg.norm(wanted))


def flips(quantized: np.ndarray, full: np.ndarray) -> float:
    """How far quantized latents may be apart whose batches were added up in another order: about as far as rounding."""
    return max(1e-4, 2 * distance(quantized, full))


def run(pipe: DiffusionPipeline, prompt: list[str] | None, noise: np.ndarray, **options: Any) -> np.ndarray:
    """The latents that a pipeline ends with."""
    latents = torch.from_numpy(noise)
    result = pipe(prompt=prompt, latents=latents, output_type="latent", return_dict=False, **{**SIZE, **options})[0]
    return np.asarray(result.numpy())


def test_a_wan_keeps_unipc_from_search_to_bundle(tmp_path: Path) -> None:
    """With a beam, whose paths carry what the scheduler combines."""
    pipe, prompts = quiet(make_wan_pipeline()), ("a red", "three green and seven")
    options = {"target": "cpu", "steps": 4, "guidance": 4.0, "frames": FRAMES, "beam": 2, "candidates": 2}
    with adatsq_trt.build(pipe, output=tmp_path / "run", prompts=prompts, **options, **SIZE, **EFFORT) as bundle:
        schedule = bundle.schedule
        assert schedule.scheduler_config["_class_name"] == UNIPC
        assert schedule.solver.memory == 2
        noise, conditioning = bundle.noise([4, 5]), bundle.conditioning([1, 0])
        request = {"num_frames": FRAMES, "num_inference_steps": 4, "guidance_scale": 4.0}
        wanted = run(pipe, [prompts[1], prompts[0]], noise, **request)
        assert distance(bundle.denoise(noise, conditioning, quantized=False), wanted) < 1e-4
        quantized = bundle.denoise(noise, conditioning)
        assert 1e-5 < distance(quantized, wanted) < 1e-2
        pipe.transformer = AdatsqTransformer.from_bundle(bundle, pipe.scheduler)
        assert distance(run(pipe, [prompts[1], prompts[0]], noise, **request), quantized) < 1e-4


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionPipeline, Bundle]:
    pipe, folder = quiet(make_z_image_pipeline()), tmp_path_factory.mktemp("captions") / "run"
    # A bundle holds as many prompts as its largest batch of samples draws.
    options = {"target": "cpu", "steps": 2, "guidance": 6.0, "prompts": CAPTIONS, **SIZE, **EFFORT}
    return pipe, adatsq_trt.build(pipe, output=folder, **{**options, "calibration_samples": len(CAPTIONS)})


def test_captions_of_every_length_in_one_bundle_are_the_pipelines(z_image: tuple[DiffusionPipeline, Bundle]) -> None:
    """Each alone in the pipeline; in the bundle all are tensors of one length, and so is the empty prompt."""
    pipe, bundle = z_image
    noise, conditioning = bundle.noise([1, 2, 3]), bundle.conditioning([0, 1, 2])
    tokens = (np.abs(conditioning.conditional["encoder_hidden_states"]).max(axis=-1) > 0).sum(axis=-1)
    assert tuple(tokens) == LENGTHS
    together = bundle.denoise(noise, conditioning, quantized=False)
    for index, caption in enumerate(CAPTIONS):
        own = noise[index : index + 1]
        wanted = run(pipe, [caption], own, num_inference_steps=2, guidance_scale=5.0)
        assert distance(together[index : index + 1], wanted) < 1e-4
        alone = bundle.denoise(own, bundle.conditioning([index]), quantized=False)
        assert distance(alone, wanted) < 1e-4


def test_a_negative_prompt_is_a_conditioning(z_image: tuple[DiffusionPipeline, Bundle]) -> None:
    """Any stored prompt takes the place of the empty one."""
    pipe, bundle = z_image
    noise = bundle.noise([1])
    conditioning = Conditioning(bundle.conditioning([1]).conditional, bundle.conditioning([0]).conditional)
    options = {"num_inference_steps": 2, "guidance_scale": 5.0}
    wanted = run(pipe, [CAPTIONS[1]], noise, negative_prompt=[CAPTIONS[0]], **options)
    assert distance(bundle.denoise(noise, conditioning, quantized=False), wanted) < 1e-4
    assert distance(bundle.denoise(noise, bundle.conditioning([1]), quantized=False), wanted) > 1e-2


def test_guidance_that_is_normalized_and_cut_off_is_the_pipelines(
    z_image: tuple[DiffusionPipeline, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which calls the transformer with one branch from there on; a loop of a bundle has neither."""
    pipe, bundle = z_image
    noise, options = bundle.noise([1]), {"num_inference_steps": 2, "guidance_scale": 5.0}
    cut: dict[str, Any] = {**options, "cfg_normalization": 1.0, "cfg_truncation": 0.2}
    wanted, plain = run(pipe, [CAPTIONS[2]], noise, **cut), run(pipe, [CAPTIONS[2]], noise, **options)
    calls: list[int] = []
    predict = bundle.predict

    def in_full_precision(step: int, inputs: dict[str, torch.Tensor], size: object) -> object:
        calls.append(len(inputs["hidden_states"]))
        return predict(step, inputs, quantized=False)

    monkeypatch.setattr(bundle, "predict", in_full_precision)
    monkeypatch.setattr(pipe, "transformer", AdatsqTransformer.from_bundle(bundle, pipe.scheduler))
    assert distance(run(pipe, [CAPTIONS[2]], noise, **cut), wanted) < 1e-4
    assert calls == [2, 1]
    assert distance(plain, wanted) > 1e-2


def test_a_qwen_image_from_pipeline_to_bundle_and_back(tmp_path: Path) -> None:
    """Prompts of several lengths in one bundle, each alone in the pipeline; guided away from a prompt, at the norm."""
    pipe, folder = quiet(make_qwen_image_pipeline()), tmp_path / "run"
    options = {"target": "cpu", "steps": 2, "guidance": 6.0, "prompts": CAPTIONS, "negative_prompt": "a green", **SIZE}
    with adatsq_trt.build(pipe, output=folder, **{**options, **EFFORT, "calibration_samples": len(CAPTIONS)}) as bundle:
        assert bundle.manifest.rescaled_guidance
        noise, conditioning = bundle.noise([1, 2, 3]), bundle.conditioning([0, 1, 2])
        tokens = (np.abs(conditioning.conditional["encoder_hidden_states"]).max(axis=-1) > 0).sum(axis=-1)
        assert len(set(tokens)) == len(CAPTIONS)
        together = bundle.denoise(noise, conditioning, quantized=False)
        request = {"num_inference_steps": 2, "true_cfg_scale": 6.0}
        for index, caption in enumerate(CAPTIONS):
            own = noise[index : index + 1]
            wanted = run(pipe, [caption], own, negative_prompt=["a green"], **request)
            assert distance(together[index : index + 1], wanted) < 1e-4
            for other in ({"negative_prompt": ["seven"]}, {}):  # another prompt, and no guidance
                assert distance(together[index : index + 1], run(pipe, [caption], own, **request, **other)) > 1e-3
        quantized = bundle.denoise(noise, conditioning)
        pipe.transformer = AdatsqTransformer.from_bundle(bundle, pipe.scheduler)
        in_pipeline = run(pipe, list(CAPTIONS), noise, negative_prompt=["a green"] * 3, **request)
        assert distance(in_pipeline, quantized) < 1e-4


def test_a_stable_diffusion_3_from_pipeline_to_bundle_and_back(tmp_path: Path) -> None:
    """With all three text encoders; what a bundle does not follow is refused in the pipeline."""
    pipe, prompts = quiet(make_stable_diffusion_3_pipeline()), ("a red", "three green and seven")
    for encoder in (pipe.text_encoder_2, pipe.text_encoder_3):
        encoder.eval()
    options = {"target": "cpu", "steps": 2, "guidance": 4.0, "prompts": prompts, **SIZE, **EFFORT}
    with adatsq_trt.build(pipe, output=tmp_path / "run", **options) as bundle:
        noise, request = bundle.noise([4, 5]), {"num_inference_steps": 2, "guidance_scale": 4.0}
        wanted = run(pipe, [prompts[1], prompts[0]], noise, **request)
        conditioning = bundle.conditioning([1, 0])
        assert distance(bundle.denoise(noise, conditioning, quantized=False), wanted) < 1e-4
        quantized = bundle.denoise(noise, conditioning)
        pipe.transformer = AdatsqTransformer.from_bundle(bundle, pipe.scheduler)
        assert distance(run(pipe, [prompts[1], prompts[0]], noise, **request), quantized) < 1e-4
        layers = {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1.0}
        with pytest.raises(MismatchError, match="argument 'skip_layers' of the transformer: a bundle takes none"):
            run(pipe, [prompts[0]], noise[:1], **request, **layers)


def run_flux_2(pipe: Any, prompt: list[str], noise: np.ndarray, **options: Any) -> np.ndarray:
    """The tokens that a pipeline of FLUX.2 ends with; they take noise, and klein gives latents, as planes."""
    planes = np.moveaxis(noise, 1, 2).reshape(len(noise), -1, HEIGHT // 16, WIDTH // 16)
    ended = run(pipe, prompt, planes, **options)
    return tokens_of_klein(pipe, torch.from_numpy(ended)).numpy() if isinstance(pipe, Flux2KleinPipeline) else ended


KLEIN_IS_SLOW = [
    (make_flux_2_pipeline, {"guidance": 4.0}),
    pytest.param(make_klein_pipeline, {"guidance": 4.0, "negative_prompt": "a green"}, marks=pytest.mark.slow),
    pytest.param(make_distilled_klein_pipeline, {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("make", "guidance"), KLEIN_IS_SLOW, ids=["dev", "klein", "distilled"])
def test_a_flux_2_from_pipeline_to_bundle_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], guidance: dict[str, Any]
) -> None:
    """Captions of different lengths; guidance as an input, towards the prompt and away from another, and none."""
    pipe, prompts = quiet(make()), ("a red", "three green and seven and a green and a red three")
    options = {"target": "cpu", "steps": 2, "prompts": prompts, **guidance, **SIZE, **EFFORT}
    with adatsq_trt.build(pipe, output=tmp_path / "run", **options) as bundle:
        noise, request = bundle.noise([4, 5]), {"num_inference_steps": 2, "guidance_scale": guidance.get("guidance", 1)}
        if "negative_prompt" in guidance:
            away, _ = pipe.encode_prompt([guidance["negative_prompt"]] * 2)
            request["negative_prompt_embeds"] = away
        order = [prompts[1], prompts[0]]
        wanted, conditioning = run_flux_2(pipe, order, noise, **request), bundle.conditioning([1, 0])
        assert (conditioning.unconditional is None) == ("negative_prompt" not in guidance)
        assert distance(together := bundle.denoise(noise, conditioning, quantized=False), wanted) < 1e-4
        quantized = bundle.denoise(noise, conditioning)
        pipe.transformer = AdatsqTransformer.from_bundle(bundle, pipe.scheduler)
        assert distance(run_flux_2(pipe, order, noise, **request), quantized) < flips(quantized, together)
        shown = Image.new("RGB", (64, 64))
        with pytest.raises(MismatchError, match=r"got 28 image tokens, some of another image, .* and without an image"):
            run_flux_2(pipe, order, noise, **request, image=shown)
        with pytest.raises(MismatchError, match="argument 'joint_attention_kwargs' of the transformer: a bundle takes"):
            run_flux_2(pipe, order, noise, **request, attention_kwargs={"scale": 0.5})
        with pytest.raises(UserError, match=r"'encoder_hidden_states': got .* \[2, 256, 48\], expected .* 512, 48"):
            run_flux_2(pipe, order, noise, **request, max_sequence_length=256)
        count = pipe._prepare_text_ids
        monkeypatch.setattr(pipe, "_prepare_text_ids", lambda tokens: count(tokens) + 1)
        with pytest.raises(MismatchError, match="txt_ids: got positions that do not count a text's tokens from zero"):
            run_flux_2(pipe, order, noise, **request)


@pytest.mark.slow  # 512 tokens of every text
def test_a_chroma_from_pipeline_to_bundle_and_back(tmp_path: Path) -> None:
    """Captions of several lengths in one bundle, each alone in the pipeline, whose masks are numbers that are added."""
    pipe = quiet(make_chroma_pipeline())
    options = {"target": "cpu", "steps": 2, "guidance": 4.0, "prompts": CAPTIONS, "negative_prompt": "a green", **SIZE}
    built = adatsq_trt.build(
        pipe, output=tmp_path / "run", **{**options, **EFFORT, "calibration_samples": len(CAPTIONS)}
    )
    with built as bundle:
        noise, conditioning = bundle.noise([1, 2, 3]), bundle.conditioning([0, 1, 2])
        assert len(set(conditioning.conditional["attention_mask"].sum(axis=1).tolist())) == len(CAPTIONS)
        together = bundle.denoise(noise, conditioning, quantized=False)
        request: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0}
        for index, caption in enumerate(CAPTIONS):
            own = noise[index : index + 1]
            wanted = run(pipe, [caption], own, negative_prompt=["a green"], **request)
            assert distance(together[index : index + 1], wanted) < 1e-4
            assert distance(together[index : index + 1], run(pipe, [caption], own, **request)) > 1e-3
        quantized = bundle.denoise(noise, conditioning)
        tokens, _, mask, *negative = pipe.encode_prompt([CAPTIONS[0]], ["a green"])
        encoded = {"prompt_embeds": tokens, "negative_prompt_embeds": negative[0]}
        pipe.transformer = AdatsqTransformer.from_bundle(bundle, pipe.scheduler)
        in_pipeline = run(pipe, list(CAPTIONS), noise, negative_prompt=["a green"] * 3, **request)
        assert distance(in_pipeline, quantized) < flips(quantized, together)
        masks = {"prompt_attention_mask": mask.bool(), "negative_prompt_attention_mask": negative[2].bool()}
        with pytest.raises(MismatchError, match=r"attention_mask: got torch\.bool of .* booleans hide tokens, numbers"):
            run(pipe, None, noise[:1], **encoded, **masks, **request)
        with pytest.raises(MismatchError, match=r"got torch.float32 of \[1, 268\], .* with max_sequence_length=512"):
            run(pipe, [CAPTIONS[0]], noise[:1], max_sequence_length=256, **request)


def test_an_ltx_video_from_pipeline_to_bundle_and_back(tmp_path: Path) -> None:
    """Captions of several lengths in one bundle, each alone in the pipeline; another frame rate is refused there."""
    pipe = quiet(tiny_ltx.make_ltx_pipeline())
    size: dict[str, Any] = {"height": tiny_ltx.HEIGHT, "width": tiny_ltx.WIDTH}
    options = {"target": "cpu", "steps": 2, "guidance": 4.0, "prompts": CAPTIONS, "negative_prompt": "a green"}
    options |= {**size, "frames": tiny_ltx.FRAMES, **EFFORT, "calibration_samples": len(CAPTIONS)}
    with adatsq_trt.build(pipe, output=tmp_path / "run", **options) as bundle:
        noise, conditioning = bundle.noise([1, 2, 3]), bundle.conditioning([0, 1, 2])
        assert tuple(conditioning.conditional["encoder_attention_mask"].sum(axis=1)) == tuple(n - 1 for n in LENGTHS)
        together = bundle.denoise(noise, conditioning, quantized=False)
        request = {"num_inference_steps": 2, "guidance_scale": 4.0, "num_frames": tiny_ltx.FRAMES, **size}
        for index, caption in enumerate(CAPTIONS):
            own = noise[index : index + 1]
            wanted = run(pipe, [caption], own, negative_prompt=["a green"], **request)
            assert distance(together[index : index + 1], wanted) < 1e-4
            for other in ({}, {"negative_prompt": ["a green"], "frame_rate": 12}):
                assert distance(together[index : index + 1], run(pipe, [caption], own, **request, **other)) > 1e-3
        quantized = bundle.denoise(noise, conditioning)
        pipe.transformer = AdatsqTransformer.from_bundle(bundle, pipe.scheduler)
        request |= {"negative_prompt": ["a green"] * 3}
        assert distance(run(pipe, list(CAPTIONS), noise, **request), quantized) < flips(quantized, together)
        assert distance(run(pipe, list(CAPTIONS), noise, guidance_rescale=0.7, **request), quantized) > 1e-3
        for changes, message in (
            ({"frame_rate": 24}, r"rope_interpolation_scale: got .*exported for \[0.32, 32.0, 32.0\]; .*frame_rate"),
            ({"height": 64, "width": 96}, r"num_frames, height, width: got \(2, 2, 3\), .* exported for \(2, 3, 2\)"),
            ({"attention_kwargs": {"scale": 0.5}}, "argument 'attention_kwargs' of the transformer: a bundle takes"),
            ({"max_sequence_length": 64}, "input 'encoder_hidden_states': got"),
        ):
            with pytest.raises(UserError, match=message):
                run(pipe, list(CAPTIONS), noise, **{**request, **changes})


@pytest.mark.slow
def test_a_hunyuan_video_from_pipeline_to_bundle_and_back(tmp_path: Path) -> None:
    """Prompts of several lengths, with and without quotes, in one bundle, guided away from another as the guider does.

    A pipeline fills up to 1,000 and 256 tokens whatever stands in them; what its masks show is the same.
    """
    pipe, prompts, negative = quiet(make_hunyuan_video_pipeline()), (CAPTIONS[1], 'a "red" seven'), 'a "green" three'
    pipe.text_encoder_2.eval()
    options = {"target": "cpu", "steps": 2, "frames": FRAMES, "prompts": prompts, "negative_prompt": negative}
    request = {"num_inference_steps": 2, "num_frames": FRAMES}
    with adatsq_trt.build(pipe, output=tmp_path / "run", **options, **SIZE, **EFFORT) as bundle:
        noise, conditioning = bundle.noise([1, 2]), bundle.conditioning([0, 1])
        together = bundle.denoise(noise, conditioning, quantized=False)
        for index, prompt in enumerate(prompts):
            own = noise[index : index + 1]
            wanted = run(pipe, [prompt], own, negative_prompt=[negative], **request)
            assert distance(together[index : index + 1], wanted) < 1e-4
            other = run(pipe, [prompt.replace('"', "")], own, negative_prompt=["a green three"], **request)
            assert distance(together[index : index + 1], other) > 1e-4
        quantized = bundle.denoise(noise, conditioning)
        transformer, image = AdatsqTransformer.from_bundle(bundle, pipe.scheduler), torch.ones(1, 3, 8)
        pipe.transformer = transformer
        in_pipeline = run(pipe, list(prompts), noise, negative_prompt=[negative] * 2, **request)
        assert distance(in_pipeline, quantized) < flips(quantized, together)
        call = {"timestep": torch.full((1,), 1000.0), "hidden_states": torch.zeros(1, 9, 2, 4, 3)}
        call |= {"encoder_hidden_states": torch.ones(1, 3, 32), "encoder_hidden_states_2": torch.ones(1, 3, 16)}
        with pytest.raises(MismatchError, match="image_embeds: got other numbers than zero"):
            transformer(**call, image_embeds=0.1 * image)
        with pytest.raises(MismatchError, match=r"hidden_states: .* expected 5 channels of zeros at the end"):
            transformer(**{**call, "hidden_states": torch.ones(1, 9, 2, 4, 3)}, image_embeds=0 * image)
