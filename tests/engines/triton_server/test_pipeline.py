"""Text encoders and VAE beside a bundle, against the pipeline of diffusers that it was built from."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.triton_server import pipeline as module
from adatsq_trt.engines.triton_server.pipeline import PIPELINE_NAME, Pipeline, place_pipeline, require_pipeline
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository
from adatsq_trt.engines.triton_server.requests import read_request
from adatsq_trt.errors import DamagedFileError, DependencyError, MismatchError, MissingFileError, UserError
from tests import tiny_ltx
from tests.served_pipelines import MAKERS, SavedPipeline, save_and_build
from tests.tiny_checkpoints import HEIGHT, WIDTH

TEXT = "a red three and a green seven"
QUOTED = 'a "red" three'


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SavedPipeline]:
    """A pipeline by its name, with its bundle; for reading."""
    made = dict[str, SavedPipeline]()

    def one(name: str) -> SavedPipeline:
        if name not in made:
            made[name] = save_and_build(name, tmp_path_factory.mktemp(name))
        return made[name]

    return one


@pytest.fixture
def saved(build: Callable[[str], SavedPipeline]) -> SavedPipeline:
    """Wan's, whose bundle has guidance and is the fastest to build."""
    return build("wan")


@pytest.fixture
def own(saved: SavedPipeline, tmp_path: Path) -> Path:
    """A copy of the pipeline, for writing."""
    return Path(shutil.copytree(saved.folder, tmp_path / "own"))


def placed(saved: SavedPipeline, folder: Path) -> Path:
    place_pipeline(saved.folder, saved.bundle, folder)
    return folder / PIPELINE_NAME


# What pipelines of diffusers do themselves, for each: a text's encoding, and what the VAE makes of latents.


def encode_flux(pipe: Any) -> dict[str, Tensor]:
    tokens, pooled, _ = pipe.encode_prompt(TEXT, None, max_sequence_length=512)
    return {"encoder_hidden_states": tokens, "pooled_projections": pooled}


def encode_z_image(pipe: Any) -> dict[str, Tensor]:
    captions, _ = pipe.encode_prompt(TEXT, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": captions[0][None]}


def encode_qwen_image(pipe: Any) -> dict[str, Tensor]:
    tokens, _ = pipe.encode_prompt(TEXT, max_sequence_length=512)
    return {"encoder_hidden_states": tokens}


def encode_stable_diffusion_3(pipe: Any) -> dict[str, Tensor]:
    tokens, _, pooled, _ = pipe.encode_prompt(
        TEXT, None, None, do_classifier_free_guidance=False, max_sequence_length=256
    )
    return {"encoder_hidden_states": tokens, "pooled_projections": pooled}


def encode_flux_2(pipe: Any) -> dict[str, Tensor]:
    tokens, _ = pipe.encode_prompt(TEXT)
    return {"encoder_hidden_states": tokens}


def encode_chroma(pipe: Any) -> dict[str, Tensor]:
    tokens, _, mask, *_ = pipe.encode_prompt(TEXT, do_classifier_free_guidance=False, max_sequence_length=512)
    return {"encoder_hidden_states": tokens, "attention_mask": mask}


def encode_ltx(pipe: Any) -> dict[str, Tensor]:
    tokens, mask, *_ = pipe.encode_prompt(TEXT, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": tokens, "encoder_attention_mask": mask.bfloat16()}


def encode_wan(pipe: Any) -> dict[str, Tensor]:
    tokens, _ = pipe.encode_prompt(TEXT, do_classifier_free_guidance=False, max_sequence_length=512)
    return {"encoder_hidden_states": tokens}


def encode_hunyuan_video(pipe: Any) -> dict[str, Tensor]:
    tokens, mask, glyphs, glyph_mask = pipe.encode_prompt(QUOTED)
    return {
        "encoder_hidden_states": tokens[mask.bool()][None],
        "encoder_hidden_states_2": glyphs[glyph_mask.bool()][None],
    }


def decode_flux(pipe: Any, latents: Tensor) -> Tensor:
    return decode_z_image(pipe, pipe._unpack_latents(latents, HEIGHT, WIDTH, pipe.vae_scale_factor))


def decode_z_image(pipe: Any, latents: Tensor) -> Tensor:
    scaled = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return pipe.vae.decode(scaled.bfloat16(), return_dict=False)[0].permute(0, 2, 3, 1)


def decode_qwen_image(pipe: Any, latents: Tensor) -> Tensor:
    unpacked = pipe._unpack_latents(latents, HEIGHT, WIDTH, pipe.vae_scale_factor)
    return decode_wan(pipe, unpacked)[:, 0]  # a video of one frame


def decode_flux_2(pipe: Any, latents: Tensor) -> Tensor:
    planes, statistics = latents.mT.unflatten(-1, (HEIGHT // 16, WIDTH // 16)), pipe.vae.bn
    mean, variance = (x.view(1, -1, 1, 1) for x in (statistics.running_mean, statistics.running_var))
    own = pipe._unpatchify_latents(planes * torch.sqrt(variance + pipe.vae.config.batch_norm_eps) + mean)
    return pipe.vae.decode(own.bfloat16(), return_dict=False)[0].permute(0, 2, 3, 1)


def decode_ltx(pipe: Any, latents: Tensor) -> Tensor:
    planes = pipe._unpack_latents(latents, 2, tiny_ltx.HEIGHT // 32, tiny_ltx.WIDTH // 32)
    own = (pipe.vae.latents_mean, pipe.vae.latents_std, pipe.vae.config.scaling_factor)
    return pipe.vae.decode(pipe._denormalize_latents(planes, *own).bfloat16())[0].permute(0, 2, 3, 4, 1)


def decode_wan(pipe: Any, latents: Tensor) -> Tensor:
    config = pipe.vae.config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return pipe.vae.decode((latents * std + mean).bfloat16(), return_dict=False)[0].permute(0, 2, 3, 4, 1)


def decode_hunyuan_video(pipe: Any, latents: Tensor) -> Tensor:
    scaled = latents.bfloat16() / pipe.vae.config.scaling_factor
    return pipe.vae.decode(scaled, return_dict=False)[0].permute(0, 2, 3, 4, 1)


ENCODE = {
    "flux": encode_flux,
    "z_image": encode_z_image,
    "wan": encode_wan,
    "qwen_image": encode_qwen_image,
    "stable_diffusion_3": encode_stable_diffusion_3,
    "flux_2": encode_flux_2,
    "flux_2_klein": encode_flux_2,
    "chroma": encode_chroma,
    "ltx": encode_ltx,
    "hunyuan_video_15": encode_hunyuan_video,
}
DECODE = {
    "flux": decode_flux,
    "z_image": decode_z_image,
    "wan": decode_wan,
    "qwen_image": decode_qwen_image,
    "stable_diffusion_3": decode_z_image,
    "flux_2": decode_flux_2,
    "flux_2_klein": decode_flux_2,
    "chroma": decode_flux,
    "ltx": decode_ltx,
    "hunyuan_video_15": decode_hunyuan_video,
}


# Klein's differs from dev's in the text encoder alone.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "flux_2_klein" else n for n in MAKERS]
)
def test_texts_and_pictures_are_the_pipelines(build: Callable[[str], SavedPipeline], tmp_path: Path, name: str) -> None:
    saved = build(name)
    require_pipeline(saved.folder, saved.bundle)
    bundle = Bundle(saved.bundle)
    pipeline = Pipeline(placed(saved, tmp_path), bundle)
    assert saved.bundle.manifest.text is not None
    pipe = getattr(diffusers, saved.bundle.manifest.text.pipeline).from_pretrained(
        saved.folder, transformer=None, torch_dtype=torch.bfloat16
    )
    condition = pipeline.conditioning(QUOTED if name == "hunyuan_video_15" else TEXT, 2)
    with torch.no_grad():
        for name_, expected in ENCODE[name](pipe).items():
            got, rows = condition.conditional[name_], expected.shape[1]
            np.testing.assert_array_equal(got[:, :rows], expected.float().numpy().repeat(2, axis=0))
            assert not got[:, rows:].any()
            assert got[0].std() > 0
        noise = bundle.noise([1, 2])
        images = pipeline.decode(noise)
        expected = (DECODE[name](pipe, torch.from_numpy(noise)).float() / 2 + 0.5).clamp(0, 1).numpy()
    assert images.shape == expected.shape
    assert images.std() > 0.02
    # A batch of two is summed in another order than one sample at a time; that may turn the last of bfloat16's bits.
    assert np.abs(images - expected).max() < 2**-5
    assert np.abs(images - expected).mean() < 1e-3
    other = pipeline.conditioning("a red seven", 1).conditional
    for key, value in condition.conditional.items():
        assert np.linalg.norm(value[0] - other[key][0]) > 0.1 * np.linalg.norm(value[0])


def test_the_second_branch_keeps_the_prompt_that_the_bundle_was_built_with(
    saved: SavedPipeline, tmp_path: Path
) -> None:
    bundle = Bundle(saved.bundle)
    pipeline = Pipeline(placed(saved, tmp_path), bundle)
    second, stored = pipeline.conditioning(TEXT, 2).unconditional, bundle.conditioning([0, 0]).unconditional
    assert second is not None
    assert stored is not None
    for name, value in stored.items():
        np.testing.assert_array_equal(second[name], value)
    asked = read_request({"seed": np.array([3])}, '{"text": "seven", "negative": "a red"}', bundle, 2, pipeline)
    for name, value in pipeline.conditioning("a red", 1).conditional.items():
        np.testing.assert_array_equal(asked.generation.conditioning.unconditional[name], value)


def test_a_text_with_more_tokens_than_the_graphs_take(build: Callable[[str], SavedPipeline], tmp_path: Path) -> None:
    saved = build("z_image")
    pipeline = Pipeline(placed(saved, tmp_path), Bundle(saved.bundle))
    with pytest.raises(UserError, match=r"text: got \d+ tokens, the bundle takes 32; shorten it, or build the bundle"):
        pipeline.conditioning(" ".join([TEXT] * 10), 1)


def set_value(path: Path, name: str, value: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))


def add_space(path: Path) -> None:
    path.write_text(path.read_text() + " ")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "class": (
        lambda f: set_value(f / "model_index.json", "_class_name", "FluxPipeline"),
        "is a FluxPipeline, the bundle was built from a WanPipeline",
    ),
    "encoder": (
        lambda f: set_value(f / "text_encoder/config.json", "d_model", 8),
        r"text_encoder/config.json' is not the file that the bundle's prompts were encoded with",
    ),
    "tokenizer": (lambda f: add_space(f / "tokenizer/tokenizer.json"), "tokenizer.json' is not the file"),
    "no weights": (lambda f: (f / "text_encoder/model.safetensors").unlink(), "model.safetensors' does not exist"),
    "no folder": (shutil.rmtree, "model_index.json' does not exist; name the folder of a pipeline"),
    "json": (lambda f: (f / "model_index.json").write_text("{"), "is not complete JSON"),
    "another scheduler": (
        lambda f: set_value(f / "scheduler/scheduler_config.json", "flow_shift", 5.0),
        "has flow_shift = 5.0, the bundle's 3.0",
    ),
    "another class of schedulers": (
        lambda f: set_value(f / "scheduler/scheduler_config.json", "_class_name", "FlowMatchEulerDiscreteScheduler"),
        "is a FlowMatchEulerDiscreteScheduler, the bundle's a UniPC",
    ),
    "no scheduler": (lambda f: (f / "scheduler/scheduler_config.json").write_text("{"), "scheduler' does not load"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_pipelines_that_do_not_fit(saved: SavedPipeline, own: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(own)
    with pytest.raises(UserError, match=message):
        write_repository([Deployment("wan", saved.bundle, pipeline=own)], tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_a_bundle_that_knows_no_text_encoders(saved: SavedPipeline, tiny_bundle: BundleFiles) -> None:
    with pytest.raises(MismatchError, match="holds a TinyModel and does not say how its text encoders work"):
        require_pipeline(saved.folder, tiny_bundle)


def test_nothing_but_recorded_files_is_placed(saved: SavedPipeline, own: Path, tmp_path: Path) -> None:
    for name in ("text_encoder/model.bin", "text_encoder/module.py"):
        (own / name).touch()
    for link in (False, True):
        folder = tmp_path / str(link)
        place_pipeline(own, saved.bundle, folder, link)
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {path.is_symlink() for path in files} == {link}
        assert saved.bundle.manifest.text is not None
        assert len(files) == len(saved.bundle.manifest.text.files)
        assert not {"model.bin", "module.py"} & {path.name for path in files}


def test_altered_files_are_not_loaded(saved: SavedPipeline, tmp_path: Path) -> None:
    folder = placed(saved, tmp_path)
    settings = folder / "text_encoder" / "config.json"
    add_space(settings)
    with pytest.raises(DamagedFileError, match=r"config.json' was altered: got sha256 .*, expected .* again"):
        Pipeline(folder, Bundle(saved.bundle))
    settings.unlink()
    with pytest.raises(MissingFileError, match=r"config.json' does not exist"):
        Pipeline(folder, Bundle(saved.bundle))


def test_a_library_that_cleans_prompts_is_needed(
    saved: SavedPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="WanPipeline reads its prompts with the library ftfy"):
        Pipeline(placed(saved, tmp_path), Bundle(saved.bundle))


def test_repository(saved: SavedPipeline, tmp_path: Path) -> None:
    write_repository([Deployment("wan", saved.bundle, pipeline=saved.folder)], tmp_path / "repository")
    config = (tmp_path / "repository" / "wan" / "config.pbtxt").read_text()
    assert '"text"' in config
    assert re.search(r'key: "pipeline" value { string_value: "1/pipeline" }', config)
    assert '"text": "a red bicycle"' in (tmp_path / "repository" / "README.md").read_text()
    assert "torch accelerate diffusers transformers ftfy" in (tmp_path / "repository" / "Dockerfile").read_text()


def test_requests(saved: SavedPipeline, tmp_path: Path) -> None:
    bundle = Bundle(saved.bundle)
    pipeline = Pipeline(placed(saved, tmp_path), bundle)
    seeds, prompts = {"seed": np.array([3, 4])}, {"prompt": np.array([0, 1])}

    def read(tensors: dict[str, np.ndarray], parameters: dict[str, object]) -> Any:
        return read_request(tensors, json.dumps(parameters), bundle, 2, pipeline)

    got = read(seeds, {"text": TEXT})
    assert got.output == "png"
    for name, value in pipeline.conditioning(TEXT, 2).conditional.items():
        np.testing.assert_array_equal(got.generation.conditioning.conditional[name], value)
    read(seeds | prompts, {})
    for tensors, parameters, message in (
        (seeds | prompts, {"text": TEXT}, "got both, expected the parameter 'text' or 'prompt', 0 to 1"),
        (seeds, {}, "got neither"),
        (seeds, {"text": " "}, "text: got ' ', expected words"),
        (seeds, {"text": 3}, "text: got 3, expected words"),
        (seeds, {"text": TEXT, "negative": " "}, "negative: got ' ', expected words"),
        ({"seed": np.arange(3)}, {"text": TEXT}, "got 3 seeds, expected one seed for every prompt, 1 to 2"),
    ):
        with pytest.raises(UserError, match=message):
            read(tensors, parameters)
