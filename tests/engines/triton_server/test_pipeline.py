"""Text encoders and VAE around a bundle, against a FluxPipeline with the bundle in its transformer's place."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.transformer import AdatsqTransformer
from adatsq_trt.engines.triton_server.pipeline import Pipeline, copy_pipeline, require_pipeline
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository
from adatsq_trt.engines.triton_server.requests import read_request
from adatsq_trt.errors import DamagedFileError, MismatchError, MissingFileError, UserError
from tests.tiny_bundle import GUIDANCE, STEPS
from tests.tiny_pipeline import TEXT_TOKENS, make_flux_bundle, save_pipeline

TEXT = "a red three and a green seven"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle(make_flux_bundle(tmp_path_factory.mktemp("flux") / "bundle"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("saved") / "pipeline")


@pytest.fixture
def own(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved pipeline, for writing."""
    return Path(shutil.copytree(saved, tmp_path / "own"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shift": 5.0}, "has shift = 5.0, the bundle's 3.0"),
        ({"_class_name": "UniPCMultistepScheduler"}, "is a UniPCMultistepScheduler, the bundle's a FlowMatchEuler"),
    ],
)
def test_a_pipeline_with_another_scheduler_is_refused_with_both_values(
    bundle: Bundle, own: Path, changes: dict[str, object], message: str
) -> None:
    require_pipeline(own, bundle.files)
    file = own / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(MismatchError, match=message):
        require_pipeline(own, bundle.files)
    file.write_text("{")
    with pytest.raises(DamagedFileError, match="scheduler' does not load"):
        require_pipeline(own, bundle.files)


def test_pictures_are_those_of_the_pipeline(bundle: Bundle, saved: Path, tmp_path: Path) -> None:
    """In 32 bits between text encoders and VAE, as the bundle's loop; a pipeline in 16 bits rounds its latents."""
    pipeline, noise = Pipeline(tmp_path, copy_pipeline(saved, tmp_path), bundle), bundle.noise([1, 2])
    images = pipeline.decode(bundle.denoise(noise, pipeline.conditioning(TEXT, 2)))
    pipe = FluxPipeline.from_pretrained(saved, transformer=None, torch_dtype=torch.bfloat16)
    pipe.transformer, decode = AdatsqTransformer.from_bundle(bundle), pipe.vae.decode
    pipe.vae.decode = lambda latents, **options: decode(latents.bfloat16(), **options)
    with torch.no_grad():
        texts = [pipe.encode_prompt(text, None, max_sequence_length=TEXT_TOKENS)[:2] for text in (TEXT, "")]
    names = (f"{negative}{kind}_embeds" for negative in ("", "negative_") for kind in ("prompt", "pooled_prompt"))
    embeds = dict(zip(names, (part.float().repeat_interleave(2, 0) for text in texts for part in text), strict=True))
    options = {"true_cfg_scale": GUIDANCE, "num_inference_steps": STEPS}
    sizes = {"height": 16, "width": 16, "latents": torch.from_numpy(noise), "output_type": "np"}
    expected = pipe(**embeds, **options, **sizes).images
    assert images.shape == expected.shape == (2, 16, 16, 3)
    assert images.std() > 0.05
    # Latents differ by what another order of summation rounds; now and then that turns the last of 8 bits.
    assert np.abs(images - expected).mean() < 1e-4
    assert np.abs(images - expected).max() < 2**-7


def test_the_pipeline_runs_in_16_bits_throughout(bundle: Bundle, saved: Path) -> None:
    pipe = FluxPipeline.from_pretrained(saved, transformer=None, torch_dtype=torch.bfloat16)
    pipe.transformer = AdatsqTransformer.from_bundle(bundle)
    sizes = {"height": 16, "width": 16, "num_inference_steps": STEPS, "max_sequence_length": TEXT_TOKENS}
    images = pipe(TEXT, **sizes, output_type="np").images  # its timesteps are rounded twice
    assert images.std() > 0.05


def test_another_text_is_another_picture(bundle: Bundle, saved: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, copy_pipeline(saved, tmp_path), bundle)
    one, other = (pipeline.conditioning(text, 1).conditional for text in (TEXT, "a red seven"))
    assert all(np.abs(one[name] - other[name]).max() > 0.1 for name in one)


def set_value(path: Path, name: str, value: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))


DAMAGES = {
    "class": (lambda f: set_value(f / "model_index.json", "_class_name", "WanPipeline"), "is a WanPipeline and"),
    "clip": (lambda f: set_value(f / "text_encoder/config.json", "hidden_size", 8), "hidden_size 8, .* needs 32"),
    "t5": (lambda f: set_value(f / "text_encoder_2/config.json", "d_model", 8), "d_model 8, .* needs 32"),
    "vae": (lambda f: set_value(f / "vae/config.json", "latent_channels", 16), "latent_channels 16, .* needs 1"),
    "pickle": (lambda f: next((f / "vae").glob("*.safetensors")).rename(f / "vae/model.bin"), "no weights in safetens"),
    "no folder": (shutil.rmtree, "model_index.json' does not exist; name the folder of a pipeline"),
    "json": (lambda f: (f / "vae/config.json").write_text("{"), "is not complete JSON"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_pipelines_that_do_not_fit(bundle: Bundle, own: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(own)
    with pytest.raises(UserError, match=message):
        write_repository([Deployment("flux", bundle.files, pipeline=own)], tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_a_bundle_of_another_architecture(tiny_bundle: BundleFiles, saved: Path) -> None:
    with pytest.raises(MismatchError, match="the bundle's model a TinyModel"):
        require_pipeline(saved, tiny_bundle)


def test_nothing_but_settings_and_safetensors_is_copied(own: Path, tmp_path: Path) -> None:
    for name in ("vae/model.bin", "vae/module.py", "feature_extractor/config.json"):
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).touch()
    copy_pipeline(own, tmp_path / "copy")
    copied = [path.name for path in (tmp_path / "copy").rglob("*")]
    assert "model.safetensors" in copied
    assert not {"model.bin", "module.py", "feature_extractor", "transformer"} & set(copied)


def test_altered_files_are_not_loaded(bundle: Bundle, saved: Path, tmp_path: Path) -> None:
    record = copy_pipeline(saved, tmp_path)
    settings = tmp_path / "pipeline" / "vae" / "config.json"
    settings.write_text(settings.read_text() + " ")
    with pytest.raises(DamagedFileError, match=r"config.json' was altered: got sha256 .*, expected .* again"):
        Pipeline(tmp_path, record, bundle)
    settings.unlink()
    with pytest.raises(MissingFileError, match=r"config.json' does not exist"):
        Pipeline(tmp_path, record, bundle)
    with pytest.raises(DamagedFileError, match=r"pipeline.json' was altered"):
        Pipeline(tmp_path, "0" * 64, bundle)


def test_repository(bundle: Bundle, saved: Path, tmp_path: Path) -> None:
    write_repository([Deployment("flux", bundle.files, pipeline=saved)], tmp_path / "repository")
    assert '"text"' in (tmp_path / "repository" / "flux" / "config.pbtxt").read_text()
    assert '"text": "a red bicycle"' in (tmp_path / "repository" / "README.md").read_text()
    assert "torch accelerate diffusers transformers" in (tmp_path / "repository" / "Dockerfile").read_text()


def test_requests(bundle: Bundle, saved: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, copy_pipeline(saved, tmp_path), bundle)
    seeds, prompts = {"seed": np.array([3, 4])}, {"prompt": np.array([0, 1])}

    def read(tensors: dict[str, np.ndarray], parameters: dict[str, object], with_text: bool = True):
        return read_request(tensors, json.dumps(parameters), bundle, 2, pipeline if with_text else None)

    got = read(seeds, {"text": TEXT})
    assert got.output == "png"
    for name, value in pipeline.conditioning(TEXT, 2).conditional.items():
        np.testing.assert_array_equal(got.generation.conditioning.conditional[name], value)
    read(seeds | prompts, {})
    for tensors, parameters, with_text, message in (
        (seeds | prompts, {"text": TEXT}, True, "got both, expected the parameter 'text' or 'prompt', 0 to 9"),
        (seeds, {}, True, "got neither"),
        (seeds, {"text": TEXT}, False, f"text '{TEXT}': not one of the bundle's 0 texts; ask with 'prompt', 0 to 9"),
        (seeds, {"text": " "}, True, "text: got ' ', expected words"),
        (seeds, {"text": 3}, True, "text: got 3, expected words"),
        ({"seed": np.arange(3)}, {"text": TEXT}, True, "got 3 seeds, expected one seed for every prompt, 1 to 2"),
    ):
        with pytest.raises(UserError, match=message):
            read(tensors, parameters, with_text)
